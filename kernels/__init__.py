"""Triton kernels, imported as `atop_fast.kernels`. Importing this package does not import triton."""
