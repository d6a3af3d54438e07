"""Triton kernels, one module per operation, named as in `spigan.ops`; installed as `spigan.kernels`."""
