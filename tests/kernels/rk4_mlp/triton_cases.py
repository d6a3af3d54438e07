"""The Triton kernel of rk4_mlp in Triton's interpreter, run by ../test_triton_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DTYPES

from spigan.ops import BackendUnavailable, rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element that a kernel does not write is NaN


def problem(n, dim, layers, dtype):
    h0, weight = torch.randn(n, dim), torch.randn(layers, dim, dim) / dim**0.5
    return [x.to(dtype) for x in (h0, weight, torch.randn(layers, dim), torch.randn(layers, dim))]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n", "dim", "layers", "times", "steps"),
    [
        (1, 16, 1, [1.0], 2),
        (3, 48, 2, [0.1, 0.6, 1.0], 2),
        (17, 64, 3, [0.5], 2),
        (5, 80, 2, [0.3, 1.0], 1),
    ],
)
def test_states(n, dim, layers, times, steps, activation, assert_accurate):
    # Every pair of a size and an activation; the dtypes take turns.
    dtype = DTYPES[(dim // 16 + list(ACTIVATIONS).index(activation)) % 2]
    inputs = problem(n, dim, layers, dtype)

    def solve(inputs, backend):
        return rk4_mlp(*inputs, times, steps=steps, activation=activation, backend=backend)

    exact = solve([x.double() for x in inputs], "reference")
    assert_accurate(solve(inputs, "triton"), solve(inputs, "reference"), exact)


@settings(max_examples=8)
@given(
    n=st.integers(0, 20) | st.integers(30, 70),
    dim=st.sampled_from([16, 32, 48, 96, 112]),
    layers=st.integers(1, 3),
    cents=st.sets(st.integers(1, 100), min_size=1, max_size=4).map(sorted),
    steps=st.integers(1, 2),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
)
def test_states_of_any_problem(assert_accurate, n, dim, layers, cents, steps, activation, dtype):
    torch.manual_seed(n)
    inputs, times = problem(n, dim, layers, dtype), [c / 100 for c in cents]

    def solve(inputs, backend):
        return rk4_mlp(*inputs, times, steps=steps, activation=activation, backend=backend)

    exact = solve([x.double() for x in inputs], "reference")
    assert_accurate(solve(inputs, "triton"), solve(inputs, "reference"), exact, 4.0)


def test_many_times():
    inputs, times = problem(2, 16, 1, torch.float32), [k / 64 for k in range(1, 65)]
    actual = rk4_mlp(*inputs, times, steps=1, backend="triton")
    torch.testing.assert_close(actual, rk4_mlp(*inputs, times, steps=1, backend="reference"), rtol=1e-4, atol=1e-5)


def test_states_of_views_and_of_extreme_values():
    h0, weight, bias, time_weight = problem(6, 48, 2, torch.float32)
    expected = rk4_mlp(h0, weight, bias, time_weight, [0.4, 1.0], steps=1, backend="triton")
    views = (
        torch.full((48, 12), torch.nan).t()[::2].copy_(h0),
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.full((2, 96), torch.nan)[:, 1::2].copy_(bias),
        time_weight.t().contiguous().t(),
    )
    assert torch.equal(rk4_mlp(*views, [0.4, 1.0], steps=1, backend="triton"), expected)
    for value in (torch.nan, torch.inf):
        beside = h0.clone()
        beside[1, 3] = value
        actual = rk4_mlp(beside, weight, bias, time_weight, [0.4, 1.0], steps=1, backend="triton")
        assert torch.equal(actual[:, [0, 2, 3, 4, 5]], expected[:, [0, 2, 3, 4, 5]])
        assert actual[:, 1].isnan().all()
    for activation in ACTIVATIONS:
        large = rk4_mlp(1e4 * h0, weight, bias, time_weight, [1.0], steps=1, activation=activation, backend="triton")
        plain = rk4_mlp(1e4 * h0, weight, bias, time_weight, [1.0], steps=1, activation=activation, backend="reference")
        torch.testing.assert_close(large, plain, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 5])
def test_gradients_of_the_states(n, dtype, assert_accurate):
    # The forward pass writes the state after every step, and the gradients are computed from those.
    inputs, found = problem(n, 48, 2, dtype), []
    for backend, cast in (("triton", dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in inputs]
        output = rk4_mlp(*leaves, [0.3, 1.0], steps=2, backend=backend)
        assert output.shape == (2, n, 48)
        found.append(torch.autograd.grad(output, leaves, torch.full_like(output, 0.125)))
    for gradients in zip(*found, strict=True):
        assert_accurate(*gradients)


def test_limits():
    zeros = torch.zeros
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it accepts D that is a multiple of 16 up to 1024"):
        rk4_mlp(zeros(2, 24), zeros(1, 24, 24), zeros(1, 24), zeros(1, 24), [1.0], backend="triton")
