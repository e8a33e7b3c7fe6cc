"""Kernels in Triton and CUDA C++ as custom ops, and their references in plain torch; imports torch and triton only."""
