"""Layers and blocks of StyleGAN2's synthesis network with the skip architecture (Karras et al. 2020b, Fig. 7).

Parameters have the names and layout of StyleGAN2-ADA. `spigan.models.frozen_synthesis` runs the layers faster when no
gradients are needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spigan.models.layers import LRELU_GAIN, Linear
from spigan.ops import modulated_conv2d
from spigan.ops.fir_bias_act import upsample2d
from spigan.ops.upfirdn2d import fir_filter


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias and leaky ReLU.

    Args:
        in_channels: I, number of input channels.
        out_channels: O, number of output channels.
        dim_h: D, length of the latent vector.
        resolution: height and width of the output.
        up: 1, or 2 to double the resolution.
        clamp: bound on the output's absolute value, or None.
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

    def noise_inputs(self, mode: str, source: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the arguments `noise`, `noise_strength` and `noise_seed` of `modulated_conv2d`.

        Args:
            mode: "random", "const", "none" or "given".
            source: the int64 [] seed of "random" noise, or the "given" noise [N or 1, 1, H, W].
        """
        if mode == "none":
            return None, None, None
        if mode == "random":
            return None, self.noise_strength, source
        return self.noise_const[None, None] if mode == "const" else source, self.noise_strength, None

    def forward(self, x: Tensor, h: Tensor, mode: str, source: Tensor | None) -> Tensor:
        """Map x [N, I, H, W] and h [N, D] to [N, O, up H, up W]. For `mode` and `source`, see `noise_inputs`."""
        noise, strength, seed = self.noise_inputs(mode, source)
        return modulated_conv2d(
            x,
            self.weight,
            self.affine(h),
            up=self.up,
            resample_filter=self.resample_filter,
            noise=noise,
            noise_strength=strength,
            noise_seed=seed,
            bias=self.bias,
            activation="lrelu",
            gain=LRELU_GAIN,
            clamp=self.clamp,
        )


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, without demodulation.

    Args:
        in_channels: I, number of input channels.
        img_channels: C, number of image channels.
        dim_h: D, length of the latent vector.
        clamp: bound on the output's absolute value, or None.
    """

    def __init__(self, in_channels: int, img_channels: int, *, dim_h: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(dim_h, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """Map x [N, I, H, W] and h [N, D] to [N, C, H, W]."""
        style = self.affine(h) * self.weight_gain
        return modulated_conv2d(x, self.weight, style, demodulate=False, bias=self.bias, clamp=self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two layers, and a ToRGB layer whose output is added to the image so far.

    The first block (4x4) starts from a learned constant and has one layer, `conv1`.

    Args:
        in_channels: I, number of input channels; 0 for the first block.
        out_channels: O, number of output channels.
        img_channels: C, number of image channels.
        dim_h: D, length of the latent vector.
        resolution: height and width of the output.
        clamp: bound on the layers' absolute values, or None.
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

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The block's one or two layers, in the order in which they run."""
        return [self.conv1] if self.is_first else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        latents: Sequence[Tensor],
        mode: str,
        sources: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Run the block.

        Args:
            x: [N, I, H/2, W/2] features; None in the first block.
            img: [N, C, H/2, W/2] image so far; None in the first block.
            latents: [N, D] latent vectors of the layers, and then of ToRGB.
            mode: noise mode of the layers; see `SynthesisLayer.noise_inputs`.
            sources: noise sources of the layers.
            dtype: dtype in which the first block starts.

        Returns:
            x [N, O, H, W] and img [N, C, H, W].
        """
        if x is None:
            n = latents[0].shape[0]  # len() would make torch.export fix the batch size
            x = self.const.to(dtype).expand(n, -1, -1, -1)
        for layer, h, source in zip(self.layers, latents[:-1], sources, strict=True):
            x = layer(x, h, mode, source)
        rgb = self.torgb(x, latents[-1]).to(latents[-1].dtype)
        return x, rgb if img is None else upsample2d(img, self.resample_filter, add=rgb)
