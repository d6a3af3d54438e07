"""Triton kernels, one module per operation, with the names of `spigan.ops`; installed as `spigan.kernels`."""
