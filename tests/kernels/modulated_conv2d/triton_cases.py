"""The Triton kernels of modulated_conv2d in Triton's interpreter, run by ../test_triton_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from triton_cases import DTYPES
from triton_layer_ends import END_NAMES, PARTS, assert_ends, doubled, end_of_layer, end_problem, poisoned_results

from spigan.kernels import modulated_conv2d as conv_kernels
from spigan.ops import fir_bias_act, modulated_conv2d, philox_normal
from spigan.ops.upfirdn2d import fir_filter

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element that a kernel does not write is NaN


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
def test_conv2d(sizes, kernel, padding, parts, assert_accurate):
    # Every pair of a size and an end of the layer; the dtypes take turns.
    dtype = DTYPES[(sizes[0] + list(PARTS).index(parts)) % 2]
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
