"""Custom ops on CUDA C++ and Triton kernels; what each computes in plain torch. They import torch and triton only."""
