"""Sparse decoding: Triton ops and the runtime that applies a plan. Importing this package imports no triton."""
