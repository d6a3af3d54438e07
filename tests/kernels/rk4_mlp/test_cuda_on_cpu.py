"""The CUDA kernel of rk4_mlp, executed on the CPU by csrc/testing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu import HALVES, number, pretend
from guarded_array import Array
from torch import Tensor

from spigan.ops.rk4_mlp import rk4_mlp_reference, step_grid

pytestmark = pytest.mark.slow

CLUSTER_1 = {"processors": 2, "largest_cluster": 1}
CLUSTER_2 = {"processors": 4, "largest_cluster": 2}
CLUSTER_4 = {"processors": 4, "largest_cluster": 4}
WORKSPACE_1 = {"major": 8, "processors": 1}
WORKSPACE_2 = {"major": 8, "processors": 2}
WORKSPACE_4 = {"major": 8, "processors": 4}


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


DTYPES = [torch.float32, *HALVES]
DIVISIONS = [
    (CLUSTER_1, "cluster", 1),
    (CLUSTER_2, "cluster", 2),
    (CLUSTER_4, "cluster", 4),
    (WORKSPACE_1, "workspace", 1),
    (WORKSPACE_4, "workspace", 4),
]
SIZES = [(1, 16, 1), (3, 48, 2), (17, 16, 3)]
# Every division with every size and with every dtype, but not with every pair of these.
DIVIDED = [
    (DTYPES[(i + j) % 3], *division, *size) for i, division in enumerate(DIVISIONS) for j, size in enumerate(SIZES)
]


@pytest.mark.parametrize(("dtype", "device", "exchange", "members", "batch", "dim", "layers"), DIVIDED, ids=str)
def test_rk4_mlp(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    dtype: torch.dtype,
    device: dict[str, int],
    exchange: str,
    members: int,
    batch: int,
    dim: int,
    layers: int,
) -> None:
    pretend(kernels, **device)
    problem = Problem(batch, dim, layers, dtype)
    plan = problem.plan(kernels)
    assert (plan["exchange"], plan["weights"]) == (exchange, "shared")
    assert plan["members"] <= members
    assert (plan["workspace_bytes"] > 0) == (exchange == "workspace")
    if batch == 1:
        assert plan["members"] == members and plan["rows"] == 1
    assert_rk4(kernels, assert_accurate, problem)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("device", [CLUSTER_2, WORKSPACE_2], ids=["cluster", "workspace"])
def test_rk4_mlp_weights_in_global_memory(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, device: dict[str, int]
) -> None:
    pretend(kernels, **device, shared_bytes=8 << 10)
    for batch in (1, 11) if dtype == torch.float32 else (3,):
        problem = Problem(batch, 64, 2, dtype)
        assert problem.plan(kernels)["weights"] == "global"
        assert_rk4(kernels, assert_accurate, problem)


@pytest.mark.parametrize("activation", ["silu", "lrelu", "tanh", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rk4_mlp_activations(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, activation: str
) -> None:
    pretend(kernels, **CLUSTER_1)
    assert_rk4(kernels, assert_accurate, Problem(2, 16, 2, dtype, activation))


@pytest.mark.parametrize("device", [CLUSTER_2, WORKSPACE_4], ids=["cluster", "workspace"])
@pytest.mark.parametrize("every_step", [False, True])
def test_rk4_mlp_intervals(
    kernels: ModuleType, assert_accurate: Callable[..., None], device: dict[str, int], every_step: bool
) -> None:
    pretend(kernels, **device)
    for batch in (1, 5):
        problem = Problem(batch, 16, 2, torch.float32)
        if every_step:
            # The reference takes the same steps when it is asked for all of them.
            times = [0.25, 0.5, 0.75, 1.0]
            actual = problem.solve(kernels, [0.5, 1.0], 4, every_step=True)
            exact, plain = (problem.reference(dtype, times, 4) for dtype in (torch.float64, torch.float32))
            assert_accurate(actual, plain, exact)
        else:
            assert_rk4(kernels, assert_accurate, problem, [0.3, 0.31, 1.0], 3)


@pytest.mark.parametrize(
    ("device", "rows"),
    [
        ({"processors": 1, "largest_cluster": 1, "shared_bytes": 3600}, 8),
        ({"processors": 1, "largest_cluster": 1, "shared_bytes": 1600}, 1),
        ({"major": 8, "processors": 1, "shared_bytes": 3000}, 8),
        ({"major": 8, "processors": 1, "shared_bytes": 1600}, 1),
    ],
)
def test_rk4_mlp_several_tiles_of_rows(
    kernels: ModuleType, assert_accurate: Callable[..., None], device: dict[str, int], rows: int
) -> None:
    pretend(kernels, **device)
    problem = Problem(3 if rows == 1 else 19, 16, 1, torch.float32)
    plan = problem.plan(kernels)
    assert plan["weights"] == "shared"
    assert plan["exchange"] == ("workspace" if "major" in device else "cluster")
    assert (plan["groups"], plan["rows"]) == (1, rows)
    assert_rk4(kernels, assert_accurate, problem, [0.5, 1.0], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rk4_mlp_several_warps(kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype) -> None:
    for device in (CLUSTER_2, WORKSPACE_4):
        pretend(kernels, **device, threads=96)
        assert_rk4(kernels, assert_accurate, Problem(9, 48, 2, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rk4_mlp_unaligned(kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype) -> None:
    for device in (CLUSTER_2, WORKSPACE_4, {**CLUSTER_2, "shared_bytes": 3 << 10}):
        pretend(kernels, **device)
        problem = Problem(2, 32, 2, dtype)
        assert_rk4(kernels, assert_accurate, problem, shift=1)


def test_a_row_depends_on_nothing_but_itself(kernels: ModuleType) -> None:
    """Not on the batch, its neighbours (not even on NaN), nor on how the work is divided."""
    devices = [CLUSTER_1, CLUSTER_4, WORKSPACE_4, {**CLUSTER_2, "shared_bytes": 4 << 10}]
    problem = Problem(10, 32, 2, torch.float32)
    pretend(kernels, **CLUSTER_2)
    expected = problem.solve(kernels, [1.0], 1)
    assert expected.isfinite().all()
    problem.h0[3] = math.nan
    others = [row for row in range(10) if row != 3]
    for device in devices:
        pretend(kernels, **device)
        actual = problem.solve(kernels, [1.0], 1)
        assert actual[:, 3].isnan().all()
        assert actual[:, others].equal(expected[:, others])
    problem.h0 = problem.h0[7:8]
    assert problem.solve(kernels, [1.0], 1).equal(expected[:, 7:8])


def test_rk4_mlp_of_nothing(kernels: ModuleType) -> None:
    pretend(kernels)
    assert Problem(0, 16, 1, torch.float32).solve(kernels, [1.0], 1).shape == (1, 0, 16)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dim": 24}, "InvalidValue"),
        ({"dim": 1040}, "InvalidValue"),
        ({"layers": 9}, "InvalidValue"),
        ({"dtype": 3}, "InvalidValue"),
        ({"intervals": [(0.0, 0.01, 1)] * 65}, "InvalidValue"),
    ],
    ids=str,
)
def test_rk4_mlp_refuses(kernels: ModuleType, change: dict[str, Any], error: str) -> None:
    pretend(kernels)
    arguments = {"dtype": 0, "batch": 1, "dim": 16, "layers": 1, "intervals": [(0.0, 1.0, 1)], "every_step": False}
    addresses = dict.fromkeys(("out", "h0", "weight", "bias", "time_weight"), 0)
    with pytest.raises(RuntimeError, match=error):
        kernels.rk4_mlp(**{**addresses, **arguments, **change}, activation=0, stream=0)


def test_rk4_mlp_refuses_without_workspace(kernels: ModuleType) -> None:
    pretend(kernels, **WORKSPACE_4)
    with pytest.raises(RuntimeError, match="InvalidValue"):
        kernels.rk4_mlp(0, 0, 0, 0, 0, 0, 1, 16, 1, [(0.0, 1.0, 1)], False, 0, 0, 0)
    pretend(kernels, shared_bytes=512)
    with pytest.raises(RuntimeError, match="InvalidConfiguration"):
        kernels.rk4_mlp_plan(0, 1, 64, 1)


# What these report for themselves: multiprocessors, shared memory of a block.
H200 = {"processors": 132, "threads": 1024, "shared_bytes": 232448}
A100 = {"major": 8, "processors": 108, "threads": 1024, "shared_bytes": 166912}


def test_plans_of_real_devices(kernels: ModuleType) -> None:
    """D = 512, L = 3: weights stay on chip, in one pass for few rows."""
    pretend(kernels, **H200)
    plan = kernels.rk4_mlp_plan(0, 8, 512, 3)
    assert plan["exchange"] == "cluster" and plan["weights"] == "shared"
    assert (plan["members"], plan["groups"], plan["rows"], plan["threads"]) == (16, 8, 1, 256)
    plan = kernels.rk4_mlp_plan(0, 100, 512, 3)
    assert (plan["exchange"], plan["weights"], plan["members"], plan["rows"]) == ("cluster", "shared", 16, 8)
    assert kernels.rk4_mlp_plan(0, 100, 1024, 8)["weights"] == "global"  # 32 MiB
    pretend(kernels, **A100)
    plan = kernels.rk4_mlp_plan(0, 8, 512, 3)
    assert (plan["exchange"], plan["weights"]) == ("workspace", "shared")


@pytest.mark.parametrize("device", [H200, A100, {**A100, "processors": 46, "shared_bytes": 101376}])
def test_every_size_has_a_plan(kernels: ModuleType, device: dict[str, int]) -> None:
    pretend(kernels, **device)
    for dim, layers, batch, dtype in itertools.product(range(16, 1025, 16), (1, 3, 8), (1, 100, 4096), (0, 1)):
        plan = kernels.rk4_mlp_plan(dtype, batch, dim, layers)
        assert plan["shared_bytes"] <= device["shared_bytes"]
        assert plan["groups"] * plan["members"] <= device["processors"]
        assert dim % (4 * plan["members"]) == 0
