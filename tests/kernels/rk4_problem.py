"""A problem of rk4_mlp for the CUDA kernels that csrc/testing executes on the CPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from cuda_on_cpu import number
from guarded_array import Array
from torch import Tensor

from spigan.ops.rk4_mlp import rk4_mlp_reference, step_grid


class Problem:
    """Inputs of rk4_mlp, of which the float64 and the plain result are known."""

    def __init__(self, batch: int, dim: int, layers: int, dtype: torch.dtype, activation: str = "silu") -> None:
        generator = torch.Generator().manual_seed(batch + 100 * dim + layers)

        def draw(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(dtype)

        self.dtype, self.activation = dtype, activation
        self.h0 = draw(batch, dim, scale=1.0)
        self.weight = draw(layers, dim, dim, scale=1.2 / math.sqrt(dim))
        self.bias, self.time_weight = draw(layers, dim, scale=0.3), draw(layers, dim, scale=0.3)

    def reference(self, dtype: torch.dtype, times: Sequence[float], steps: int) -> Tensor:
        tensors = (x.to(dtype) for x in (self.h0, self.weight, self.bias, self.time_weight))
        return rk4_mlp_reference(*tensors, times, steps, self.activation)

    def plan(self, kernels: ModuleType) -> dict[str, Any]:
        plan: dict[str, Any] = kernels.rk4_mlp_plan(number(kernels, self.dtype), *self.h0.shape, self.weight.shape[0])
        return plan

    def solve(
        self, kernels: ModuleType, times: Sequence[float], steps: int, *, every_step: bool = False, shift: int = 0
    ) -> Tensor:
        grid = list(step_grid(times, steps))
        ends = [0, *(n + 1 for n, step in enumerate(grid) if step[2])]
        intervals = [(grid[a][0], grid[a][1], b - a) for a, b in itertools.pairwise(ends)]
        out = Array((len(grid) if every_step else len(times), *self.h0.shape), self.dtype, shift)
        inputs = [Array.of(x, shift) for x in (self.h0, self.weight, self.bias, self.time_weight)]
        sizes = (*self.h0.shape, self.weight.shape[0])
        needed = kernels.rk4_mlp_workspace_bytes(number(kernels, self.dtype), *sizes)
        workspace = Array((needed,), torch.uint8)
        kernels.rk4_mlp(
            out.address,
            number(kernels, self.dtype),
            *(x.address for x in inputs),
            *sizes,
            intervals,
            every_step,
            kernels.ACTIVATIONS.index(self.activation),
            0,
            workspace.address if needed else 0,
        )
        workspace.checked()
        for array, value in zip(inputs, (self.h0, self.weight, self.bias, self.time_weight), strict=True):
            torch.testing.assert_close(array.checked(), value, rtol=0, atol=0, equal_nan=True)
        return out.checked()


def assert_rk4(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    problem: Problem,
    times: Sequence[float] = (1.0,),
    steps: int = 1,
    **options: Any,
) -> None:
    actual = problem.solve(kernels, times, steps, **options)
    wanted = (
        times if not options.get("every_step") else [start + length for start, length, _ in step_grid(times, steps)]
    )
    exact, plain = (problem.reference(dtype, wanted, steps) for dtype in (torch.float64, problem.dtype))
    assert_accurate(actual, plain, exact)
