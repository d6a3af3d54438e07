"""The convolution inside a StyleGAN2 layer, by the library, and the sizes around it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def allows_tf32(x: Tensor) -> bool:
    """Return whether a convolution of x may round its float32 factors to TF32, which keeps 10 bits after the point.

    Every backend follows torch.backends.cudnn, as PyTorch's own convolutions do.
    """
    # Not allow_tf32: it raises once precisions have been set by their new names, which follow the old ones.
    if not x.is_cuda or x.dtype != torch.float32:
        return False
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


def result_size(height: int, width: int, kernel: int, up: int, padding: int) -> tuple[int, int]:
    """Return (H', W') of a layer whose input is height x width."""
    grow = 2 * padding - kernel + 1
    return up * height + grow, up * width + grow


def fir_padding(kernel: int, taps: int, padding: int) -> tuple[int, int]:
    """Return the zeros before and after the transposed convolution's result for the FIR filter of up = 2.

    Negative padding crops.
    """
    return padding + (taps + 1) // 2 - (kernel - 1), padding + (taps - 2) // 2 - (kernel - 2)


def convolution(x: Tensor, weight: Tensor, up: int, padding: int) -> Tensor:
    """Convolve x [N, I, H, W] with weight [O, I, k, k].

    Returns:
        [N, O, H + 2 padding - k + 1, ...] for up = 1. [N, O, 2 H + k - 2, ...] for up = 2: the FIR filter follows.
    """
    # StyleGAN2 upsamples with a true convolution (its kernel is flipped compared with conv2d's correlation). That is
    # what conv_transpose2d with stride 2 computes. The result has kernel - 1 extra rows and columns, which the FIR
    # filter's padding takes into account, so that it stays centred at twice the size.
    if up == 2:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(x, weight, padding=padding)


def has_few_outputs(kernel: int, padding: int, up: int, channels_out: int) -> bool:
    """Return whether a layer, such as ToRGB, has so few outputs that scaling the weights is cheaper than the input."""
    return kernel == 1 and padding == 0 and up == 1 and channels_out <= 8
