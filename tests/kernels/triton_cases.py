"""What the Triton kernels compute, in Triton's interpreter on the CPU.

Not collected on its own: `test_triton_interpreter.py` runs it in a process with TRITON_INTERPRET=1. The interpreter is
silently wrong for bfloat16, so there is none here; tests marked `gpu` have it.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from spigan.kernels import fir_bias_act as fir_kernels
from spigan.kernels import modulated_conv2d as conv_kernels
from spigan.ops import BackendUnavailable, fir_bias_act, modulated_conv2d, path_interpolate, philox_normal, rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

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


# ---- The end of a layer, which fir_bias_act and conv2d share ----

PARTS = {
    "nothing": (set(), (1.0, 1.0, math.inf)),
    "generator": ({"factor", "drawn", "strength", "bias", "next_factor"}, (0.2, 2**0.5, 256.0)),
    "noise": ({"noise", "bias of images"}, (0.2, 1.5, 0.8)),
    "one noise": ({"factor", "noise of one", "strength", "rgb", "next_factor"}, (0.2, 1.5, 0.8)),
    "rgb alone": ({"drawn", "bias", "rgb", "no out"}, (1.0, 0.5, 0.7)),
}
SEED = 2**40 + 7


def end_problem(n, height, width, channels, parts):
    """Arguments of the kernels' host functions for an end with these parts."""

    def given_if(name, *shape):
        return torch.randn(shape) if name in parts else None

    noise = given_if("noise", n, height, width)
    bias = given_if("bias", channels)
    return {
        "factor": given_if("factor", n, channels),
        "noise": given_if("noise of one", 1, height, width) if noise is None else noise,
        "seed": torch.tensor([SEED]) if "drawn" in parts else None,
        "strength": given_if("strength", 1),
        "bias": given_if("bias of images", n, channels) if bias is None else bias,
        "next_factor": given_if("next_factor", n, channels),
        "rgb_weight": given_if("rgb", n, 3, channels),
    }


def end_of_layer(v, a, slope, gain, clamp, add=None):
    """(out, rgb) of v [N, H, W, C], computed in its dtype by plain PyTorch."""
    a = {name: None if t is None or name == "seed" else t.to(v.dtype) for name, t in a.items()} | {"seed": a["seed"]}
    n, height, width, _ = v.shape
    if a["factor"] is not None:
        v = v * a["factor"][:, None, None]
    noise = a["noise"]
    if a["seed"] is not None:
        noise = philox_normal((n, height, width), seed=SEED, backend="reference").to(v.dtype)
    if noise is not None:
        v = v + (noise if a["strength"] is None else noise * a["strength"])[..., None]
    if a["bias"] is not None:
        v = v + (a["bias"] if a["bias"].ndim == 1 else a["bias"][:, None, None])
    v = (F.leaky_relu(v, slope) * gain).clamp(-clamp, clamp)
    rgb = None if a["rgb_weight"] is None else torch.einsum("nhwc,nrc->nhwr", v, a["rgb_weight"])
    v = v if a["next_factor"] is None else v * a["next_factor"][:, None, None]
    return v if add is None else v + add.to(v.dtype), rgb


def doubled(arguments):
    return {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in arguments.items()}


def poisoned_results(n, height, width, channels, parts, dtype):
    out = None if "no out" in parts else torch.full((n, height, width, channels), torch.nan, dtype=dtype)
    return out, torch.full((n, height, width, 3), torch.nan) if "rgb" in parts else None


def assert_ends(assert_accurate, actual, plain, exact):
    """(out, rgb) each; sums over channels are float32, where the noise drawn here differs by 1e-5 from PyTorch's."""
    for a, p, e in zip(actual, plain, exact, strict=True):
        if a is not None:
            assert_accurate(a.to(p.dtype), p, e, slack=2.0 if p.dtype == torch.float16 else 64.0)


# ---- fir_bias_act ----

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


END_NAMES = ("factor", "noise", "seed", "strength", "bias", "next_factor", "rgb_weight")


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


# ---- modulated_conv2d ----


