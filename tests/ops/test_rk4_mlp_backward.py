"""The gradients of rk4_mlp in few calls, as on a GPU, computed on the CPU."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spigan.ops import rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS, step_grid
from spigan.ops.rk4_mlp_backward import Gradients, Solve, batched_gradients, stepwise_gradients

operation = importlib.import_module("spigan.ops.rk4_mlp")
batches = importlib.import_module("spigan.ops.rk4_mlp_backward")
NAMES = ("h0", "weight", "bias", "time_weight")


def problem(n: int, dim: int, layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h0, weight, bias, time_weight."""
    shapes = (n, dim), (layers, dim, dim), (layers, dim), (layers, dim)
    return [(0.7 * torch.randn(shape) / dim**0.5).to(dtype) for shape in shapes]


def gradients(inputs: Sequence[Tensor], times: list[float], steps: int, activation: str, backend: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = rk4_mlp(*leaves, times, steps=steps, activation=activation, backend=backend)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return list(torch.autograd.grad(output, leaves, (upstream / max(1, len(inputs[0]))).to(output.dtype)))


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.name().removeprefix("aten::").partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def counted(
    function: Callable[[Tensor, Solve], Gradients], times: list[float], steps: int = 4, layers: int = 3
) -> Counter[str]:
    """Count the calls of one backward pass."""
    h0, *parameters = problem(4, 8, layers)
    grid = [(t, dt) for t, dt, _ in step_grid(times, steps)]
    states = torch.randn(len(grid), *h0.shape)
    silu_backward = torch.ops.aten.silu_backward.default
    solve = Solve(states, h0, *parameters, grid, ACTIVATIONS["silu"], silu_backward)
    with Calls() as calls:
        function(torch.randn_like(states), solve)
    return calls.count


@pytest.mark.parametrize("at_a_time", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
@pytest.mark.parametrize(
    ("n", "dim", "layers", "times", "steps"),
    [(3, 5, 3, [0.3, 1.0], 4), (1, 16, 1, [1.0], 2), (20, 33, 2, [0.1, 0.2, 0.9], 3)],
)
def test_batches_are_accurate(
    n, dim, layers, times, steps, activation, dtype, at_a_time, monkeypatch, assert_accurate, poisoned_memory
) -> None:
    monkeypatch.setattr(operation, "stepwise_gradients", batched_gradients)
    monkeypatch.setattr(batches, "STEPS_AT_A_TIME", at_a_time)
    inputs = problem(n, dim, layers, dtype)
    actual = gradients(inputs, times, steps, activation, "cpp")
    plain = gradients(inputs, times, steps, activation, "reference")
    exact = gradients([x.double() for x in inputs], times, steps, activation, "reference")
    for name, *gradient in zip(NAMES, actual, plain, exact, strict=True):
        assert gradient[2].abs().max() > 1e-3 or layers == 1, name
        assert_accurate(*gradient)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batches_pass_gradcheck(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "stepwise_gradients", batched_gradients)
    inputs = [x.requires_grad_() for x in problem(2, 3, 2, torch.float64)]
    torch.autograd.gradcheck(
        lambda *x: rk4_mlp(*x, [0.4, 1.0], steps=2, activation=activation, backend="cpp"), inputs, fast_mode=True
    )


def test_batches_of_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "stepwise_gradients", batched_gradients)
    inputs = problem(0, 4, 2)
    for gradient, x in zip(gradients(inputs, [0.4, 1.0], 2, "silu", "cpp"), inputs, strict=True):
        assert gradient.shape == x.shape and not gradient.any()


@pytest.mark.parametrize("times", [[1.0], [0.4, 1.0]])
def test_batches_take_few_calls(times: list[float]) -> None:
    """One product for all weights, one for each layer of a stage, and one for each layer of a stage of a step."""
    steps, layers = len([*step_grid(times, 4)]), 3
    batched, stepwise = counted(batched_gradients, times), counted(stepwise_gradients, times)
    assert batched["bmm"] == 1 and batched["mm"] == 4 * layers + 4 * layers * steps
    assert batched.total() < 0.3 * stepwise.total(), (batched.total(), stepwise.total())


def test_batches_do_not_wait() -> None:
    """No value is copied from or to the host, so that a CUDA graph can hold the calls."""
    assert (
        not {"_local_scalar_dense", "_to_copy", "lift_fresh", "nonzero"} & counted(batched_gradients, [0.4, 1.0]).keys()
    )


def test_a_cpu_goes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its results are those of earlier versions, bit for bit; a run that was begun with them resumes exactly."""

    def unexpected(*arguments: Any) -> Any:
        raise AssertionError("batched")

    monkeypatch.setattr(operation, "batched_gradients", unexpected)
    gradients(problem(3, 5, 2), [0.4, 1.0], 2, "silu", "cpp")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_goes_in_batches(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, assert_accurate: Any) -> None:
    monkeypatch.delattr(operation, "stepwise_gradients")
    inputs = [x.cuda() for x in problem(64, 128, 3, dtype)]
    actual = gradients(inputs, [0.3, 1.0], 4, "silu", "triton")
    plain = gradients(inputs, [0.3, 1.0], 4, "silu", "reference")
    exact = gradients([x.double() for x in inputs], [0.3, 1.0], 4, "silu", "reference")
    for gradient in zip(actual, plain, exact, strict=True):
        assert_accurate(*gradient)
