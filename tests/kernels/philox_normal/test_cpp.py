"""The C++ kernel of philox_normal on every instruction set of this CPU, through the operator."""

from __future__ import annotations

import pytest
import torch

from spigan.ops import philox_normal

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 3, 2**32 + 1])
def test_philox_normal(isa, dtype, offset, poisoned_memory):
    seeds = torch.tensor([0, 7, 2**63 - 1])
    for shape in ((3, 5, 7), (3, 1), (3, 517), (3, 0)):
        actual = philox_normal(shape, seed=seeds, offset=offset, dtype=dtype, backend="cpp")
        expected = philox_normal(shape, seed=seeds, offset=offset, backend="reference")
        # 1e-5: two backends' float32; then the rounding to a half type.
        eps = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
        torch.testing.assert_close(actual.double(), expected.double(), rtol=eps, atol=1e-5)