def conv_problem(n, height, width, channels_in, channels_out, kernel, padding, parts, dtype):
    x = torch.randn(n, height, width, channels_in).to(dtype)
    weight = (torch.randn(kernel, kernel, channels_out, channels_in) / (kernel * channels_in**0.5)).to(dtype)
    height, width = height + 2 * padding - kernel + 1, width + 2 * padding - kernel + 1
    arguments = {"x": x, "weight": weight, **end_problem(n, height, width, channels_out, parts)}

    def by_pytorch(a, end):
        v = F.conv2d(a["x"].permute(0, 3, 1, 2), a["weight"].permute(2, 3, 0, 1), padding=padding)
        return end_of_layer(v.permute(0, 2, 3, 1), {name: a[name] for name in END_NAMES}, *end)

    return arguments, by_pytorch, (n, height, width, channels_out)


def check_conv(assert_accurate, sizes, kernel, padding, parts, end, dtype):
    arguments, by_pytorch, size = conv_problem(*sizes, kernel, padding, parts, dtype)
    out, rgb = poisoned_results(*size, parts, dtype)
    slope, gain, clamp = end
    conv_kernels.conv2d(out, rgb, **arguments, padding=padding, slope=slope, gain=gain, clamp=clamp)
    assert_ends(assert_accurate, (out, rgb), by_pytorch(arguments, end), by_pytorch(doubled(arguments), end))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(
    ("sizes", "kernel", "padding"),
    [
        ((7, 4, 4, 64, 48, ), 3, 1),  # several images in a tile
        ((5, 3, 5, 37, 17), 3, 1),
        ((2, 9, 17, 16, 70), 3, 1),  # several tiles in an image
        ((1, 16, 16, 80, 33), 1, 0),
        ((3, 7, 6, 3, 5), 5, 1),  # the result is smaller
        ((1, 3, 2, 1, 1), 1, 2),  # and larger
        ((0, 4, 4, 16, 16), 3, 1),
    ],
)  # fmt: skip
def test_conv2d(sizes, kernel, padding, parts, dtype, assert_accurate):
    check_conv(assert_accurate, sizes, kernel, padding, *PARTS[parts], dtype)


