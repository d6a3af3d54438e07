"""The CUDA kernel of rk4_mlp that uses the matrix unit, executed on the CPU by csrc/testing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from cuda_on_cpu import pretend
from rk4_problem import Problem, assert_rk4

pytestmark = pytest.mark.slow

# Columns of a block must be a multiple of 16, D one of 32; a block needs 64 threads for 16 columns.
DEVICES = {
    "cluster of 1": {"processors": 2, "largest_cluster": 1, "threads": 128},
    "cluster of 2": {"processors": 2, "largest_cluster": 2, "threads": 64},
    "workspace of 2": {"major": 8, "processors": 2, "threads": 64},
    "cluster of 2, idle warp": {"processors": 2, "largest_cluster": 2, "threads": 96},
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize(("batch", "dim", "layers"), [(1, 32, 1), (19, 32, 3), (40, 32, 2)])
def test_states(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    device: dict[str, int],
    batch: int,
    dim: int,
    layers: int,
) -> None:
    pretend(kernels, **device, matrix_only=True)
    problem = Problem(batch, dim, layers, torch.float32)
    plan = problem.plan(kernels)
    assert plan["matrix"] and plan["rows"] == 16
    assert plan["exchange"] == ("workspace" if "major" in device else "cluster")
    assert_rk4(kernels, assert_accurate, problem, [0.5, 1.0], 2)


@pytest.mark.parametrize("device", [DEVICES["cluster of 2"], DEVICES["workspace of 2"]], ids=["cluster", "workspace"])
def test_states_of_unaligned_memory_and_of_every_step(
    kernels: ModuleType, assert_accurate: Callable[..., None], device: dict[str, int]
) -> None:
    pretend(kernels, **device, matrix_only=True)
    problem = Problem(3, 32, 2, torch.float32, "tanh")
    assert_rk4(kernels, assert_accurate, problem, shift=1)
    times = [0.25, 0.5, 0.75, 1.0]
    actual = problem.solve(kernels, [0.5, 1.0], 4, every_step=True)
    exact, plain = (problem.reference(dtype, times, 4) for dtype in (torch.float64, torch.float32))
    assert_accurate(actual, plain, exact)


def test_several_tiles_of_outputs(kernels: ModuleType, assert_accurate: Callable[..., None]) -> None:
    pretend(kernels, processors=2, largest_cluster=2, threads=128, matrix_only=True)
    problem = Problem(5, 64, 2, torch.float32)
    assert problem.plan(kernels)["members"] == 2
    assert_rk4(kernels, assert_accurate, problem)


def test_a_row_depends_on_nothing_but_itself(kernels: ModuleType) -> None:
    pretend(kernels, **DEVICES["cluster of 2"], matrix_only=True)
    problem = Problem(18, 32, 2, torch.float32)
    expected = problem.solve(kernels, [1.0], 1)
    problem.h0[3] = math.nan
    others = [row for row in range(18) if row != 3]
    actual = problem.solve(kernels, [1.0], 1)
    assert actual[:, 3].isnan().all() and actual[:, others].equal(expected[:, others])
    problem.h0 = problem.h0[17:]
    assert problem.solve(kernels, [1.0], 1).equal(expected[:, 17:])
