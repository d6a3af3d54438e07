"""Benchmark noise and straight path, uint8 images -> x_T and i(t) at K = 2 times, against plain PyTorch code.

pytest benchmarks/bench_path_interpolate.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan import VPSDE
from spigan.ops import BACKENDS, path_interpolate
from spigan.ops.backends import why_unavailable

from .measuring import DEVICE

TIMES = (0.4, 1.0)
# The float32 output takes 67 MB on a CPU and 1 GB on a GPU, more than any cache.
IMAGES = 28000 if DEVICE.type == "cuda" else 1824
KERNELS = [b for b in BACKENDS if b != "reference" and why_unavailable("path_interpolate", b, DEVICE) is None]
MEAN_COEF, STD = VPSDE().marginal(1.0)


def _eager(x0: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    clean = x0.float() / 127.5 - 1.0
    x_T = MEAN_COEF * clean + STD * torch.randn(clean.shape, device=clean.device)
    i = torch.stack([t * clean + (1.0 - t) * x_T for t in TIMES])
    return x_T.to(dtype), i.to(dtype)


_compiled = torch.compile(_eager)


@pytest.mark.parametrize(
    "implementation", ["reference", "eager with torch.randn", "compiled with torch.randn", *KERNELS]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_path_interpolate(row: Any, dtype: torch.dtype, implementation: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=generator).to(DEVICE)
    functions: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "eager with torch.randn": lambda: _eager(x0, dtype),
        "compiled with torch.randn": lambda: _compiled(x0, dtype),
    }
    function = functions.get(
        implementation, lambda: path_interpolate(x0, TIMES, seed=0, dtype=dtype, backend=implementation)
    )

    def check(result: tuple[Tensor, Tensor]) -> None:
        x_T, i = (x.float() for x in result)
        atol = 4e-2 if dtype == torch.bfloat16 else 2e-5
        clean = x0.float() / 127.5 - 1.0
        torch.testing.assert_close(i[1], clean, atol=atol, rtol=0)
        torch.testing.assert_close(i[0], TIMES[0] * clean + (1 - TIMES[0]) * x_T, atol=atol, rtol=0)
        if implementation in functions:  # these draw PyTorch's noise
            assert abs(x_T.std().item() - 1.0) < 1e-2
        else:
            expected = path_interpolate(x0, TIMES, seed=0, dtype=dtype, backend="reference")[0]
            torch.testing.assert_close(x_T, expected.float(), atol=atol, rtol=0)

    row(
        f"path_interpolate, uint8 -> {str(dtype)[6:]}, K = {len(TIMES)}, {IMAGES} x 3 x 32 x 32",
        implementation,
        function,
        check=check,
        moved=x0.numel() * (1 + dtype.itemsize * (1 + len(TIMES))),
    )
