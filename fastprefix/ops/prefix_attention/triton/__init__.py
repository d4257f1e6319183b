"""The Triton backend. Triton itself is imported with the kernels, at the first call."""
