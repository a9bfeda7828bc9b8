"""Emit readable Triton kernels from a spec."""
