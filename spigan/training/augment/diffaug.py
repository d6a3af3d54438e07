"""DiffAugment: Zhao et al. 2020, "Differentiable augmentation for data-efficient GAN training", section 4."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from spigan.training.augment.common import check_images, compute_dtype
from spigan.training.processes import ALL_ROWS, Rows


def translate(x: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """Shift image i by `dx[i]` pixels to the right and `dy[i]` pixels down, filling with zeros.

    Args:
        x: [N, C, H, H].
        dx, dy: integers [N].
    """
    size = x.shape[-1]
    pixels = torch.arange(size, device=x.device)
    column, row = pixels - dx[:, None], pixels - dy[:, None]  # [N, W], [N, H]: where each pixel comes from
    outside = ((row < 0) | (row >= size))[:, :, None] | ((column < 0) | (column >= size))[:, None, :]
    index = row.clamp(0, size - 1)[:, :, None] * size + column.clamp(0, size - 1)[:, None, :]  # [N, H, W]
    moved = x.flatten(2).gather(2, index.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view(x.shape)
    return moved.masked_fill(outside[:, None], 0.0)


def cutout(x: Tensor, cx: Tensor, cy: Tensor) -> Tensor:
    """Set the square of half the size around the pixel corner (`cx[i]`, `cy[i]`) of image i to zero.

    Args:
        x: [N, C, H, H].
        cx, cy: integers [N] in 0..H.
    """
    size = x.shape[-1]
    pixels = torch.arange(size, device=x.device)
    column, row = ((pixels >= c[:, None] - size // 4) & (pixels < c[:, None] + size // 4) for c in (cx, cy))
    return x.masked_fill((row[:, :, None] & column[:, None, :])[:, None], 0.0)


class DiffAugment(nn.Module):
    """Apply every transformation in `policy` to every image, with random strengths, in this order:

    - "color": brightness +-0.5, saturation 0 to 2 (no effect on grey images), contrast 0.5 to 1.5;
    - "translation": by up to 1/8 of the size, in whole pixels, filling with zeros;
    - "cutout": a square of half the size is set to zero. Its centre can be anywhere, so it may cross the border.

    Args:
        policy: names of the transformations.

    Raises:
        ValueError: if a name is unknown.
    """

    POLICIES = ("color", "translation", "cutout")

    def __init__(self, policy: Collection[str] = POLICIES) -> None:
        super().__init__()
        if isinstance(policy, str) or not set(policy) <= set(self.POLICIES):
            raise ValueError(f"policy must be a collection of names from {self.POLICIES}, got {policy!r}")
        self.policy = frozenset(policy)

    def forward(self, x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        """Return augmented images of the same shape and dtype.

        Args:
            x: [N, C, H, W].
            rows: which rows of the joint minibatch x holds.

        Raises:
            TypeError, ValueError: if x is not a batch of images as described in `spigan.training.augment`.
        """
        check_images(x)
        n, size = x.shape[0], x.shape[-1]
        random = rows.rand(7, n, dim=1, device=x.device, dtype=torch.float32)
        y = x.to(compute_dtype(x))
        if "color" in self.policy:
            brightness, saturation, contrast = random[:3].to(y.dtype).view(3, n, 1, 1, 1)
            y = y + (brightness - 0.5)
            y = torch.lerp(y.mean(1, keepdim=True), y, 2.0 * saturation)
            y = torch.lerp(y.mean((1, 2, 3), keepdim=True), y, contrast + 0.5)
        if "translation" in self.policy:
            reach = size // 8
            dx, dy = (random[3:5] * (2 * reach + 1)).long() - reach
            y = translate(y, dx, dy)
        if "cutout" in self.policy:
            cx, cy = (random[5:] * (size + 1)).long()
            y = cutout(y, cx, cy)
        return y.to(x.dtype)
