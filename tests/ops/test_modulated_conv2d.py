"""modulated_conv2d against a grouped convolution with a weight for each sample, and its parts against scipy.signal."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve2d
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from spigan.ops import BACKENDS, modulated_conv2d
from spigan.ops.backends import why_unavailable

KERNELS = [b for b in BACKENDS[1:] if why_unavailable("modulated_conv2d", b, torch.device("cpu")) is None]
RUNNING = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Sums are powers of two, so that normalising in float32 does not round.
FILTERS = {
    "default": None,
    "1d": [1.0, 3.0, 3.0, 1.0],
    "1d asymmetric": [1.0, 4.0, 2.0, 1.0],
    "2d asymmetric": [[1.0, 5.0, 2.0], [4.0, 0.0, 1.0], [-3.0, 6.0, 0.0]],
    "long": [1.0, 0.0, 5.0, 2.0, 7.0, 1.0],
    "one": [1.0],
}


def grouped(
    x,
    weight,
    style,
    *,
    demodulate=True,
    up=1,
    padding=None,
    resample_filter=None,
    noise=None,
    bias=None,
    activation="linear",
    gain=1.0,
    clamp=None,
):
    """The layer as the StyleGAN2 paper writes it, in the dtype of x: one weight for each sample, groups = N.

    Upsampling: insert zeros, FIR filter tap by tap, then the true convolution (PyTorch's with a flipped kernel).
    """
    n, channels_in, h, w = x.shape
    channels_out, _, k, _ = weight.shape
    dtype = x.dtype
    padding = k // 2 if padding is None else padding
    weights = weight.to(dtype)[None] * style.to(dtype)[:, None, :, None, None]  # [N, O, I, k, k]
    if demodulate:
        weights = weights / (weights.double().square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt().to(dtype)
    if up == 2:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) if resample_filter is None else resample_filter
        taps = taps.double()
        taps = taps[:, None] * taps[None, :] if taps.ndim == 1 else taps
        taps = 4 * taps / taps.sum()
        m = len(taps)
        before, after = padding + (m + 1) // 2, padding + (m - 2) // 2
        grid = x.new_zeros(n, channels_in, 2 * h + before + after, 2 * w + before + after)
        grid[:, :, before : before + 2 * h : 2, before : before + 2 * w : 2] = x
        x = sum(
            taps[m - 1 - a, m - 1 - b].to(dtype)
            * grid[:, :, a : grid.shape[2] - m + 1 + a, b : grid.shape[3] - m + 1 + b]
            for a, b in itertools.product(range(m), repeat=2)
        )
        weights, padding = weights.flip(3, 4), 0
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weights.flatten(0, 1), padding=padding, groups=n)
    y = y.reshape(n, channels_out, *y.shape[2:])
    if noise is not None:
        y = y + noise.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype).reshape(1, -1, 1, 1)
    if activation == "lrelu":
        y = torch.where(y > 0, y, 0.2 * y)
    y = y * gain
    return y if clamp is None else torch.minimum(torch.maximum(y, y.new_tensor(-clamp)), y.new_tensor(clamp))


def layer(n=3, channels_in=5, channels_out=4, h=6, w=7, k=3, dtype=torch.float64, seed=0):
    """x, weight, style."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = draw(n, channels_in, h, w), draw(channels_out, channels_in, k, k), 1 + 0.5 * draw(n, channels_in)
    return tuple(tensor.to(dtype) for tensor in tensors)


def doubled(arguments):
    return {name: v.double() if torch.is_tensor(v) else v for name, v in arguments.items()}


def taps_of(name):
    return None if FILTERS[name] is None else torch.tensor(FILTERS[name])


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding", [None, 0, 1, 3])
@pytest.mark.parametrize("backend", RUNNING)
def test_equals_a_grouped_convolution(demodulate, up, kernel, padding, backend, poisoned_memory):
    inputs, options = layer(k=kernel), {"demodulate": demodulate, "up": up, "padding": padding}
    actual = modulated_conv2d(*inputs, **options, backend=backend)
    p = kernel // 2 if padding is None else padding
    assert actual.shape == (3, 4, up * 6 + 2 * p - kernel + 1, up * 7 + 2 * p - kernel + 1)
    torch.testing.assert_close(actual, grouped(*inputs, **options), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding", [None, 0, 2])
@pytest.mark.parametrize("backend", RUNNING)
def test_resample_filters(name, kernel, padding, backend):
    inputs, options = layer(k=kernel, seed=1), {"up": 2, "padding": padding, "resample_filter": taps_of(name)}
    actual = modulated_conv2d(*inputs, **options, backend=backend)
    torch.testing.assert_close(actual, grouped(*inputs, **options), rtol=0, atol=1e-12)
    if name != "default":  # normalised: its scale does not matter
        options["resample_filter"] = 8 * options["resample_filter"]
        torch.testing.assert_close(modulated_conv2d(*inputs, **options, backend=backend), actual, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("noise_rows", [None, 1, 3])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", ["linear", "lrelu"])
@pytest.mark.parametrize(("gain", "clamp"), [(1.0, None), (2**0.5, None), (1.0, 0.7), (3.0, 1.5)])
def test_what_follows_the_convolution(up, noise_rows, biased, activation, gain, clamp, backend):
    inputs, options = layer(seed=2), {"up": up, "activation": activation, "gain": gain, "clamp": clamp}
    if noise_rows:
        options["noise"] = torch.randn(noise_rows, 1, up * 6, up * 7, dtype=torch.float64)
    if biased:
        options["bias"] = torch.randn(4, dtype=torch.float64)
    actual = modulated_conv2d(*inputs, **options, backend=backend)
    torch.testing.assert_close(actual, grouped(*inputs, **options), rtol=0, atol=1e-12)
    if clamp is not None:
        assert actual.abs().max() == clamp, "the clamp was not reached"


@pytest.mark.parametrize("backend", RUNNING)
@settings(max_examples=40)
@given(data=st.data())
def test_any_sizes_and_options(backend, data):
    draw = data.draw
    n, channels_in, channels_out, h, w = (draw(st.integers(1, top)) for top in (3, 5, 5, 6, 6))
    kernel, up = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([1, 2]))
    smallest = max(0, -((up * min(h, w) - kernel) // 2))  # the padding that leaves at least one pixel
    padding = draw(st.integers(smallest, smallest + 3))
    inputs = layer(n, channels_in, channels_out, h, w, kernel, seed=draw(st.integers(0, 2**32)))
    size = [up * s + 2 * padding - kernel + 1 for s in (h, w)]
    options = {
        "demodulate": draw(st.booleans()),
        "up": up,
        "padding": padding,
        "resample_filter": taps_of(draw(st.sampled_from(sorted(FILTERS)))),
        "noise": draw(st.sampled_from([None, torch.randn(1, 1, *size).double(), torch.randn(n, 1, *size).double()])),
        "bias": draw(st.sampled_from([None, torch.randn(channels_out).double()])),
        "activation": draw(st.sampled_from(["linear", "lrelu"])),
        "gain": draw(st.sampled_from([1.0, 1.4])),
        "clamp": draw(st.sampled_from([None, 1.0])),
    }
    actual = modulated_conv2d(*inputs, **options, backend=backend)
    assert actual.shape == (n, channels_out, *size)
    torch.testing.assert_close(actual, grouped(*inputs, **options), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("backend", RUNNING)
def test_flip_of_the_kernel(kernel, backend):
    """up = 1 correlates like F.conv2d; up = 2 convolves, as StyleGAN2 does. Both against scipy, with no FIR filter."""
    x, weight, _ = layer(1, 1, 1, k=kernel, seed=3)
    ones, image, taps = torch.ones(1, 1, dtype=torch.float64), x[0, 0].numpy(), weight[0, 0].numpy()
    same = modulated_conv2d(x, weight, ones, demodulate=False, backend=backend)
    np.testing.assert_allclose(same[0, 0].numpy(), convolve2d(image, taps[::-1, ::-1], "same"), rtol=0, atol=1e-12)
    grid = np.zeros((12, 14))
    grid[::2, ::2] = image
    options = {"demodulate": False, "up": 2, "backend": backend}
    double = modulated_conv2d(x, weight, ones, resample_filter=torch.ones(1), **options)
    # A single tap has no middle between two pixels: the result sits one pixel lower right than scipy's "same".
    shifted = np.pad(convolve2d(grid, taps, "same"), ((1, 0), (1, 0)))[:-1, :-1]
    inside = slice(kernel // 2, None)  # "same" has lost what moves in at the upper and left edge
    np.testing.assert_allclose(double[0, 0, inside, inside].numpy(), 4 * shifted[inside, inside], rtol=0, atol=1e-12)
    # With the FIR filter: scipy's convolutions one after the other, [1, 3, 3, 1] in the middle.
    fir = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    full = convolve2d(convolve2d(grid, taps, "full"), 4 * fir, "full")
    begin = kernel // 2 + 1
    expected = full[begin : begin + 12, begin : begin + 14]
    actual = modulated_conv2d(x, weight, ones, **options)
    np.testing.assert_allclose(actual[0, 0].numpy(), expected, rtol=0, atol=1e-12)
    if kernel > 1:
        flipped = modulated_conv2d(x, weight.flip(2, 3), ones, **options)
        assert (flipped - actual).abs().max() > 0.1, "the kernel's direction would not show"


@pytest.mark.parametrize("backend", RUNNING)
def test_upsampling_keeps_a_constant_image_and_its_centre(backend):
    ones = torch.ones(1, 1, dtype=torch.float64)
    double = modulated_conv2d(
        torch.full((1, 1, 6, 6), 0.7, dtype=torch.float64),
        ones[:, :, None, None],
        ones,
        demodulate=False,
        up=2,
        backend=backend,
    )
    assert double.shape == (1, 1, 12, 12)
    torch.testing.assert_close(double[..., 1:-1, 1:-1], torch.full((1, 1, 10, 10), 0.7, dtype=torch.float64))
    torch.testing.assert_close(double, double.flip(2, 3))


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_demodulation_gives_unit_variance(up, backend):
    # Over the random input, up to the FIR filter's; the style's scale then has no effect.
    x = torch.randn(8, 16, 24, 24)
    weight, style = torch.randn(12, 16, 3, 3), 5 * torch.rand(8, 16) + 0.1
    y = modulated_conv2d(x, weight, style, up=up, backend=backend)
    if up == 1:
        deviation = y[:, :, 1:-1, 1:-1].std((0, 2, 3))
        torch.testing.assert_close(deviation, torch.ones(12), rtol=0, atol=0.1)
    torch.testing.assert_close(modulated_conv2d(x, weight, 100 * style, up=up, backend=backend), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("backend", RUNNING)
def test_accuracy(dtype, demodulate, up, kernel, backend, assert_accurate, poisoned_memory):
    x, weight, style = layer(2, 33, 17, 9, 7, kernel, dtype=dtype)
    options = {
        "demodulate": demodulate,
        "up": up,
        "noise": torch.randn(2, 1, 9 * up, 7 * up).to(dtype),
        "bias": torch.randn(17).to(dtype),
        "activation": "lrelu",
        "gain": 2**0.5,
    }
    exact = grouped(x.double(), weight.double(), style.double(), **doubled(options))
    plain = grouped(x, weight, style, **options)
    assert_accurate(modulated_conv2d(x, weight, style, **options, backend=backend), plain, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("backend", RUNNING)
def test_parameters_may_have_another_dtype_than_the_images(dtype, up, backend, assert_accurate):
    x, weight, style = layer(2, 33, 17, 9, 7)
    x, weight, style = x.to(dtype), weight.float(), style.float()
    bias, noise = torch.randn(17), torch.randn(1, 1, 9 * up, 7 * up)
    actual = modulated_conv2d(x, weight, style, up=up, bias=bias, noise=noise, backend=backend)
    plain = grouped(x, weight, style, up=up, bias=bias, noise=noise)
    exact = grouped(x.double(), weight.double(), style.double(), up=up, bias=bias.double(), noise=noise.double())
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_float16_does_not_overflow(up, backend):
    # Before demodulation the sums are about 256 sqrt(9 512) = 17 000 standard deviations: beyond 65 504 without care.
    x, weight, style = layer(2, 512, 6, 8, 8, dtype=torch.float16)
    x = (256 * x).clamp(-256, 256)
    actual = modulated_conv2d(x, weight, 10 * style, up=up, backend=backend)
    exact = grouped(x.double(), weight.double(), 10 * style.double(), up=up)
    assert (actual.double() - exact).abs().max() <= 4e-3 * exact.abs().max()
    zeros = torch.zeros_like
    assert torch.equal(modulated_conv2d(x, weight, zeros(style), up=up, backend=backend), zeros(actual))
    assert torch.equal(modulated_conv2d(x, zeros(weight), style, up=up, backend=backend), zeros(actual))


@pytest.mark.parametrize("backend", RUNNING)
def test_derivatives_in_float16(backend):
    x, weight, style = layer(2, 9, 7, dtype=torch.float16)
    upstream = torch.randn(2, 7, 6, 7)

    def gradients(dtype):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, style)]
        y = modulated_conv2d(*tensors, backend=backend)
        return torch.autograd.grad(y, tensors, upstream.to(dtype))

    for half, exact in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (half.double() - exact).abs().max() <= 1e-2 * exact.abs().max()


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_empty_batch(up, backend):
    _, weight, style = layer(n=0)
    x = torch.zeros(0, 5, 6, 7, dtype=torch.float64)
    noise = torch.zeros(1, 1, 6 * up, 7 * up, dtype=torch.float64)
    assert modulated_conv2d(x, weight, style, up=up, noise=noise, backend=backend).shape == (0, 4, 6 * up, 7 * up)
    assert modulated_conv2d(x, weight, style, up=up, noise=noise[:0], backend=backend).shape == (0, 4, 6 * up, 7 * up)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_samples_are_independent(up, backend):
    x, weight, style = layer(n=4)
    expected = modulated_conv2d(x, weight, style, up=up, backend=backend)
    x[1], style[1] = torch.nan, torch.nan
    beside_nan = modulated_conv2d(x, weight, style, up=up, backend=backend)
    others = [0, 2, 3]
    torch.testing.assert_close(beside_nan[others], expected[others], rtol=0, atol=1e-13)
    assert beside_nan[1].isnan().all()


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_inputs_need_not_be_contiguous(up, backend):
    inputs = layer(3, 4, 6, 8, 6)
    options = {"up": up, "bias": torch.randn(6).double(), "noise": torch.randn(3, 1, 8 * up, 6 * up).double()}
    expected = modulated_conv2d(*inputs, **options, backend=backend)

    def spread(tensor):
        """The same values, NaN between them in memory."""
        gaps = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan, dtype=tensor.dtype)
        return gaps[..., 1::2].copy_(tensor)

    def channels_last(tensor):
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    def transposed(tensor):
        return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor

    for change in (spread, channels_last, transposed):
        views = [change(tensor) for tensor in inputs]
        assert not views[0].is_contiguous() and not views[1].is_contiguous()
        changed = {name: change(v) if torch.is_tensor(v) else v for name, v in options.items()}
        torch.testing.assert_close(modulated_conv2d(*views, **changed, backend=backend), expected, rtol=0, atol=1e-12)
    expanded = modulated_conv2d(inputs[0][:1].expand(3, 4, 8, 6), *inputs[1:], **options, backend=backend)
    copied = modulated_conv2d(inputs[0][:1].repeat(3, 1, 1, 1), *inputs[1:], **options, backend=backend)
    torch.testing.assert_close(expanded, copied, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_inputs_are_left_alone(up, backend):
    inputs = (*layer(), torch.ones(4).double(), torch.ones(3, 1, 6 * up, 7 * up).double())
    copies = [tensor.clone() for tensor in inputs]
    x, weight, style, bias, noise = inputs
    y = modulated_conv2d(
        x, weight, style, up=up, bias=bias, noise=noise, activation="lrelu", clamp=1.0, backend=backend
    )
    y.fill_(torch.nan)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [1, 2])
def test_derivatives(up, demodulate, backend):
    x, weight, style = layer(2, 2, 2, 3, 2)
    noise, bias = torch.randn(1, 1, 3 * up, 2 * up).double(), torch.randn(2).double()
    inputs = [tensor.requires_grad_() for tensor in (x, weight, style, noise, bias)]

    def run(x, weight, style, noise, bias):
        return modulated_conv2d(
            x,
            weight,
            style,
            demodulate=demodulate,
            up=up,
            noise=noise,
            bias=bias,
            activation="lrelu",
            gain=1.5,
            backend=backend,
        )

    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


ERRORS = [
    ({"x": None}, TypeError, r"x must be a torch.Tensor \[N, I, H, W\], got NoneType"),
    ({"x": torch.zeros(5, 6, 7)}, ValueError, r"x must have shape \[N, I, H, W\], got \[5, 6, 7\]"),
    ({"x": torch.zeros(3, 5, 6, 7, dtype=torch.uint8)}, TypeError, "x must have dtype float32, .*, got uint8"),
    ({"x": torch.zeros(3, 5, 0, 7)}, ValueError, "x of 0x7 is too small for kernel 3 and padding 1"),
    ({"x": torch.zeros(3, 5, 0, 7), "padding": 2}, ValueError, "x of 0x7 is too small for kernel 3 and padding 2"),
    ({"x": torch.zeros(3, 5, 2, 7), "padding": 0}, ValueError, "x of 2x7 is too small for kernel 3 and padding 0"),
    ({"x": torch.zeros(3, 5, 1, 7), "padding": 0, "up": 2}, ValueError, "x of 1x7 is too small for kernel 3"),
    (
        {"weight": torch.zeros(4, 6, 3, 3)},
        ValueError,
        r"weight must have shape .* = \[\*, 5, \*, \*\], got \[4, 6, 3, 3\]",
    ),
    ({"weight": torch.zeros(4, 5, 3, 5)}, ValueError, "weight must have a square kernel of odd size, got 3x5"),
    ({"weight": torch.zeros(4, 5, 2, 2)}, ValueError, "weight must have a square kernel of odd size, got 2x2"),
    ({"weight": torch.zeros(4, 5, 0, 0)}, ValueError, "weight must have a square kernel of odd size, got 0x0"),
    ({"weight": torch.zeros(0, 5, 3, 3)}, ValueError, "weight must have at least one input and one output channel"),
    (
        {"x": torch.zeros(3, 0, 6, 7), "weight": torch.zeros(4, 0, 3, 3), "style": torch.zeros(3, 0)},
        ValueError,
        r"weight must have at least one input and one output channel, got shape \[4, 0, 3, 3\]",
    ),
    ({"weight": torch.zeros(4, 5, 3, 3, device="meta")}, ValueError, "weight must be on cpu like the other arguments"),
    ({"style": torch.zeros(3, 4)}, ValueError, r"style must have shape \[N, I\] = \[3, 5\], got \[3, 4\]"),
    ({"style": torch.zeros(1, 5)}, ValueError, r"style must have shape \[N, I\] = \[3, 5\], got \[1, 5\]"),
    ({"style": torch.zeros(3, 5).long()}, TypeError, "style must have dtype .*, got int64"),
    ({"up": 3}, ValueError, "up must be 1 or 2, got 3"),
    ({"up": 0}, ValueError, "up must be 1 or 2, got 0"),
    ({"padding": -1}, ValueError, r"padding must be in \[0, 2\*\*63\), got -1"),
    ({"padding": 0.5}, TypeError, "padding must be an integer, got float"),
    ({"padding": "same"}, TypeError, "padding must be an integer, got str"),
    (
        {"up": 2, "resample_filter": [1.0, 3.0, 3.0, 1.0]},
        TypeError,
        "resample_filter must be a torch.Tensor .*, got list",
    ),
    (
        {"up": 2, "resample_filter": torch.ones(2, 3)},
        ValueError,
        r"FIR filter must have shape \[k\] or \[k, k\], got \[2, 3\]",
    ),
    ({"up": 2, "resample_filter": torch.ones(0)}, ValueError, "FIR filter must have shape"),
    (
        {"up": 2, "resample_filter": torch.tensor(1.0)},
        ValueError,
        r"resample_filter must have shape \[m, m\], got \[\]",
    ),
    ({"up": 2, "resample_filter": torch.ones(2, 2, 2)}, ValueError, "resample_filter must have shape"),
    ({"up": 2, "resample_filter": torch.ones(4).long()}, TypeError, "resample_filter must have dtype"),
    ({"resample_filter": "1331"}, TypeError, "resample_filter must be a torch.Tensor"),
    ({"noise": torch.zeros(2, 1, 6, 7)}, ValueError, r"noise must have shape .* = \[3, 1, 6, 7\], got \[2, 1, 6, 7\]"),
    ({"noise": torch.zeros(1, 1, 6, 7), "up": 2}, ValueError, r"noise must have shape .* = \[1, 1, 12, 14\]"),
    ({"noise": torch.zeros(3, 4, 6, 7)}, ValueError, "noise must have shape"),
    ({"noise": 0.0}, TypeError, "noise must be a torch.Tensor"),
    ({"noise_strength": 0.5}, TypeError, r"noise_strength must be a torch.Tensor \[\], got float"),
    ({"noise_seed": 0.5}, TypeError, "noise_seed must be an integer, got float"),
    ({"noise_seed": 1, "noise": torch.zeros(1, 1, 6, 7)}, ValueError, "noise and noise_seed exclude each other"),
    ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[O\] = \[4\], got \[5\]"),
    ({"bias": torch.zeros(4, 1)}, ValueError, r"bias must have shape \[O\] = \[4\], got \[4, 1\]"),
    ({"activation": "relu"}, ValueError, 'activation must be "linear" or "lrelu", got \'relu\''),
    ({"activation": None}, ValueError, 'activation must be "linear" or "lrelu", got None'),
    ({"clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
    ({"clamp": -1.0}, ValueError, "clamp must be positive or None, got -1.0"),
    ({"clamp": float("nan")}, ValueError, "clamp must be positive or None, got nan"),
    ({"backend": "fast"}, ValueError, "backend= names the backend 'fast'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[" ".join(change) for change, _, _ in ERRORS])
def test_errors_name_the_argument(change, error, message):
    arguments = dict(zip(("x", "weight", "style"), layer(dtype=torch.float32), strict=True))
    with pytest.raises(error, match=message):
        modulated_conv2d(**{**arguments, **change})


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("up", [1, 2])
def test_stays_whole_under_compile(up, backend):
    inputs = [
        tensor.requires_grad_()
        for tensor in (*layer(dtype=torch.float32), torch.randn(4), torch.tensor([1.0, 2.0, 1.0]))
    ]

    def run(x, weight, style, bias, taps):
        return modulated_conv2d(
            x,
            weight,
            style,
            up=up,
            bias=bias,
            resample_filter=taps.detach(),
            activation="lrelu",
            clamp=2.0,
            backend=backend,
        )

    expected = run(*inputs)
    actual = torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    upstream = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(y, inputs[:4], upstream) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", RUNNING)
def test_exports(backend):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4, 5, 3, 3))
            self.bias = torch.nn.Parameter(torch.randn(4))

        def forward(self, x, style):
            x = modulated_conv2d(x, self.weight, style, bias=self.bias, up=2, activation="lrelu", backend=backend)
            return modulated_conv2d(x, self.weight[:, :4], style[:, :4], demodulate=False, backend=backend)

    module, batch = Block(), torch.export.Dim("batch", min=1, max=100)
    x, _, style = layer(dtype=torch.float32)
    program = torch.export.export(module, (x, style), dynamic_shapes={"x": {0: batch}, "style": {0: batch}})
    for n in (1, 3, 7):
        x, _, style = layer(n, dtype=torch.float32, seed=n)
        torch.testing.assert_close(program.module()(x, style), module(x, style), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize(("kernel", "channels_out"), [(3, 4), (1, 3)])
def test_autocast_does_not_reach_the_layer(kernel: int, channels_out: int, backend: str) -> None:
    x, weight, style = torch.randn(2, 5, 6, 6), torch.randn(channels_out, 5, kernel, kernel), torch.randn(2, 5)
    expected = modulated_conv2d(x, weight, style, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for needs_grad in (False, True):
            actual = modulated_conv2d(x.clone().requires_grad_(needs_grad), weight, style, backend=backend)
            torch.testing.assert_close(actual, expected)
