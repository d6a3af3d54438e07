"""Discriminator: (image, time) -> logit.

This is StyleGAN2's residual network (Karras et al. 2020b, Fig. 7c), conditioned on the time, so that one network serves
every t (section 3.4.2 of the paper).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from spigan.models.layers import Conv2d, Linear, channels_at, check_resolution, network_dtype
from spigan.ops import fir_bias_act
from spigan.ops.fir_bias_act import downsample2d
from spigan.ops.upfirdn2d import fir_filter


def sinusoidal_embedding(t: Tensor, dim: int = 256) -> Tensor:
    """Return the Transformer's positional encoding of 1000 t, base 10000 (Ho et al. 2020, appendix B).

    Args:
        t: [N] times in [0, 1].
        dim: length of the embedding, an even number.

    Returns:
        [N, dim]: cosines, then sines.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = 1000.0 * t.to(torch.float32)[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t, followed by a two-layer MLP.

    Args:
        dim: P, width of the embedding.
    """

    def __init__(self, dim: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.fc0 = Linear(dim, dim, activation="lrelu")
        self.fc1 = Linear(dim, dim, activation="lrelu")

    def forward(self, t: Tensor) -> Tensor:
        """Map [N] to [N, P]."""
        return self.fc1(self.fc0(sinusoidal_embedding(t, self.dim).to(self.fc0.weight.dtype)))


class DiscriminatorBlock(nn.Module):
    """Residual block: two 3x3 convolutions, the second with FIR downsampling, and a 1x1 shortcut.

    The time embedding is added after the first convolution.

    Args:
        in_channels: I, number of input channels.
        out_channels: O, number of output channels.
        time_dim: P, width of the time embedding; None for a block without time.
    """

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, time_dim: int | None) -> None:
        super().__init__()
        self.conv0 = Conv2d(in_channels, in_channels, 3, activation="lrelu")
        self.time = Linear(time_dim, in_channels) if time_dim is not None else None
        self.conv1 = Conv2d(in_channels, out_channels, 3, stride=2, padding=0, activation="lrelu")
        self.skip = Conv2d(in_channels, out_channels, 1, bias=False)
        self.register_buffer("resample_filter", fir_filter(), persistent=False)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        """Map x [N, I, H, W] and time [N, P] to [N, O, H/2, W/2]."""
        shortcut = self.skip(downsample2d(x, self.resample_filter))
        x = self.conv0(x, None if self.time is None or time is None else self.time(time))
        # Blur with two pixels of padding, then convolve with stride 2 and no padding: centred, and of size H/2.
        x = self.conv1(fir_bias_act(x, filter=self.resample_filter, padding=(2, 2)))
        return (x + shortcut) * math.sqrt(0.5)


def minibatch_std(x: Tensor, group_size: int) -> Tensor:
    """Append one channel that holds the mean standard deviation over groups of images (Karras et al. 2018, section 3).

    Args:
        x: [N, C, H, W].
        group_size: number of images in a group. If it does not divide N, the largest smaller number that does is used.

    Returns:
        [N, C + 1, H, W].
    """
    n, c, height, width = x.shape
    group = next(g for g in range(min(group_size, n), 0, -1) if n % g == 0) if n else 1
    y = x.reshape(group, n // group, c, height, width).to(torch.promote_types(x.dtype, torch.float32))
    std = (y.var(dim=0, correction=0) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # [n / group]
    return torch.cat([x, std.to(x.dtype).repeat(group)[:, None, None, None].expand(n, 1, height, width)], dim=1)


class Discriminator(nn.Module):
    """Time-conditioned StyleGAN2 discriminator.

    Args:
        resolution: H = W of the image, a power of two from 8 to 1024.
        img_channels: C, number of image channels.
        channel_base: the width at resolution r is min(channel_base / r, channel_max).
        channel_max: largest width.
        time_conditioning: whether to condition on the time. False for StyleGAN2's discriminator, which only sees clean
            images.
        time_dim: width of the time embedding.
        mbstd_group: number of images in a group of the minibatch standard deviation.
    """

    def __init__(
        self,
        resolution: int,
        img_channels: int = 3,
        *,
        channel_base: int = 32768,
        channel_max: int = 512,
        time_conditioning: bool = True,
        time_dim: int = 256,
        mbstd_group: int = 4,
    ) -> None:
        super().__init__()
        self.resolution, self.img_channels = check_resolution(resolution), img_channels
        self.mbstd_group = mbstd_group
        self.time = TimeEmbedding(time_dim) if time_conditioning else None
        block_time_dim = time_dim if time_conditioning else None
        sizes = [2**i for i in range(resolution.bit_length() - 1, 2, -1)]
        widths = [channels_at(size, channel_base, channel_max) for size in (*sizes, 4)]
        self.fromrgb = Conv2d(img_channels, widths[0], 1, activation="lrelu")
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(widths[i], widths[i + 1], block_time_dim) for i in range(len(sizes))
        )
        self.conv = Conv2d(widths[-1] + 1, widths[-1], 3, activation="lrelu")
        self.fc = Linear(widths[-1] * 16, widths[-1], activation="lrelu")
        self.out = Linear(widths[-1], 1)

    def forward(self, img: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Return the logit that an image is a real image of time t.

        Args:
            img: [N, C, H, W] images, in about [-1, 1].
            t: time in [0, 1] of all images (a number or a scalar tensor), or [N] times.

        Returns:
            [N] logits, in the dtype of the parameters.

        Raises:
            ValueError: if img or t has the wrong shape.
        """
        expected = (self.img_channels, self.resolution, self.resolution)
        if img.ndim != 4 or tuple(img.shape[1:]) != expected:
            raise ValueError(f"img must have shape [N, {', '.join(map(str, expected))}], got {list(img.shape)}")
        dtype = network_dtype(img)
        with torch.autocast(img.device.type, enabled=False):
            time = None
            if self.time is not None:
                if not isinstance(t, Tensor):
                    t = torch.full((img.shape[0],), float(t), device=img.device)
                elif t.ndim == 0:
                    t = t.expand(img.shape[0])
                if t.shape != (img.shape[0],):
                    raise ValueError(f"t must be a time or one for each of {img.shape[0]} images, got {list(t.shape)}")
                time = self.time(t)
            x = self.fromrgb(img.to(dtype))
            for block in self.blocks:
                x = block(x, time)
            x = self.conv(minibatch_std(x, self.mbstd_group))
            x = self.fc(x.flatten(1).to(self.fc.weight.dtype))
            return self.out(x).squeeze(1)
