"""Turn pixels in [-1, 1] into pictures: uint8 images, grids, PNG files and animations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.files import atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image


def to_unit_interval(images: Tensor) -> Tensor:
    """Map [..., C, H, W] in [-1, 1] to float32 in [0, 1], clamped."""
    return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_uint8(images: Tensor) -> Tensor:
    """Map [..., C, H, W] floats in [-1, 1] to uint8: the inverse of v / 127.5 - 1, rounded and clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image]:
    """Convert uint8 [N, C, H, W] to N Pillow images, with mode L for C = 1 and RGB for C = 3."""
    from PIL import Image

    arrays = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def make_grid(images: Tensor, *, columns: int | None = None, scale: int = 1, gap: int = 1) -> Tensor:
    """Arrange images row by row on a black background.

    Args:
        images: uint8 [N, C, H, W].
        columns: number of images in a row. By default, there are about as many columns as rows.
        scale: integer factor by which each pixel is enlarged.
        gap: number of pixels between images, before enlarging.

    Returns:
        uint8 [C, H', W'].
    """
    n, c, height, width = images.shape
    columns = columns or max(1, round(n**0.5))
    rows = -(-n // columns)
    cells = F.pad(images, (0, gap, 0, gap))
    cells = torch.cat([cells, cells.new_zeros(rows * columns - n, *cells.shape[1:])])
    grid = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)  # [C, rows, H, columns, W]
    grid = grid.reshape(c, rows * (height + gap), columns * (width + gap))[:, : -gap or None, : -gap or None]
    return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def display_scale(resolution: int) -> int:
    """Return the factor that enlarges an image to at least 64 pixels."""
    return max(1, 64 // resolution)


def grid_side(resolution: int) -> int:
    """Return the number of images to show in each row and column of a grid: 8 up to 64 pixels, else 4."""
    return 8 if resolution <= 64 else 4


def save_png(image: Tensor, path: str | Path, durable: bool = True) -> Path:
    """Write a uint8 [C, H, W] image as a PNG file, completely or not at all (see `atomic_path`), and return `path`."""
    path = Path(path)
    with atomic_path(path, durable) as scratch:
        to_pil(image[None])[0].save(scratch, format="PNG")
    return path


ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
"""Pillow's animation formats, by file suffix."""


def save_animation(frames: Tensor, path: str | Path, *, frame_time: int = 80) -> Path:
    """Write frames as an animation that repeats forever, and return `path`.

    The file is written completely or not at all (see `atomic_path`).

    Args:
        frames: uint8 [F, C, H, W].
        path: a .gif file (at most 256 colours per frame, times in hundredths of a second) or a .webp file (lossless).
        frame_time: how long each frame is shown, in milliseconds.

    Raises:
        ValueError: if the suffix is neither of these, there are no frames, or the time is not positive.
    """
    path = Path(path)
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: an animation must be a {' or '.join(ANIMATIONS)} file")
    if not len(frames) or frame_time < 1:
        raise ValueError(f"an animation needs frames and a positive frame time, got {len(frames)} and {frame_time} ms")
    first, *others = to_pil(frames)
    options = {"lossless": True} if kind == "WEBP" else {}
    with atomic_path(path) as scratch:
        first.save(scratch, format=kind, save_all=True, append_images=others, duration=frame_time, loop=0, **options)
    return path
