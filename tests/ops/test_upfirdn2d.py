"""upfirdn2d against scipy.signal: insert zeros, pad, convolve, drop, each step on its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import convolve2d
from torch.autograd import gradcheck, gradgradcheck

from spigan.ops.fir_bias_act import downsample2d, upsample2d
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

# Sums are powers of two, so that normalising does not round.
ASYMMETRIC_1D = [1.0, 4.0, 2.0, 1.0]
ASYMMETRIC_2D = [[1.0, 5.0, 2.0], [4.0, 0.0, 1.0], [-3.0, 6.0, 0.0]]
FILTERS = {"1331": [1.0, 3.0, 3.0, 1.0], "box": [1.0, 1.0], "one": [1.0], "1d": ASYMMETRIC_1D, "2d": ASYMMETRIC_2D}


def scipy_upfirdn(x, taps, up, down, padding, gain):
    """float64 [N, C, H', W'] from float64 [N, C, H, W]."""
    n, c, h, w = x.shape
    grid = np.zeros((n, c, h * up, w * up))
    grid[:, :, ::up, ::up] = x
    before, after = padding
    grid = np.pad(grid, ((0, 0), (0, 0)) + ((max(before, 0), max(after, 0)),) * 2)
    inside = slice(max(-before, 0), -max(-after, 0) or None)
    grid = grid[:, :, inside, inside]
    planes = [[gain * convolve2d(plane, taps, mode="valid") for plane in sample] for sample in grid]
    return np.array(planes)[:, :, ::down, ::down]


def image(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("taps", FILTERS.values(), ids=FILTERS)
def test_fir_filter_sums_to_one(taps):
    filter = fir_filter(taps)
    array = np.array(taps)
    array = np.outer(array, array) if array.ndim == 1 else array
    assert filter.dtype == torch.float32
    np.testing.assert_allclose(filter.numpy(), array / array.sum(), rtol=1e-7)
    assert torch.equal(fir_filter(torch.tensor(taps, dtype=torch.float64)), filter)
    torch.testing.assert_close(fir_filter(filter), filter)


def test_default_filter_is_stylegan2s():
    assert torch.equal(fir_filter(), fir_filter([1.0, 3.0, 3.0, 1.0]))
    assert fir_filter()[1, 1].item() == 9 / 64


@pytest.mark.parametrize("taps", [[], 1.0, [[1.0, 2.0]], [[[1.0]]]])
def test_fir_filter_refuses_other_shapes(taps):
    with pytest.raises(ValueError, match=r"a FIR filter must have shape \[k\] or \[k, k\], got"):
        fir_filter(taps)


@pytest.mark.parametrize("taps", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1), (0, 3), (-1, 2), (3, -2), (-1, -1)])
def test_values(taps, up, down, padding):
    x, filter = image(2, 3, 7, 6), fir_filter(taps)
    actual = upfirdn2d(x, filter, up=up, down=down, padding=padding, gain=1.5)
    expected = scipy_upfirdn(x.numpy(), filter.double().numpy(), up, down, padding, 1.5)
    size = [(s * up + sum(padding) - len(filter)) // down + 1 for s in (7, 6)]
    assert actual.shape == (2, 3, *size)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@settings(max_examples=60)
@given(data=st.data())
def test_values_at_any_size(data):
    draw = data.draw
    h, w, k = (draw(st.integers(1, top)) for top in (9, 9, 5))
    up, down = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    smallest = min(h, w) * up
    before = draw(st.integers(-2, 4))
    after = draw(st.integers(max(-2, k - smallest - before), max(4, k - smallest - before)))
    if smallest + min(before, 0) + min(after, 0) < 1:
        before, after = max(before, 0), max(after, k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(1, 2, h, w, generator=generator, dtype=torch.float64)
    filter = torch.randn(k, k, generator=generator, dtype=torch.float64)
    actual = upfirdn2d(x, filter, up=up, down=down, padding=(before, after))
    expected = scipy_upfirdn(x.numpy(), filter.numpy(), up, down, (before, after), 1.0)
    assert tuple(actual.shape) == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype, assert_accurate):
    x, filter = image(2, 3, 9, 7, dtype=dtype), fir_filter()
    exact = torch.from_numpy(scipy_upfirdn(x.double().numpy(), filter.double().numpy(), 2, 1, (2, 1), 4.0))
    # Plain PyTorch: the taps one by one.
    grid = torch.zeros(2, 3, 21, 17, dtype=dtype)
    grid[:, :, 2:20:2, 2:16:2] = x
    plain = torch.zeros(2, 3, 18, 14, dtype=dtype)
    for a in range(4):
        for b in range(4):
            plain += (4 * filter[3 - a, 3 - b]).to(dtype) * grid[:, :, a : a + 18, b : b + 14]
    assert_accurate(upfirdn2d(x, filter, up=2, padding=(2, 1), gain=4.0), plain, exact)


def test_images_need_not_be_contiguous():
    x, filter = image(2, 4, 6, 8), fir_filter(ASYMMETRIC_2D)
    wide = torch.full((2, 4, 6, 16), torch.nan, dtype=torch.float64)[..., ::2].copy_(x)
    for up, down in ((1, 1), (2, 1), (1, 2)):
        expected = upfirdn2d(x, filter, up=up, down=down, padding=(2, 1))
        for view in (wide, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
            assert not view.is_contiguous()
            actual = upfirdn2d(view, filter, up=up, down=down, padding=(2, 1))
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


def test_empty_batch():
    x = torch.zeros(0, 3, 8, 6)
    assert upsample2d(x, fir_filter()).shape == (0, 3, 16, 12)
    assert downsample2d(x, fir_filter()).shape == (0, 3, 4, 3)


@pytest.mark.parametrize("factors", [{"up": 0}, {"down": 0}, {"up": -1}])
def test_refuses_factors_below_one(factors):
    with pytest.raises(ValueError, match="up and down must be at least 1, got up="):
        upfirdn2d(image(1, 1, 4, 4), fir_filter([1.0]), **factors)


@pytest.mark.parametrize("taps", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize(("h", "w"), [(8, 8), (10, 6), (16, 2)])
def test_sizes_double_and_halve(taps, h, w):
    x, filter = image(2, 3, h, w), fir_filter(taps)
    assert upsample2d(x, filter).shape == (2, 3, 2 * h, 2 * w)
    assert downsample2d(x, filter).shape == (2, 3, h // 2, w // 2)


@pytest.mark.parametrize("name", ["1331", "box"])
def test_a_constant_image_stays_constant_inside(name):
    x, filter = torch.full((1, 2, 8, 10), 0.7, dtype=torch.float64), fir_filter(FILTERS[name])
    larger, smaller = upsample2d(x, filter), downsample2d(x, filter)
    edge = len(filter) // 2 - 1
    inside = slice(edge, -edge or None)
    torch.testing.assert_close(larger[:, :, inside, inside], torch.full_like(larger, 0.7)[:, :, inside, inside])
    torch.testing.assert_close(smaller[:, :, inside, inside], torch.full_like(smaller, 0.7)[:, :, inside, inside])
    if name == "1331":  # the zeros around the image are seen at its edge
        assert larger[0, 0, 0, 0] < 0.69 and smaller[0, 0, 0, 0] < 0.69


@pytest.mark.parametrize("name", ["1331", "box"])
def test_resampling_is_centred(name):
    # A symmetric filter then commutes with flipping the image.
    x, filter = image(1, 2, 8, 6), fir_filter(FILTERS[name])
    for resample in (upsample2d, downsample2d):
        flipped = resample(x.flip(2, 3), filter)
        torch.testing.assert_close(flipped, resample(x, filter).flip(2, 3), rtol=0, atol=1e-14)
        assert (flipped - resample(x, filter)).abs().max() > 0.1


def test_upsampling_is_four_times_the_adjoint_of_downsampling():
    x, y, filter = image(1, 2, 4, 6), image(1, 2, 8, 12), fir_filter()
    assert (upsample2d(x, filter) * y).sum().item() == pytest.approx(4 * (x * downsample2d(y, filter)).sum().item())


@pytest.mark.parametrize(
    "options", [{"up": 2, "padding": (2, 1)}, {"down": 2, "padding": (1, 1)}, {"padding": (-1, 2)}]
)
def test_derivatives(options):
    x = image(1, 2, 4, 5).requires_grad_()
    filter = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, filter: upfirdn2d(x, filter, gain=2.0, **options), (x, filter))
    assert gradgradcheck(lambda x, filter: upfirdn2d(x, filter, gain=2.0, **options), (x, filter))


def test_stays_whole_under_compile():
    def resample(x):
        return upsample2d(x, fir_filter()), downsample2d(x, fir_filter())

    x = image(1, 2, 4, 6)
    compiled = torch.compile(resample, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x), resample(x), strict=True):
        torch.testing.assert_close(actual, expected)
