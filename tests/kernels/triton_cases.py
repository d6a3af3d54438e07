"""What the tests of the Triton kernels in Triton's interpreter share.

The interpreter is silently wrong for bfloat16, so these tests leave it out; the tests on a GPU cover it.
"""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.float16]


def assert_near(actual, expected, dtype, atol=1e-5):
    """`expected` is float32: its value to 1e-5, then one rounding to `dtype`."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=eps, atol=atol)
