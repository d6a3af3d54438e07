"""spigan.ops.demodulation against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spigan.ops.demodulation import (
    demodulation,
    demodulation_of_sums,
    normalized_style,
    normalized_weight,
    squared_sums,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer():
    """weight [O, I, k, k] and style [N, I]."""
    return torch.randn(4, 5, 3, 3, dtype=torch.float64), 1 + 0.5 * torch.randn(3, 5, dtype=torch.float64)


def test_demodulation_factors():
    weight, style = layer()
    exact = 1 / np.sqrt(np.einsum("ni,oikl->no", style.numpy() ** 2, weight.numpy() ** 2) + 1e-8)
    np.testing.assert_allclose(demodulation(weight, style).numpy(), exact, rtol=1e-13)
    for dtype in DTYPES:
        factors = demodulation(weight.to(dtype), style.to(dtype))
        assert factors.dtype == torch.float32
        rounded = 1 / np.sqrt(
            np.einsum("ni,oikl->no", style.to(dtype).double().numpy() ** 2, weight.to(dtype).double().numpy() ** 2)
            + 1e-8
        )
        np.testing.assert_allclose(factors.numpy(), rounded, rtol=1e-6)
    assert demodulation(torch.zeros(1, 1, 3, 3), torch.ones(1, 1)).item() == pytest.approx(1e4)


def test_factors_of_several_layers_at_once():
    weights, styles = zip(*(layer() for _ in range(3)), strict=True)
    sums = torch.stack([squared_sums(weight) for weight in weights])
    together = demodulation_of_sums(sums, torch.stack(styles))
    for factors, weight, style in zip(together, weights, styles, strict=True):
        torch.testing.assert_close(factors, demodulation(weight, style))


def test_autocast_does_not_round_the_factors():
    weight, style = (tensor.float() for tensor in layer())
    expected = demodulation(weight, style)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(demodulation(weight, style), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_normalisation_bounds_the_sums_and_cancels_in_the_layer(dtype):
    weight, style = (1000 * tensor.to(torch.float32) for tensor in layer())
    weight, style = weight.to(dtype).requires_grad_(), style.to(dtype).requires_grad_()
    small_weight, small_style = normalized_weight(weight), normalized_style(style)
    assert small_weight.dtype == small_style.dtype == torch.float32
    # No sum of I k k products with |x| <= 1 exceeds sqrt(I k k).
    torch.testing.assert_close(small_weight.abs().amax((1, 2, 3)), torch.full((4,), 45**-0.5))
    torch.testing.assert_close(small_style.abs().amax(1), torch.ones(3))
    if dtype == torch.float32:
        x = torch.randn(3, 5, 3, 3)

        def result(weight, style):  # one pixel of the layer
            return torch.einsum("nikl,ni,oikl->no", x, style, weight) * demodulation(weight, style)

        torch.testing.assert_close(result(small_weight, small_style), result(weight, style), rtol=1e-4, atol=1e-5)
    assert torch.equal(normalized_weight(torch.zeros(2, 3, 1, 1)), torch.zeros(2, 3, 1, 1))
    assert torch.equal(normalized_style(torch.zeros(2, 3)), torch.zeros(2, 3))
