"""Pixels on their way out: [-1, 1] floats to uint8, grids, PNG files, animations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.files import atomic_path

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from PIL.Image import Image


def to_unit_interval(images: Tensor) -> Tensor:
    """[..., C, H, W] in [-1, 1] -> float32 in [0, 1], clamped."""
    return (images.float() * 0.5 + 0.5).clamp(0.0, 1.0)


def to_uint8(images: Tensor) -> Tensor:
    """[..., C, H, W] floats in [-1, 1] -> uint8, the inverse of v / 127.5 - 1, rounded and clamped."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Image]:
    """uint8 [N, C, H, W], C = 1 or 3 -> N Pillow images of mode L or RGB."""
    from PIL import Image

    arrays = images.cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in arrays]


def make_grid(images: Tensor, *, columns: int | None = None, scale: int = 1, gap: int = 1) -> Tensor:
    """Lay images out row by row on black.

    Args:
        images: uint8 [N, C, H, W].
        columns: images in a row; default: about as many as rows.
        scale: integer factor by which pixels are enlarged, so that small images can be seen.
        gap: pixels between images, before enlarging.

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
    """Enlargement that shows an image at 64 pixels or more."""
    return max(1, 64 // resolution)


def save_png(image: Tensor, path: str | Path, durable: bool = True) -> Path:
    """Write a uint8 [C, H, W] image as PNG, whole or not at all; see `atomic_path`."""
    path = Path(path)
    with atomic_path(path, durable) as scratch:
        to_pil(image[None])[0].save(scratch, format="PNG")
    return path


ANIMATIONS = {".gif": "GIF", ".webp": "WEBP"}
"""Pillow's formats of animations, by the file's suffix."""


def save_animation(frames: Tensor, path: str | Path, *, frame_time: int = 80) -> Path:
    """Write uint8 [F, C, H, W] frames as an animation that repeats for ever, whole or not at all; see `atomic_path`.

    Args:
        frames: the frames.
        path: a .gif (at most 256 colours a frame, times in hundredths of a second) or a .webp (lossless).
        frame_time: milliseconds that each frame is shown.

    Raises:
        ValueError: another suffix, no frame, or a time that is not positive.
    """
    path = Path(path)
    kind = ANIMATIONS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: an animation is a {' or '.join(ANIMATIONS)} file")
    if not len(frames) or frame_time < 1:
        raise ValueError(f"an animation needs frames and a positive time, got {len(frames)} and {frame_time} ms")
    first, *others = to_pil(frames)
    options = {"lossless": True} if kind == "WEBP" else {}
    with atomic_path(path) as scratch:
        first.save(scratch, format=kind, save_all=True, append_images=others, duration=frame_time, loop=0, **options)
    return path
