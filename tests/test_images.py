"""Pixels, grids and PNG files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from spigan.images import display_scale, make_grid, save_png, to_pil, to_uint8, to_unit_interval

EVERY_VALUE = torch.arange(256, dtype=torch.uint8)


def random_images(n: int, channels: int, height: int = 5, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_the_scaling_of_the_data(dtype: torch.dtype) -> None:
    assert torch.equal(to_uint8(EVERY_VALUE.to(dtype) / 127.5 - 1), EVERY_VALUE)


def test_to_uint8_rounds_and_clamps() -> None:
    step = 1 / 127.5
    x = torch.tensor([-3.0, -1.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.4 * step, 1.0, 1.01, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255, 255, 255]
    assert to_uint8(torch.tensor([float("inf"), -float("inf")])).tolist() == [255, 0]


@pytest.mark.parametrize("count", [1, 1000])
def test_nan_becomes_black(count: int) -> None:
    assert not to_uint8(torch.full((count,), float("nan"))).any()


def test_to_unit_interval() -> None:
    images = to_unit_interval(torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0], dtype=torch.bfloat16))
    assert images.dtype == torch.float32
    assert images.tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    # diffusers' convention: times 255 it is the uint8 image.
    scaled = to_unit_interval(EVERY_VALUE / 127.5 - 1) * 255
    assert torch.equal(scaled.round().to(torch.uint8), EVERY_VALUE)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_to_pil(channels: int, mode: str) -> None:
    images = random_images(3, channels, 4, 6)
    pictures = to_pil(images)
    assert [(picture.mode, picture.size) for picture in pictures] == [(mode, (6, 4))] * 3
    for picture, image in zip(pictures, images, strict=True):
        pixels = np.asarray(picture).reshape(4, 6, channels)
        assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())
    assert to_pil(images[:0]) == []


def grid_by_loops(images: np.ndarray, columns: int, scale: int, gap: int) -> np.ndarray:
    n, c, height, width = images.shape
    rows = -(-n // columns)
    grid = np.zeros((c, rows * (height + gap) - gap, columns * (width + gap) - gap), dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return np.kron(grid, np.ones((1, scale, scale), dtype=np.uint8))


@given(
    n=st.integers(1, 10),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    columns=st.integers(1, 6),
    scale=st.integers(1, 3),
    gap=st.integers(0, 2),
)
def test_make_grid(n: int, channels: int, size: tuple[int, int], columns: int, scale: int, gap: int) -> None:
    images = random_images(n, channels, *size)
    grid = make_grid(images, columns=columns, scale=scale, gap=gap)
    assert grid.dtype == torch.uint8
    np.testing.assert_array_equal(grid.numpy(), grid_by_loops(images.numpy(), columns, scale, gap))


@pytest.mark.parametrize(("n", "columns", "rows"), [(1, 1, 1), (16, 4, 4), (5, 2, 3), (7, 3, 3), (64, 8, 8)])
def test_grid_is_about_square_by_default(n: int, columns: int, rows: int) -> None:
    assert make_grid(random_images(n, 1)).shape == (1, rows * 6 - 1, columns * 6 - 1)


@pytest.mark.parametrize(("resolution", "scale"), [(8, 8), (16, 4), (32, 2), (64, 1), (256, 1), (1024, 1)])
def test_display_scale(resolution: int, scale: int) -> None:
    assert display_scale(resolution) == scale


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("name", ["image.png", "image", "a/b/image.dat"])
def test_save_png(tmp_path: Path, channels: int, mode: str, name: str) -> None:
    image = random_images(1, channels, 4, 6)[0]
    path = save_png(image, str(tmp_path / name))
    assert path == tmp_path / name
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", mode)
        pixels = np.asarray(picture).reshape(4, 6, channels)
    assert np.array_equal(pixels, image.permute(1, 2, 0).numpy())
    assert os.listdir(path.parent) == [path.name]
