"""The C++ kernel of path_interpolate on every instruction set of this CPU, through the operator."""

from __future__ import annotations

import pytest
import torch

from spigan.ops import path_interpolate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("x0_dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 1, 1, 1), (4, 3, 9, 33)])
def test_path_interpolate(isa, shape, x0_dtype, dtype, poisoned_memory):
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8) if x0_dtype == torch.uint8 else torch.rand(shape).to(x0_dtype)
    flips = torch.arange(shape[0]) % 2 == 0
    for options in ({"noise": torch.randn(shape)}, {"seed": 5, "offset": 2**32 + 3}, {"seed": 5, "flips": flips}):
        actual = path_interpolate(x0, [0.3, 0.9, 1.0], **options, dtype=dtype, backend="cpp")
        exact = path_interpolate(x0, [0.3, 0.9, 1.0], **options, dtype=torch.float32, backend="reference")
        eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
        for a, e in zip(actual, exact, strict=True):
            torch.testing.assert_close(a.float(), e, rtol=eps, atol=1e-5)
