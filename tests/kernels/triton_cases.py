"""What the Triton kernels compute, in Triton's interpreter on the CPU.

Not collected on its own: `test_triton_interpreter.py` runs it in a process with TRITON_INTERPRET=1. The interpreter is
silently wrong for bfloat16, so there is none here; tests marked `gpu` have it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spigan.ops import BackendUnavailable, path_interpolate, philox_normal, rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    """Everything is written: memory holds NaN before."""


def assert_near(actual, expected, dtype, atol=1e-5):
    """`expected` is float32: its value to 1e-5, then one rounding to `dtype`."""
    assert actual.dtype == dtype and actual.shape == expected.shape
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(actual.float(), expected.float(), rtol=eps, atol=atol)


# ---- philox_normal ----


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (0,), (3, 0), (0, 3), (7, 13), (1025,), (2049,)])
@pytest.mark.parametrize("offset", [0, 3, 2**32 - 3, 2**40 + 2, 2**63 - 4000])
def test_normals(shape, offset):
    for dtype in DTYPES:
        actual = philox_normal(shape, seed=2**63 - 12, offset=offset, dtype=dtype, backend="triton")
        assert_near(actual, philox_normal(shape, seed=2**63 - 12, offset=offset, backend="reference"), dtype)


@settings(max_examples=20)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), max_size=4),
    row=st.integers(0, 40) | st.integers(1000, 1100),
    offset=st.integers(0, 100) | st.integers(0, 2**63 - 2000),
    split=st.floats(0, 1),
)
def test_normals_of_several_seeds(seeds, row, offset, split):
    seeds = torch.tensor(seeds, dtype=torch.int64)

    def draw(count, offset, backend="triton"):
        return philox_normal((len(seeds), count), seed=seeds, offset=offset, backend=backend)

    whole, part = draw(row, offset), round(split * row)
    assert_near(whole, draw(row, offset, "reference"), torch.float32)
    assert torch.equal(torch.cat((draw(part, offset), draw(row - part, offset + part)), 1), whole)


# ---- path_interpolate ----


def images(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (5, 3, 11, 13)])
@pytest.mark.parametrize("flipped", [False, True])
def test_path(shape, x0_dtype, dtype, flipped):
    x0, flips = images(*shape, dtype=x0_dtype), torch.arange(shape[0]) % 2 == 0 if flipped else None
    for times, options in (
        ([0.3], {"seed": 2**40 + 1, "offset": 0}),
        ([0.25, 0.5, 1.0], {"seed": 5, "offset": 2**32 + 3}),
        ([k / 8 for k in range(1, 9)], {"seed": 5, "offset": 2**62 + 2}),
        ([0.1, 1.0], {"noise": torch.randn(shape)}),
        ([0.1, 1.0], {"noise": torch.randn(shape).to(torch.float16)}),
    ):
        actual = path_interpolate(x0, times, **options, flips=flips, dtype=dtype, backend="triton")
        exact = path_interpolate(x0, times, **options, flips=flips, backend="reference")
        for a, e in zip(actual, exact, strict=True):
            assert_near(a, e, dtype, atol=1.2e-5)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)),
    times=st.sets(st.floats(1e-6, 1), min_size=1, max_size=8).map(sorted),
    offset=st.integers(0, 7) | st.integers(0, 2**62),
    flipped=st.booleans(),
)
def test_path_of_any_shape(shape, times, offset, flipped):
    x0, flips = images(*shape), torch.arange(shape[0]) % 2 == 0 if flipped else None
    options = {"seed": 3, "offset": offset, "flips": flips}
    actual = path_interpolate(x0, times, **options, backend="triton")
    for a, e in zip(actual, path_interpolate(x0, times, **options, backend="reference"), strict=True):
        assert_near(a, e, torch.float32, atol=1.2e-5)


def test_path_of_views():
    x0, noise = images(3, 4, 5, 6), torch.randn(6, 5, 4, 3).permute(3, 2, 1, 0)
    flips = torch.tensor([True, False, False, False, True])[::2]
    expected = path_interpolate(x0, [0.3, 1.0], noise=noise.contiguous(), flips=flips.clone(), backend="triton")
    views = (
        x0.contiguous(memory_format=torch.channels_last),
        torch.zeros(3, 4, 5, 12, dtype=torch.uint8)[..., 1::2].copy_(x0),
        x0.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for view in views:
        actual = path_interpolate(view, [0.3, 1.0], noise=noise, flips=flips, backend="triton")
        assert all(map(torch.equal, actual, expected))


def test_gradients_of_the_path():
    flips, found = torch.tensor([True, False, True]), []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        x0, noise = torch.rand(3, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 4, 5, requires_grad=True)
        x_T, i = path_interpolate(x0, [0.3, 1.0], noise=noise, flips=flips, backend=backend)
        found.append(torch.autograd.grad(x_T.square().sum() + i.pow(3).sum(), (x0, noise)))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


# ---- rk4_mlp ----


def problem(n, dim, layers, dtype):
    h0, weight = torch.randn(n, dim), torch.randn(layers, dim, dim) / dim**0.5
    return [x.to(dtype) for x in (h0, weight, torch.randn(layers, dim), torch.randn(layers, dim))]


@pytest.mark.parametrize("dtype", DTYPES)
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
def test_states(n, dim, layers, times, steps, activation, dtype, assert_accurate):
    inputs = problem(n, dim, layers, dtype)

    def solve(inputs, backend):
        return rk4_mlp(*inputs, times, steps=steps, activation=activation, backend=backend)

    exact = solve([x.double() for x in inputs], "reference")
    assert_accurate(solve(inputs, "triton"), solve(inputs, "reference"), exact)


@settings(max_examples=12)
@given(
    n=st.integers(0, 20) | st.integers(30, 70),
    dim=st.sampled_from([16, 32, 48, 96, 112]),
    layers=st.integers(1, 4),
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
    inputs, times = problem(2, 16, 2, torch.float32), [k / 64 for k in range(1, 65)]
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


# ---- What they do not take ----


def test_limits():
    zeros = torch.zeros
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it draws float32, bfloat16 or float16, not float64"):
        philox_normal((3,), seed=0, dtype=torch.float64, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it takes D a multiple of 16 up to 1024"):
        rk4_mlp(zeros(2, 24), zeros(1, 24, 24), zeros(1, 24), zeros(1, 24), [1.0], backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it takes at most 8 times, got 9"):
        path_interpolate(zeros(1, 1, 1, 1), [k / 9 for k in range(1, 10)], seed=0, backend="triton")
