"""Checks shared by all augmentations, and an augmentation that does nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spigan.training.processes import ALL_ROWS, Rows


def check_images(x: Tensor) -> None:
    """Raise TypeError or ValueError unless x is a batch of images as described in `spigan.training.augment`."""
    if not x.is_floating_point():
        raise TypeError(f"images must be floating point in about [-1, 1], got {x.dtype}; convert them first")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, C, H, W] with C = 1 or 3, got {list(x.shape)}")
    if x.shape[2] != x.shape[3] or x.shape[2] < 8:
        raise ValueError(f"images must be square and at least 8x8, got {x.shape[2]}x{x.shape[3]}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which to augment x: float64 for float64 images, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


class NoAugment(nn.Identity):
    """Returns the images unchanged."""

    def forward(self, x: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        """Return x."""
        return x
