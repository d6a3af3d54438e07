"""spigan.ops.layer_end: what fir_bias_act does not show of the end of a layer, and the limits of the kernels."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

from spigan import _C
from spigan.ops import backends, limits
from spigan.ops import layer_end as layer_end_module
from spigan.ops.layer_end import Fir, LayerEnd, finish_layer
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d


def layer_end(n, channels, size, colors):
    return LayerEnd(
        factor=torch.randn(n, channels),
        noise=torch.randn(n, 1, *size),
        strength=torch.tensor(0.7),
        bias=torch.randn(channels),
        activation="lrelu",
        gain=1.5,
        clamp=1.2,
        next_factor=torch.randn(n, channels),
        rgb_weight=torch.randn(n, colors, channels),
    )


def by_definition(x, end):
    """[N, H, W, C] -> (result, rgb)."""
    v = x * end.factor[:, None, None] + end.strength * end.noise[:, 0, :, :, None] + end.bias
    v = (end.gain * torch.where(v < 0, 0.2 * v, v)).clamp(-end.clamp, end.clamp)
    return v * end.next_factor[:, None, None], torch.einsum("nhwc,nrc->nhwr", v, end.rgb_weight)


@pytest.mark.parametrize("colors", [1, limits.MAX_RGB_CHANNELS])
def test_result_and_rgb(colors, poisoned_memory):
    x, end = torch.randn(3, 5, 6, 7), layer_end(3, 7, (5, 6), colors)
    expected, expected_rgb = by_definition(x, end)
    for keep in (True, False):
        rgb, given = torch.empty(3, 5, 6, colors), x.clone()
        finish_layer("cpp", given if keep else None, given, end, rgb=rgb)
        torch.testing.assert_close(rgb, expected_rgb, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(given, expected if keep else x, rtol=1e-5, atol=1e-5)


def test_images_may_be_finished_in_parts():
    x, end = torch.randn(5, 4, 3, 2), layer_end(5, 2, (4, 3), 3)
    whole, rgb = torch.empty_like(x), torch.empty(5, 4, 3, 3)
    finish_layer("cpp", whole, x, end, rgb=rgb)
    assert end.of_images(5, 0, 5) is end
    for first, count in ((0, 2), (2, 1), (3, 2)):
        part = end.of_images(5, first, count)
        assert part.bias is end.bias and part.strength is end.strength and part.gain == 1.5
        out, part_rgb = torch.empty(count, 4, 3, 2), torch.empty(count, 4, 3, 3)
        finish_layer("cpp", out, x[first : first + count], part, rgb=part_rgb)
        assert torch.equal(out, whole[first : first + count])
        assert torch.equal(part_rgb, rgb[first : first + count])


def test_what_all_images_share_is_not_divided():
    shared = LayerEnd(noise=torch.randn(1, 1, 4, 3), seed=torch.tensor([5]), bias=torch.randn(5))
    part = shared.of_images(5, 2, 1)
    assert part.noise is shared.noise and part.seed is shared.seed and part.bias is shared.bias


@pytest.mark.parametrize("flip", [True, False])
def test_resampling(flip):
    x, filter = torch.randn(2, 6, 5, 3), fir_filter(torch.tensor([[1.0, 5.0, 2.0], [4.0, 0.0, 1.0], [3.0, 6.0, 0.0]]))
    out = torch.empty(2, 12, 10, 3)
    finish_layer("cpp", out, x, LayerEnd(), fir=Fir(filter=filter, up=2, pad=2, flip=flip, gain=4.0))
    turned = filter if flip else filter.flip((0, 1))
    expected = upfirdn2d(x.permute(0, 3, 1, 2), turned, up=2, padding=(2, 0), gain=4.0)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("backend", ["cpp", "triton", "cuda"])
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0)])
def test_nothing_is_launched_for_no_elements(shape, backend, monkeypatch):
    """A kernel may not be able to start with none."""
    monkeypatch.setattr(layer_end_module, "launch", lambda *_, **__: pytest.fail("a kernel was launched"))
    out = torch.empty(shape)
    finish_layer(backend, out, torch.empty(shape), LayerEnd())


LIMITS = {
    "MAX_TAPS": ("MAX_TAPS", 8),
    "MAX_RGB_CHANNELS": ("MAX_RGB_CHANNELS", 4),
    "MAX_PATH_TIMES": ("MAX_PATH_TIMES", 8),
    "MAX_ODE_DIM": ("RK4_MLP_MAX_DIM", 1024),
    "ODE_DIM_MULTIPLE": ("RK4_MLP_DIM_MULTIPLE", 16),
    "MAX_ODE_LAYERS": ("RK4_MLP_MAX_LAYERS", 8),
    "MAX_ODE_TIMES": ("RK4_MLP_MAX_INTERVALS", 64),
    "MAX_PRODUCT_TERMS": ("MAX_PRODUCT_TERMS", 64),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_the_extensions(name):
    of_extension, documented = LIMITS[name]
    assert getattr(limits, name) == getattr(_C, of_extension) == documented


def test_an_extension_without_a_limit_is_an_error(monkeypatch):
    monkeypatch.setattr(backends, "extension", SimpleNamespace)
    with pytest.raises(AttributeError, match="MAX_TAPS"):
        importlib.reload(limits)
