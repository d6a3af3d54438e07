"""rk4_mlp on every backend of a CUDA device: values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu import CUDA, DTYPES, over_backends, problem
from torch import Tensor

from spigan.ops import rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def check_states(
    assert_accurate: Callable[..., None], backend: str, inputs: list[Tensor], times: list[float], **options: object
) -> None:
    on_gpu = [x.to(CUDA) for x in inputs]
    actual = rk4_mlp(*on_gpu, times, **options, backend=backend)  # type: ignore[arg-type]
    plain = rk4_mlp(*on_gpu, times, **options, backend="reference")  # type: ignore[arg-type]
    # In float64 on the CPU; where that would take minutes, in float64 on the GPU.
    exact_on = CUDA if inputs[0].numel() * inputs[1].numel() > 1e9 else torch.device("cpu")
    exact_inputs = [x.to(exact_on).double() for x in inputs]
    exact = rk4_mlp(*exact_inputs, times, **options, backend="reference")  # type: ignore[arg-type]
    assert actual.is_cuda
    assert_accurate(actual.cpu(), plain.cpu(), exact.cpu())


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n", "dim", "layers", "times", "steps"),
    [
        (1, 16, 1, [1.0], 3),
        (3, 48, 2, [0.1, 0.6, 1.0], 4),
        (17, 64, 3, [0.5], 2),
        (65, 80, 2, [0.3, 1.0], 4),
        (130, 256, 5, [0.9], 1),
        (7, 1008, 2, [0.2, 1.0], 2),
    ],
)
def test_states(backend, n, dim, layers, times, steps, activation, dtype, assert_accurate, poisoned_memory):
    check_states(assert_accurate, backend, problem(n, dim, layers, dtype), times, steps=steps, activation=activation)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 100, 4096])
@pytest.mark.parametrize(("dim", "layers", "steps"), [(512, 3, 4), (1024, 8, 1)])
def test_states_of_wide_layers(backend, n, dim, layers, steps, dtype, assert_accurate, poisoned_memory):
    check_states(assert_accurate, backend, problem(n, dim, layers, dtype), [0.4, 1.0], steps=steps)


@over_backends("rk4_mlp")
def test_many_times(backend, assert_accurate):
    check_states(assert_accurate, backend, problem(5, 64, 2, torch.float32), [k / 64 for k in range(1, 65)], steps=1)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_and_views_allowed(backend, dtype):
    h0, weight, bias, time_weight = (x.to(CUDA) for x in problem(70, 64, 2, dtype))
    expected = rk4_mlp(h0, weight, bias, time_weight, [0.4, 1.0], backend=backend)
    assert expected.isfinite().all()
    beside = h0.clone()
    beside[::3] = torch.nan
    kept = [row for row in range(70) if row % 3]
    actual = rk4_mlp(beside, weight, bias, time_weight, [0.4, 1.0], backend=backend)
    assert torch.equal(actual[:, kept], expected[:, kept]) and actual[:, ::3].isnan().all()
    views = (
        torch.full((64, 140), torch.nan, dtype=dtype, device=CUDA).t()[::2].copy_(h0),
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.full((2, 128), torch.nan, dtype=dtype, device=CUDA)[:, 1::2].copy_(bias),
        time_weight.t().contiguous().t(),
    )
    strided = rk4_mlp(*views, [0.4, 1.0], backend=backend)
    if backend == "reference":  # cuBLAS may choose another order of sums
        torch.testing.assert_close(strided, expected, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(strided, expected)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "layers"), [(0, 32, 2), (3, 48, 2), (40, 64, 3), (5, 512, 3)])
def test_gradients_of_the_states(backend, n, dim, layers, dtype, assert_accurate, poisoned_memory):
    inputs, found = problem(n, dim, layers, dtype, scale=0.7), []
    for device, name, cast in (
        (CUDA, backend, dtype),
        (CUDA, "reference", dtype),
        (torch.device("cpu"), "reference", torch.float64),
    ):
        leaves = [x.to(device, cast).requires_grad_() for x in inputs]
        output = rk4_mlp(*leaves, [0.3, 1.0], steps=2, backend=name)
        gradients = torch.autograd.grad(output, leaves, torch.full_like(output, 0.125))
        found.append([g.cpu() for g in gradients])
    for gradient in zip(*found, strict=True):
        assert_accurate(*gradient, 4.0)


@over_backends("rk4_mlp")
def test_second_derivatives_of_the_states(backend):
    inputs, found = problem(2, 16, 2, torch.float32, scale=0.7), []
    for device, name in ((CUDA, backend), ("cpu", "reference")):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        output = rk4_mlp(*leaves, [0.3, 1.0], steps=2, backend=name)
        first = torch.autograd.grad(output.square().sum(), leaves[:2], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([g.cpu() for g in second])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-3 * e.abs().max().item())
