"""The Triton kernels of fir_bias_act in Triton's interpreter, run by ../test_triton_interpreter.py."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from triton_cases import DTYPES
from triton_layer_ends import END_NAMES, PARTS, assert_ends, doubled, end_of_layer, end_problem, poisoned_results

from spigan.kernels import fir_bias_act as fir_kernels
from spigan.ops import fir_bias_act
from spigan.ops.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element that a kernel does not write is NaN


# taps, up, down, zeros before and after, flip
FIRS = {
    "none": None,
    "one tap": (1, 2, 1, (0, 0), True),
    "three taps, cropped": (3, 1, 1, (-1, 1), False),
    "blur": (4, 1, 1, (2, 1), False),
    "up": (4, 2, 1, (2, 1), True),
    "down": (4, 1, 2, (1, 1), True),
    "eight taps": (8, 2, 2, (5, 3), True),
    "up, cropped": (4, 2, 1, (-3, 1), False),
}


def fir_problem(n, height, width, channels, fir, parts, dtype, add):
    """Arguments of the kernel, and how plain PyTorch computes the same."""
    x = torch.randn(n, height, width, channels).to(dtype)
    if fir is None:
        options, (taps, up, down, padding, flip) = {"filter": None}, (1, 1, 1, (0, 0), True)
    else:
        taps, up, down, padding, flip = fir
        options = {"filter": torch.randn(taps, taps)}
    height, width = ((s * up + sum(padding) - taps) // down + 1 for s in (height, width))
    arguments = {"x": x, **options, **end_problem(n, height, width, channels, parts)}
    arguments["add"] = torch.randn(n, height, width, channels).to(dtype) if add else None
    resampling = {"up": up, "down": down, "pad": padding[0], "flip": flip, "fir_gain": 1.5}

    def by_pytorch(a, end):
        v = a["x"]
        if fir is not None:
            filter = a["filter"] if flip else a["filter"].flip((0, 1))
            v = v.permute(0, 3, 1, 2)
            v = upfirdn2d(v, filter, up=up, down=down, padding=padding, gain=1.5).permute(0, 2, 3, 1)
        return end_of_layer(v, {name: a[name] for name in END_NAMES}, *end, add=a["add"])

    return arguments, resampling, by_pytorch, (n, height, width, channels)


def run_fir(size, parts, end, arguments, resampling):
    out, rgb = poisoned_results(*size, parts, arguments["x"].dtype)
    slope, gain, clamp = end
    fir_kernels.fir_bias_act(out, rgb, **arguments, **resampling, slope=slope, gain=gain, clamp=clamp)
    return out, rgb


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("fir", FIRS)
def test_fir_bias_act(fir, parts, assert_accurate):
    # Every pair of a filter and an end; channels and dtypes take turns.
    turn = list(FIRS).index(fir) + list(PARTS).index(parts)
    channels, dtype, add = (1, 37, 64)[turn % 3], DTYPES[turn % 2], turn % 4 < 2
    parts, end = PARTS[parts]
    problem = fir_problem(2, 5, 7, channels, FIRS[fir], parts, dtype, add and "no out" not in parts)
    arguments, resampling, by_pytorch, size = problem
    actual = run_fir(size, parts, end, arguments, resampling)
    assert_ends(assert_accurate, actual, by_pytorch(arguments, end), by_pytorch(doubled(arguments), end))


@settings(max_examples=12)
@given(data=st.data())
def test_fir_bias_act_of_any_problem(assert_accurate, data):
    n, height, width = data.draw(st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 12)))
    channels = data.draw(st.integers(1, 70))
    taps, up, down = data.draw(st.tuples(st.integers(1, 8), st.integers(1, 2), st.integers(1, 2)))
    fir = (taps, up, down, data.draw(st.tuples(st.integers(-3, 7), st.integers(-3, 7))), data.draw(st.booleans()))
    if data.draw(st.booleans()):
        fir = None
    elif min(height, width) * up + sum(fir[3]) < taps:
        return
    parts, end = PARTS[data.draw(st.sampled_from(sorted(PARTS)))]
    problem = fir_problem(n, height, width, channels, fir, parts, data.draw(st.sampled_from(DTYPES)), False)
    arguments, resampling, by_pytorch, size = problem
    actual = run_fir(size, parts, end, arguments, resampling)
    assert_ends(assert_accurate, actual, by_pytorch(arguments, end), by_pytorch(doubled(arguments), end))


def test_sums_over_many_channels(assert_accurate):
    # More than one program has: their sums come together in another step.
    parts, end = PARTS["one noise"]
    arguments, resampling, by_pytorch, size = fir_problem(2, 1, 3, 2500, None, parts, torch.float32, False)
    actual = run_fir(size, parts, end, arguments, resampling)
    assert_ends(assert_accurate, actual, by_pytorch(arguments, end), by_pytorch(doubled(arguments), end))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fir_bias_act_in_place(dtype):
    parts, end = PARTS["generator"]
    arguments, resampling, _, size = fir_problem(3, 7, 11, 20, None, parts, dtype, False)
    expected, _ = run_fir(size, parts, end, arguments, resampling)
    x = arguments["x"]
    fir_kernels.fir_bias_act(x, None, **arguments, **resampling, slope=end[0], gain=end[1], clamp=end[2])
    assert torch.equal(x, expected)


def test_nan_and_infinity_of_the_end_of_a_layer():
    x = torch.tensor([1.0, -1.0, torch.nan, torch.inf, -torch.inf]).view(1, 1, 5, 1)
    for clamp, expected in (
        (math.inf, [2, -1, torch.nan, torch.inf, -torch.inf]),
        (1.5, [1.5, -1, torch.nan, 1.5, -1.5]),
    ):
        out = torch.empty_like(x)
        nothing = (None,) * 9
        options = {"up": 1, "down": 1, "pad": 0, "flip": True, "fir_gain": 1}
        fir_kernels.fir_bias_act(out, None, x, *nothing, **options, slope=0.5, gain=2, clamp=clamp)
        torch.testing.assert_close(out.flatten(), torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "pixels", "channels", "parts"), [(2, 53, 37, 3), (1, 600, 8, 2), (2, 3, 1500, 2), (0, 3, 4, 1)]
)
def test_bias_act_backward(n, pixels, channels, parts, dtype, assert_accurate):
    slope, gain, clamp = 0.2, 1.5, 0.75
    grad, x = torch.randn(2, n, pixels, channels).to(dtype)
    out = (2 * torch.randn(n, pixels, channels)).clamp(-clamp, clamp).to(dtype)
    factor = torch.randn(n, channels)
    length = -(-pixels // parts)

    def by_pytorch(cast, out, factor):
        derivative = gain
        if out is not None:
            derivative = gain * torch.where(out > 0, 1.0, slope) * (out.abs() < clamp)
        u = grad.to(cast) * derivative
        ux = u * x.to(cast)
        padded = [F.pad(t, (0, 0, 0, parts * length - pixels)).view(n, parts, length, channels) for t in (u, ux)]
        grad_x = u if factor is None else u * factor.to(cast)[:, None]
        return grad_x, *(t.sum(2) for t in padded), u.sum(2)

    shapes = ((n, pixels, channels), (n, parts, channels), (n, parts, channels), (n, pixels))
    for wanted in ((True,) * 4, (True, False, False, False), (False, True, False, False), (False, False, True, True)):
        for given_out, given_factor in ((out, factor), (None, None)):
            dtypes = (dtype, *(torch.float32,) * 3)
            results = [
                torch.full(s, torch.nan, dtype=d) if w else None for s, d, w in zip(shapes, dtypes, wanted, strict=True)
            ]
            fir_kernels.bias_act_backward(
                *results, grad, given_out, x if wanted[2] else None, given_factor, slope=slope, gain=gain, clamp=clamp
            )
            plain = by_pytorch(torch.float32, given_out, given_factor)
            for a, p, e in zip(results, plain, by_pytorch(torch.float64, given_out, given_factor), strict=True):
                if a is not None:
                    assert_accurate(a, p.to(a.dtype), e, slack=16.0 if a.dtype == torch.float32 else 2.0)
    expected = torch.empty_like(grad)
    options = {"slope": slope, "gain": gain, "clamp": clamp}
    fir_kernels.bias_act_backward(expected, None, None, None, grad, out, None, factor, **options)
    fir_kernels.bias_act_backward(grad, None, None, None, grad, out, None, factor, **options)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_clamped_values_have_no_gradient(dtype):
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0]).view(1, 1, 2, 2).to(dtype).requires_grad_()
    y = fir_bias_act(x, clamp=0.9, backend="triton")  # which float16 rounds down: a clamped result is below the bound
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