@settings(max_examples=15)
@given(
    sizes=st.tuples(*(st.integers(1, most) for most in (4, 12, 12, 40, 40))),
    kernel=st.sampled_from([1, 3, 5]),
    padding=st.integers(0, 3),
    parts=st.sampled_from(sorted(PARTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_conv2d_of_any_problem(assert_accurate, sizes, kernel, padding, parts, dtype):
    if min(sizes[1:3]) + 2 * padding >= kernel:
        check_conv(assert_accurate, sizes, kernel, padding, *PARTS[parts], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile_of_the_product_computes_the_same(dtype, monkeypatch):
    parts, end = PARTS["one noise"]
    arguments, _, size = conv_problem(2, 9, 8, 16, 40, 3, 1, parts, dtype)
    options = dict(zip(("slope", "gain", "clamp"), end, strict=True))
    tiles = conv_kernels.EXACT if dtype == torch.float32 else conv_kernels.MATRIX_UNIT
    found = []
    for pixels, channels, warps in tiles:
        for one_image in (True, False):
            blocks = conv_kernels.Blocks(pixels, channels, 16, warps, 2, one_image)
            monkeypatch.setattr(conv_kernels, "choose_blocks", lambda *_, blocks=blocks: blocks)
            found.append(poisoned_results(*size, parts, dtype))
            conv_kernels.conv2d(*found[-1], **arguments, padding=1, **options)
    for out, rgb in found:
        torch.testing.assert_close(out, found[0][0], rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-4)
        torch.testing.assert_close(rgb, found[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 4, 4, 32, 64, 3),
        (3, 5, 3, 37, 17, 3),
        (1, 7, 9, 3, 70, 5),
        (2, 1, 1, 5, 3, 1),
        (2, 3, 4, 8, 9, 1),
        (0, 4, 4, 8, 8, 3),
    ],
)
def test_transposed_conv2d(sizes, dtype, assert_accurate):
    n, height, width, _, channels_out, kernel = sizes
    arguments, _, _ = conv_problem(*sizes, kernel // 2, set(), dtype)
    x, weight = arguments["x"], arguments["weight"]
    y = torch.full((n, 2 * height + kernel - 2, 2 * width + kernel - 2, channels_out), torch.nan, dtype=dtype)
    conv_kernels.transposed_conv2d(y, x, weight)

    def by_pytorch(x, weight):
        x, weight = x.permute(0, 3, 1, 2), weight.permute(3, 2, 0, 1)
        return F.conv_transpose2d(x, weight, stride=2).permute(0, 2, 3, 1)

    assert_accurate(y, by_pytorch(x, weight), by_pytorch(x.double(), weight.double()))


def test_tiles_of_the_product():
    def blocks(images, side, channels_in=512, channels_out=512, bits=16, exact=False, widest=256):
        pixels = side * side
        return conv_kernels.choose_blocks(images, pixels, channels_out, channels_in, bits, exact, widest, 132)

    assert blocks(100, 32)[:2] == (128, 256)
    assert blocks(100, 4)[0] * blocks(100, 4)[1] <= conv_kernels.SEVERAL_IMAGES and not blocks(100, 4).one_image
    assert blocks(1, 4)[:2] == (64, 32)  # the most programs, which read the weights together
    assert blocks(100, 32, channels_in=37)[:3] == (64, 32, 16)
    for images, side, bits in ((1, 4, 32), (16, 8, 16), (100, 16, 32), (3, 256, 16)):
        for exact in (False, True):
            found = blocks(images, side, bits=bits, exact=exact, widest=128)
            numbers = found.stages * (found.pixels + found.channels) * found.depth
            assert found.stages >= 2 and numbers * bits // 8 <= conv_kernels.STAGES_BYTES
            assert found.channels <= 128


# ---- The operations on these kernels ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up", [1, 2])
def test_operations(up, dtype, assert_accurate):
    x, factor, bias = torch.randn(3, 20, 5, 7).to(dtype), torch.randn(3, 20), torch.randn(20)
    weight, style = torch.randn(24, 20, 3, 3) / 180**0.5, torch.randn(3, 20)
    resampling = {"filter": fir_filter(), "up": 2, "padding": (2, 1), "fir_gain": 4.0} if up == 2 else {}
    end = {"activation": "lrelu", "gain": 2**0.5, "clamp": 256.0}

    def resample(backend, cast):
        noise = philox_normal((1, 3 * up * 5 * up * 7), seed=5, backend="reference").view(3, 1, up * 5, up * 7).to(cast)
        noise = {"noise_seed": 5} if backend == "triton" else {"noise": noise}
        wide = torch.promote_types(cast, torch.float32)
        leaves = [t.to(wide if t.dim() < 4 else cast).requires_grad_() for t in (x, factor, bias)]
        y = fir_bias_act(leaves[0], factor=leaves[1], bias=leaves[2], **noise, **resampling, **end, backend=backend)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    def convolve(backend, cast):
        arguments = (x.to(cast), weight.to(cast), style.to(cast))
        return (modulated_conv2d(*arguments, up=up, bias=bias[:1].expand(24).to(cast), **end, backend=backend),)

    for run in (resample, convolve):
        exact = run("reference", torch.float64)
        for a, p, e in zip(run("triton", dtype), run("reference", dtype), exact, strict=True):
            assert_accurate(a, p, e, slack=64.0 if dtype == torch.float32 else 4.0)


# ---- What they do not take ----


def test_limits():
    zeros = torch.zeros
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it draws float32, bfloat16 or float16, not float64"):
        philox_normal((3,), seed=0, dtype=torch.float64, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it accepts D that is a multiple of 16 up to 1024"):
        rk4_mlp(zeros(2, 24), zeros(1, 24, 24), zeros(1, 24), zeros(1, 24), [1.0], backend="triton")
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it accepts at most 8 times, got 9"):
        path_interpolate(zeros(1, 1, 1, 1), [k / 9 for k in range(1, 10)], seed=0, backend="triton")
