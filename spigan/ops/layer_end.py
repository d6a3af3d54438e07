"""What ends a layer, ready for a kernel: the FIR filter, and the factor, noise, bias and activation that follow it.

Twin: LayerEnd in csrc/common/arguments.h.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spigan.ops.library import launch

LRELU_SLOPE = 0.2


def slope_of(activation: str) -> float:
    """Return the slope of the activation's negative side."""
    return LRELU_SLOPE if activation == "lrelu" else 1.0


def channels_last(x: Tensor) -> Tensor:
    """Return x [N, C, H, W] as [N, H, W, C], contiguous."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Make `tensor` contiguous, in the dtype in which kernels compute images of `dtype`: float32 or float64."""
    return None if tensor is None else tensor.to(torch.promote_types(dtype, torch.float32)).contiguous()


@dataclass(kw_only=True)
class Fir:
    """The FIR resampling at the end of a layer.

    Attributes:
        filter: float32 [m, m], m <= 8, contiguous.
        up, down: 1 or 2: up - 1 zeros follow each pixel, every down-th pixel is kept.
        pad: Zeros before the first row and column, on the upsampled grid; negative values crop.
        flip: Convolve with the filter; False: correlate.
        gain: Factor of the filter.
    """

    filter: Tensor
    up: int = 1
    down: int = 1
    pad: int
    flip: bool = True
    gain: float = 1.0


@dataclass(kw_only=True)  # not frozen, which would take three times as long to create
class LayerEnd:
    """What follows the convolution y and its FIR filter in a layer.

        v = clamp(gain act(factor y + strength noise + bias))
        result = next_factor v + add,    rgb = sum over channels of rgb_weight v

    All tensors are contiguous and `wide`, unless stated otherwise. None leaves a part out.

    Attributes:
        factor: [N, C], such as the demodulation.
        noise: [N or 1, ..., H', W'].
        seed: int64 [1], from whose stream the noise is drawn if `noise` is None.
        strength: Scalar, factor of the noise.
        bias: [C] or [N, C].
        activation: "linear" or "lrelu".
        gain: Factor after the activation.
        clamp: Bound of the absolute value.
        next_factor: [N, C], the style of the next layer, by which that layer would scale its input.
        add: [N, H', W', C] in the dtype of the images.
        rgb_weight: float32 [N, R, C], R <= 4, the modulated weights of a ToRGB layer.
    """

    factor: Tensor | None = None
    noise: Tensor | None = None
    seed: Tensor | None = None
    strength: Tensor | None = None
    bias: Tensor | None = None
    activation: str = "linear"
    gain: float = 1.0
    clamp: float | None = None
    next_factor: Tensor | None = None
    add: Tensor | None = None
    rgb_weight: Tensor | None = None

    @property
    def pointwise(self) -> dict[str, Any]:
        """`slope`, `gain` and `clamp` (infinity for no bound), as kernels take them."""
        clamp = math.inf if self.clamp is None else self.clamp
        return {"slope": slope_of(self.activation), "gain": self.gain, "clamp": clamp}

    def of_images(self, n: int, first: int, count: int) -> LayerEnd:
        """Return the end of the images first, ..., first + count - 1 out of n."""
        if count == n:
            return self
        parts: dict[str, Any] = {}
        for name in ("factor", "noise", "bias", "next_factor", "add", "rgb_weight"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.ndim > 1 and tensor.shape[0] == n:  # others are for all images
                parts[name] = tensor[first : first + count]
        return replace(self, **parts)

    def noise_stride(self, pixels: int) -> int:
        """Numbers from the noise of one image of that many pixels to the next one's; 0 if all have the same."""
        return 0 if self.noise is None or self.noise.numel() == pixels else pixels

    def arguments(self, out: Tensor | None, rgb: Tensor | None, size: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
        """Return the last arguments of the kernels that follow matrix products, for a result of `size` [N, H', W', C].

        The seed, a bias for each image, and `add` are not among them.
        """
        return [
            out, dtype, list(size), self.factor, self.noise, self.noise_stride(size[1] * size[2]), self.strength,
            self.bias, *self.pointwise.values(), self.next_factor, rgb, self.rgb_weight,
            0 if rgb is None else rgb.shape[3],
        ]  # fmt: skip


def finish_layer(
    backend: str, out: Tensor | None, x: Tensor, end: LayerEnd, *, fir: Fir | None = None, rgb: Tensor | None = None
) -> None:
    """End a layer in one pass over memory, on the current device.

    Args:
        backend: "cpp", "triton" or "cuda".
        out: [N, H', W', C] result, or None if only `rgb` is wanted. Without a FIR filter it may be `x`.
        x: [N, H, W, C].
        end: What to do.
        fir: The resampling that comes first.
        rgb: float32 [N, H', W', R] result, if `end.rgb_weight` is given.
    """
    n, height, width = (out if out is not None else rgb).shape[:3]  # type: ignore[union-attr]
    if n == 0 or (x.numel() == 0 and (out is None or out.numel() == 0)):
        return
    channels = x.shape[3]
    filter, up, down, pad, flip, fir_gain = None, 1, 1, 0, True, 1.0
    if fir is not None:
        filter, up, down, pad, flip, fir_gain = fir.filter, fir.up, fir.down, fir.pad, fir.flip, fir.gain
    if backend == "triton":
        from spigan.kernels.fir_bias_act import fir_bias_act as run

        noise = None if end.noise is None else end.noise.view(-1, height, width)
        run(
            out, rgb, x, filter, end.factor, noise, end.seed, end.strength, end.bias, end.add, end.next_factor,
            end.rgb_weight, up=up, down=down, pad=pad, flip=flip, fir_gain=fir_gain, **end.pointwise,
        )  # fmt: skip
        return
    launch(
        backend, "fir_bias_act", out, x.dtype, [n, height, width, channels], x, list(x.shape[1:3]),
        filter, [1 if filter is None else filter.shape[0], up, down, pad], flip, fir_gain,
        end.factor, end.noise, end.noise_stride(height * width), end.seed, end.strength,
        end.bias, channels if end.bias is not None and end.bias.ndim == 2 else 0, *end.pointwise.values(),
        end.next_factor, end.add, rgb, end.rgb_weight, 0 if rgb is None else rgb.shape[3],
    )  # fmt: skip
