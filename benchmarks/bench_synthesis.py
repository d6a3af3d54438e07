"""The whole synthesis network of the cifar10 preset: kernels beside the reference, in float32 and bfloat16.

pytest benchmarks/bench_synthesis.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan.models.generator import Generator
from spigan.ops import BACKENDS, use_backend
from spigan.ops.backends import why_unavailable

from .conftest import DEVICE

BACKENDS_HERE = [b for b in BACKENDS if why_unavailable("modulated_conv2d", b, DEVICE) is None]
FLOP_PER_IMAGE = 8.0e9  # 4.0 G multiply-adds in the convolutions, as they are defined


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return spigan.SPIGAN(spigan.preset("cifar10").model).generator.to(DEVICE).eval()


@pytest.mark.parametrize("implementation", BACKENDS_HERE)
@pytest.mark.parametrize("batch", [1, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_synthesis(row: Any, generator: Generator, dtype: torch.dtype, batch: int, implementation: str) -> None:
    h = torch.randn(batch, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def synthesize(backend: str = implementation, half: bool = dtype == torch.bfloat16) -> Tensor:
        with use_backend(backend), torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=half):
            return generator(h)

    expected = synthesize("reference", half=False)
    row(
        f"synthesis, cifar10, {batch} images, {str(dtype)[6:]}",
        implementation,
        synthesize,
        expected=expected,
        tolerance=(2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max().item(),
        flop=FLOP_PER_IMAGE * batch,
        dtype=dtype,
    )
