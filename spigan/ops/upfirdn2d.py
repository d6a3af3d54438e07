"""Upsample, filter and downsample: the FIR resampling of StyleGAN2 (Karras et al. 2020b), in plain PyTorch.

This is the reference for the resampling of `fir_bias_act`. It is not an operation with backends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def fir_filter(taps: Sequence[float] | Tensor = (1.0, 3.0, 3.0, 1.0), *, device: torch.device | None = None) -> Tensor:
    """Return a two-dimensional float32 filter that sums to 1.

    Args:
        taps: [k] taps, whose outer product with themselves is the filter, or the [k, k] filter.
        device: Device of the filter; by default that of the taps.

    Returns:
        [k, k] float32.
    """
    taps = torch.as_tensor(taps, dtype=torch.float32, device=device)
    if taps.ndim == 1:
        taps = torch.outer(taps, taps)
    if taps.ndim != 2 or taps.shape[0] != taps.shape[1] or taps.numel() == 0:
        raise ValueError(f"a FIR filter must have shape [k] or [k, k], got {list(taps.shape)}")
    return taps / taps.sum()


def upfirdn2d(
    x: Tensor,
    filter: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
    gain: float = 1.0,
) -> Tensor:
    """Insert up - 1 zeros after each pixel, pad, convolve each channel with `filter`, keep every `down`-th pixel.

    Args:
        x: [N, C, H, W].
        filter: [k, k]; it is convolved, not correlated.
        up: Integer upsampling factor.
        down: Integer downsampling factor.
        padding: Zeros before and after, in both directions, on the upsampled grid; negative values crop.
        gain: Factor of the result.

    Returns:
        [N, C, H', W'] with H' = floor((H up + sum(padding) - k) / down) + 1.
    """
    if up < 1 or down < 1:
        raise ValueError(f"up and down must be at least 1, got up={up} and down={down}")
    n, c, h, w = x.shape
    if up > 1:
        x = x.view(n, c, h, 1, w, 1) if x.is_contiguous() else x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    before, after = padding
    # Pad before cropping: F.pad raises if a crop takes more than the image has.
    for first, last in ((max(before, 0), max(after, 0)), (min(before, 0), min(after, 0))):
        if first != 0 or last != 0:
            x = F.pad(x, (first, last, first, last))
    kernel = (filter * gain).flip((0, 1)).to(x.dtype)
    # Filter at full resolution and drop pixels afterwards: in bfloat16 on a CPU, forward and backward of a strided
    # depthwise convolution take longer than four times the work (x [32, 32, 32, 32]: 28 ms against 4.7 ms, one core of
    # an AVX-512 server CPU, PyTorch 2.13; float32: 12 ms against 15.5 ms).
    x = F.conv2d(x, kernel.expand(c, 1, *kernel.shape), groups=c)
    return x[:, :, ::down, ::down] if down > 1 else x
