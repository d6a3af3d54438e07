"""StyleGAN2's demodulation (Karras et al. 2020b, section 2.2), and the normalisation for float16."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-8  # StyleGAN2's, inside the demodulation's square root


def squared_sums(weight: Tensor) -> Tensor:
    """Sum the squares of weight [O, I, k, k] over k x k: [O, I], at least in float32."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum((2, 3))


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """Compute d[n, o] = 1 / sqrt(sum over i, k of (style[n, i] weight[o, i, k])^2 + 1e-8), at least in float32.

    Args:
        weight: [O, I, k, k].
        style: [N, I].

    Returns:
        [N, O].
    """
    return demodulation_of_sums(squared_sums(weight), style)


def demodulation_of_sums(sums: Tensor, style: Tensor) -> Tensor:
    """Compute `demodulation` from the weights' `squared_sums` [..., O, I] and style [..., N, I]: [..., N, O]."""
    dtype = torch.promote_types(sums.dtype, style.dtype)
    # A reduced-precision matrix product would put its rounding error on every pixel of a channel alike.
    with torch.autocast(style.device.type, enabled=False):
        power = style.to(dtype).square() @ sums.to(dtype).mT
    return (power + _EPS).rsqrt()


def normalized_weight(weight: Tensor) -> Tensor:
    """Divide weight [O, I, k, k] by its largest magnitude times sqrt(I k k), at least in float32.

    Together with `normalized_style`, this keeps a float16 convolution within its range, as in StyleGAN2-ADA; the
    demodulation removes both factors again. (With 512 input channels and |x| up to the usual clamp of 256 it would
    overflow.)
    """
    wide_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.no_grad():  # the result of the layer does not depend on the factor
        scale = wide_weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20) * weight[0].numel() ** 0.5
    return weight / scale


def normalized_style(style: Tensor) -> Tensor:
    """Divide style [N, I] by the largest magnitude in each row, at least in float32; see `normalized_weight`."""
    wide_style = style.to(torch.promote_types(style.dtype, torch.float32))
    with torch.no_grad():
        scale = wide_style.abs().amax(1, keepdim=True).clamp(min=1e-20)
    return style / scale
