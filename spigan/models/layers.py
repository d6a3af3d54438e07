"""Layers with StyleGAN2's equalised learning rate: parameters are stored with unit variance and scaled when used, so
that Adam's steps have the same relative size in every layer (Karras et al. 2018, section 4.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from spigan.ops import fir_bias_act
from spigan.ops.library import why_transformed

LRELU_SLOPE = 0.2
LRELU_GAIN = math.sqrt(2.0)  # keeps the variance of a unit normal input


def lrelu(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 with gain sqrt(2)."""
    return F.leaky_relu(x, LRELU_SLOPE) * LRELU_GAIN


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a network computes: autocast's where it is on, else that of its input.

    The networks cast by hand, with autocast off inside: it would round styles, demodulation and the ODE too.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


_optimizer_steps = [0]


def _count_step(*_: object) -> None:
    _optimizer_steps[0] += 1


# Fused optimizers write to parameters without a trace in their versions.
register_optimizer_step_post_hook(_count_step)


def frozen_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What tells whether a module's tensors have changed: as long as it is equal to an earlier one, they have not.

    Returns:
        Address and version of each parameter and buffer and the number of optimizer steps so far; None where that is
        not enough: parameters that may be trained, inference tensors, torch.func's transforms, fake tensors.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.requires_grad or t.is_inference() or isinstance(t, FakeTensor) for t in tensors):
        return None
    if why_transformed(*tensors) is not None:
        return None
    return _optimizer_steps[0], tuple((t.data_ptr(), t._version) for t in tensors)


def normalize_2nd_moment(x: Tensor) -> Tensor:
    """[N, D] -> [N, D], every row scaled to a mean square of 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt()


def check_resolution(resolution: int) -> int:
    """Raise ValueError unless `resolution` is a power of two from 8 to 1024."""
    if resolution not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"resolution must be a power of two from 8 to 1024, got {resolution}")
    return resolution


def channels_at(resolution: int, channel_base: int, channel_max: int) -> int:
    """StyleGAN2's width at a resolution: min(channel_base / resolution, channel_max)."""
    return max(1, min(channel_base // resolution, channel_max))


class Linear(nn.Module):
    """y = act(x W^T lr_multiplier / sqrt(in) + b lr_multiplier).

    Args:
        in_features: I.
        out_features: O.
        activation: "linear" or "lrelu".
        lr_multiplier: learning rate of this layer relative to the optimiser's.
        bias_init: initial effective bias.
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
        """[N, I] -> [N, O] in the dtype of x."""
        x = F.linear(x, (self.weight * self.weight_gain).to(x.dtype), (self.bias * self.bias_gain).to(x.dtype))
        return lrelu(x) if self.activation == "lrelu" else x


class Conv2d(nn.Module):
    """Convolution with equalised learning rate.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k, odd.
        stride: stride of the convolution.
        padding: zero padding; default k // 2.
        activation: "linear" or "lrelu".
        bias: whether a bias is added.
        lr_multiplier: learning rate of this layer relative to the optimiser's.
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
        """x [N, I, H, W], shift [N, O] added to the bias -> [N, O, H', W'] in the dtype of x."""
        bias = None if self.bias is None else self.bias * self.bias_gain
        if shift is not None:
            bias = shift if bias is None else bias + shift
        x = F.conv2d(x, (self.weight * self.weight_gain).to(x.dtype), stride=self.stride, padding=self.padding)
        if bias is None and self.activation == "linear":
            return x
        gain = LRELU_GAIN if self.activation == "lrelu" else 1.0
        return fir_bias_act(x, bias=bias, activation=self.activation, gain=gain)
