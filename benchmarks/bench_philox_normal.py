"""Standard normals: this project's backends beside torch.randn, in one run.

pytest benchmarks/bench_philox_normal.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spigan.ops import philox_normal

SHAPES = {"z of 100 cifar10 images": (100, 3, 32, 32), "4 M": (4, 1024, 1024)}


def _draws(shape: tuple[int, ...], backend: str) -> Callable[[], Tensor]:
    if backend == "torch.randn":
        return lambda: torch.randn(shape)
    return lambda: philox_normal(shape, seed=0, backend=backend)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("backend", ["reference", "cpp", "torch.randn"])
def test_philox_normal(benchmark, shape: tuple[int, ...], backend: str) -> None:  # type: ignore[no-untyped-def]
    draw = _draws(shape, backend)
    if backend == "cpp":  # a time is worth nothing where the result is wrong
        torch.testing.assert_close(draw(), _draws(shape, "reference")(), atol=1e-5, rtol=0)
    benchmark.group = f"philox_normal, {next(name for name, s in SHAPES.items() if s == shape)}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result = benchmark(draw)
    assert result.shape == shape
    benchmark.extra_info["normals_per_second"] = result.numel() / benchmark.stats.stats.median
