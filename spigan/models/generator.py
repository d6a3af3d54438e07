"""Generator: latent vector h -> image. StyleGAN2's synthesis network, skip architecture (Karras et al. 2020b, Fig. 7),
with StyleGAN2-ADA's parameter names and layout; the time t is never an input (the paper's section 3.4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spigan.models.layers import LRELU_GAIN, Linear, channels_at, check_resolution, compute_dtype
from spigan.ops import modulated_conv2d
from spigan.ops.upfirdn2d import fir_filter, upsample2d

NOISE_MODES = ("random", "const", "none")


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU.

    Args:
        in_channels: I.
        out_channels: O.
        dim_h: D.
        resolution: size of the output.
        up: 1 or 2.
        clamp: bound of the output's absolute value, or None.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, *, dim_h: int, resolution: int, up: int, clamp: float | None
    ) -> None:
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = Linear(dim_h, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", fir_filter(), persistent=False)

    def forward(self, x: Tensor, h: Tensor, noise: str) -> Tensor:
        """x [N, I, H, W], h [N, D] -> [N, O, up H, up W]."""
        size = self.noise_const.shape[0]
        drawn: Tensor | None = None
        if noise == "random":
            drawn = torch.randn(x.shape[0], 1, size, size, device=x.device, dtype=x.dtype) * self.noise_strength
        elif noise == "const":
            drawn = (self.noise_const * self.noise_strength)[None, None]
        return modulated_conv2d(
            x,
            self.weight,
            self.affine(h),
            up=self.up,
            resample_filter=self.resample_filter,
            noise=drawn,
            bias=self.bias,
            activation="lrelu",
            gain=LRELU_GAIN,
            clamp=self.clamp,
        )


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, without demodulation.

    Args:
        in_channels: I.
        img_channels: C.
        dim_h: D.
        clamp: bound of the output's absolute value, or None.
    """

    def __init__(self, in_channels: int, img_channels: int, *, dim_h: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(dim_h, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x [N, I, H, W], h [N, D] -> [N, C, H, W]."""
        style = self.affine(h) * self.weight_gain
        return modulated_conv2d(x, self.weight, style, demodulate=False, bias=self.bias, clamp=self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two layers (one at 4x4, which starts from a learned constant), ToRGB added to the image so far.

    Args:
        in_channels: I; 0 for the first block.
        out_channels: O.
        img_channels: C.
        dim_h: D.
        resolution: size of the output.
        clamp: bound of the layers' absolute values, or None.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_channels: int,
        *,
        dim_h: int,
        resolution: int,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.is_first = in_channels == 0
        layer = {"dim_h": dim_h, "resolution": resolution, "clamp": clamp}
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, **layer)  # type: ignore[arg-type]
        self.conv1 = SynthesisLayer(out_channels, out_channels, up=1, **layer)  # type: ignore[arg-type]
        self.torgb = ToRGB(out_channels, img_channels, dim_h=dim_h, clamp=clamp)
        self.register_buffer("resample_filter", fir_filter(), persistent=False)

    def forward(
        self, x: Tensor | None, img: Tensor | None, h: Iterator[Tensor], h_rgb: Tensor, noise: str, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """x [N, I, H/2, W/2] and img [N, C, H/2, W/2], None in the first block -> (x [N, O, H, W], img [N, C, H, W]).

        h yields the [N, D] latent of each layer, h_rgb [N, D] is ToRGB's.
        """
        if x is None:
            x = self.const.to(dtype).expand(h_rgb.shape[0], -1, -1, -1)
        else:
            x = self.conv0(x, next(h), noise)
        x = self.conv1(x, next(h), noise)
        rgb = self.torgb(x, h_rgb).to(h_rgb.dtype)
        return x, rgb if img is None else upsample2d(img, self.resample_filter) + rgb


class Generator(nn.Module):
    """StyleGAN2 synthesis network.

    Args:
        resolution: H = W of the image, a power of two from 8 to 1024.
        img_channels: C.
        dim_h: D, length of the latent vector.
        channel_base, channel_max: width at resolution r is min(channel_base / r, channel_max).
        conv_clamp: bound of each layer's absolute values (StyleGAN2-ADA uses 256 with float16); None for no bound.

    Attributes:
        num_ws: number of layers that take a latent of their own: 2 log2(resolution) - 2.
    """

    def __init__(
        self,
        resolution: int,
        img_channels: int = 3,
        *,
        dim_h: int = 512,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.img_channels, self.dim_h = check_resolution(resolution), img_channels, dim_h
        self.block_resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.num_ws = 2 * len(self.block_resolutions)
        in_channels = 0
        for res in self.block_resolutions:
            out_channels = channels_at(res, channel_base, channel_max)
            block = SynthesisBlock(
                in_channels, out_channels, img_channels, dim_h=dim_h, resolution=res, clamp=conv_clamp
            )
            self.add_module(f"b{res}", block)
            in_channels = out_channels

    def forward(self, h: Tensor, noise: str | None = None) -> Tensor:
        """Image of a latent vector.

        Under `torch.autocast` the convolutions run in its dtype; the image is accumulated in the dtype of h.

        Args:
            h: [N, D], or [N, num_ws, D] with one latent for each layer (ToRGB shares that of the next layer).
            noise: per-pixel noise, "random" (drawn anew), "const" (the stored one: the same image every time) or
                "none"; default: "random" in training mode, "const" in eval mode.

        Returns:
            [N, C, H, W], about [-1, 1].
        """
        noise = ("random" if self.training else "const") if noise is None else noise
        if noise not in NOISE_MODES:
            raise ValueError(f"noise must be one of {', '.join(NOISE_MODES)}, got {noise!r}")
        if h.ndim not in (2, 3) or h.shape[-1] != self.dim_h or (h.ndim == 3 and h.shape[1] != self.num_ws):
            raise ValueError(
                f"h must have shape [N, {self.dim_h}] or [N, {self.num_ws}, {self.dim_h}], got {list(h.shape)}"
            )
        dtype = compute_dtype(h)
        layers = [h] * self.num_ws if h.ndim == 2 else list(h.unbind(1))
        x: Tensor | None = None
        img: Tensor | None = None
        index = 0
        with torch.autocast(h.device.type, enabled=False):
            for res in self.block_resolutions:
                count = 1 if res == 4 else 2
                convs, rgb = layers[index : index + count], layers[index + count]
                x, img = getattr(self, f"b{res}")(x, img, iter(convs), rgb, noise, dtype)
                index += count
        assert img is not None
        return img
