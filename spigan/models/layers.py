"""Layers with StyleGAN2's equalised learning rate.

Parameters are stored with unit variance and scaled when they are used, so that Adam's steps have the same relative size
in every layer (Karras et al. 2018, section 4.1).
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.config import Resolution
from spigan.ops import fir_bias_act
from spigan.ops.layer_end import LRELU_SLOPE

LRELU_GAIN = math.sqrt(2.0)  # preserves the variance of a standard normal input


def lrelu(x: Tensor) -> Tensor:
    """Apply leaky ReLU with slope 0.2 and gain sqrt(2)."""
    return F.leaky_relu(x, LRELU_SLOPE) * LRELU_GAIN


def network_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a network computes: autocast's dtype if autocast is on, else the dtype of its input.

    The networks turn autocast off and cast explicitly, because autocast would also round styles, demodulation and the
    ODE.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """Scale every row of x [N, D] so that its mean square is 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def check_resolution(resolution: int) -> int:
    """Return `resolution`; raise ValueError unless it is a power of two from 8 to 1024."""
    if resolution not in get_args(Resolution):
        raise ValueError(f"resolution must be a power of two from 8 to 1024, got {resolution}")
    return resolution


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """Return StyleGAN2's width at a resolution: min(channel_base / resolution, channel_max), at least 1."""
    return max(1, min(channel_base // resolution, channel_max))


class Linear(nn.Module):
    """y = act(x W^T lr_multiplier / sqrt(in) + b lr_multiplier).

    Args:
        in_features: I, number of inputs.
        out_features: O, number of outputs.
        activation: "linear" or "lrelu".
        lr_multiplier: learning rate of this layer, relative to the optimiser's.
        bias_init: initial value of the bias after scaling.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "linear",
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, I] to [N, O], in the dtype of x."""
        x = F.linear(x, (self.weight * self.weight_gain).to(x.dtype), (self.bias * self.bias_gain).to(x.dtype))
        return lrelu(x) if self.activation == "lrelu" else x


class Conv2d(nn.Module):
    """Convolution with equalised learning rate.

    Args:
        in_channels: I, number of input channels.
        out_channels: O, number of output channels.
        kernel_size: k, an odd number.
        stride: stride of the convolution.
        padding: zero padding. Default: k // 2.
        activation: "linear" or "lrelu".
        bias: whether to add a bias.
        lr_multiplier: learning rate of this layer, relative to the optimiser's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        activation: str = "linear",
        bias: bool = True,
        lr_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(torch.randn(shape) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.activation = activation
        self.weight_gain = lr_multiplier / math.sqrt(in_channels * kernel_size**2)
        self.bias_gain = lr_multiplier

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Map x [N, I, H, W], with shift [N, O] added to the bias, to [N, O, H', W'], in the dtype of x."""
        bias = None if self.bias is None else self.bias * self.bias_gain
        if shift is not None:
            bias = shift if bias is None else bias + shift
        x = F.conv2d(x, (self.weight * self.weight_gain).to(x.dtype), stride=self.stride, padding=self.padding)
        if bias is None and self.activation == "linear":
            return x
        gain = LRELU_GAIN if self.activation == "lrelu" else 1.0
        return fir_bias_act(x, bias=bias, activation=self.activation, gain=gain)
