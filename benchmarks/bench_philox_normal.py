"""Benchmark standard normals: this project's backends against torch.randn.

pytest benchmarks/bench_philox_normal.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spigan.ops import BACKENDS, philox_normal
from spigan.ops.backends import why_unavailable

from .measuring import DEVICE

SHAPES = {"z of 100 cifar10 images": (100, 3, 32, 32), "4 M": (4, 1024, 1024)}
KERNELS = [b for b in BACKENDS if b != "reference" and why_unavailable("philox_normal", b, DEVICE) is None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("implementation", ["reference", "torch.randn", *KERNELS])
def test_philox_normal(row: Any, shape: tuple[int, ...], implementation: str) -> None:
    def draw(backend: str = implementation) -> Tensor:
        if backend == "torch.randn":
            return torch.randn(shape, device=DEVICE)
        return philox_normal(shape, seed=0, device=DEVICE, backend=backend)

    def check(result: Tensor) -> None:
        if implementation == "torch.randn":
            assert abs(result.std().item() - 1.0) < 1e-2
        else:
            torch.testing.assert_close(result, draw("reference"), atol=1e-5, rtol=0)

    group = f"philox_normal, {next(name for name, s in SHAPES.items() if s == shape)}"
    row(group, implementation, draw, check=check, moved=4 * torch.Size(shape).numel())
