"""Images to disk in batches: whole files or none, in any format, in memory that does not grow."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spigan.sampling.writers import Format, image_format, image_writer

SHAPE = (3, 4, 5)


def batches(times: int, n: int, size: int = 3) -> tuple[Tensor, list[Tensor]]:
    images = torch.randint(0, 256, (times, n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, list(images.split(size, dim=1))


def write(fmt: Format, out: Path, seeds: list[int], times: list[float], parts: list[Tensor]) -> None:
    with image_writer(fmt, out, seeds, times, SHAPE) as add:
        for part in parts:
            add(part)


@pytest.mark.parametrize("times", [[1.0], [0.0, 0.5]])
@pytest.mark.parametrize("n", [1, 7, 40])
def test_folder(tmp_path: Path, n: int, times: list[float]) -> None:
    images, parts = batches(len(times), n, 20)
    seeds = [3 * i for i in range(n)]
    write(Format.png, tmp_path / "new" / "folder", seeds, times, parts)
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert len(files) == n * len(times)
    for k, moment in enumerate(times):
        for i, seed in enumerate(seeds):
            name = f"seed{seed:06d}.png" if len(times) == 1 else f"seed{seed:06d}-t{moment:.2f}.png"
            with Image.open(tmp_path / "new" / "folder" / name) as image:
                assert np.array_equal(np.asarray(image), images[k, i].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("times", [[1.0], [0.0, 0.5]])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_npz(tmp_path: Path, n: int, times: list[float]) -> None:
    images, parts = batches(len(times), n)
    write(Format.npz, tmp_path / "a.npz", list(range(n)), times, parts if n else [])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        expected = images.movedim(-3, -1).numpy()
        assert np.array_equal(file["images"], expected if len(times) > 1 else expected[0])
        assert file["seeds"].tolist() == list(range(n)) and file["t"].tolist() == times
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("times", [[1.0], [0.0, 0.5]])
@pytest.mark.parametrize("channels", [1, 3])
def test_parquet(tmp_path: Path, channels: int, times: list[float]) -> None:
    n = 11
    images, parts = batches(len(times), n, 2)
    images, parts = images[:, :, :channels], [part[:, :, :channels] for part in parts]
    write(Format.parquet, tmp_path / "a.parquet", list(range(n)), times, parts)
    rows: Any = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert rows["seed"][:] == [i for i in range(n) for _ in times]
    assert rows["t"][:] == times * n
    actual = np.stack([np.asarray(image).reshape(4, 5, channels) for image in rows["image"]])
    assert np.array_equal(actual, images.transpose(0, 1).flatten(0, 1).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("fmt", list(Format))
def test_no_file_is_left_by_a_failure(tmp_path: Path, fmt: Format) -> None:
    _, parts = batches(1, 6)
    out = tmp_path / ("folder" if fmt is Format.png else "file")
    if fmt is not Format.png:
        out.write_text("what was there before")

    def fail() -> None:
        with image_writer(fmt, out, list(range(6)), [1.0], SHAPE) as add:
            add(parts[0])
            raise RuntimeError("the sampler failed")

    with pytest.raises(RuntimeError, match="the sampler failed"):
        fail()
    if fmt is Format.png:  # each is whole
        for path in out.iterdir():
            Image.open(path).load()
    else:
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        assert out.read_text() == "what was there before"


def test_errors_of_the_encoders_reach_the_caller(tmp_path: Path) -> None:
    _, parts = batches(1, 400, 100)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "seed000005.png").mkdir()  # a file cannot replace a folder
    with pytest.raises(IsADirectoryError):
        write(Format.png, folder, list(range(400)), [1.0], parts)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("a.png", "grid"), ("a.PNG", "grid"), ("a.npz", "npz"), ("b/a.parquet", "parquet"), ("a", "png"), (".", "png")],
)
def test_image_format(tmp_path: Path, name: str, fmt: str) -> None:
    assert image_format(tmp_path / name) == fmt


def test_fewer_images_than_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 6 images, got 3"):
        write(Format.npz, tmp_path / "a.npz", list(range(6)), [1.0], batches(1, 3)[1])
    assert not list(tmp_path.iterdir())


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a \.png, \.npz or \.parquet file"):
        image_format(tmp_path / "a.jpg")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; --format png needs a folder"):
        image_writer(Format.png, tmp_path / "file", [0], [1.0], SHAPE)
    for fmt in (Format.grid, Format.npz, Format.parquet):
        with pytest.raises(ValueError, match=f"is a folder; --format {fmt.value} needs a file name"):
            image_writer(fmt, tmp_path, [0], [1.0], SHAPE)


def test_times_that_two_decimals_do_not_tell_apart(tmp_path: Path) -> None:
    images, parts = batches(2, 3)
    write(Format.png, tmp_path / "folder", [0, 1, 2], [0.501, 0.502], parts)
    assert len(list((tmp_path / "folder").iterdir())) == 6
    with Image.open(tmp_path / "folder" / "seed000001-t0.502.png") as image:
        assert np.array_equal(np.asarray(image), images[1, 1].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match="times must differ, because each is written to its own file"):
        write(Format.png, tmp_path / "same", [0, 1, 2], [0.5, 0.5], parts)


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of a sparse file that the disk has no room for is a SIGBUS."""

    def full(descriptor: int, offset: int, size: int) -> None:
        assert size == 3 * 4 * 5 * 1000
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        write(Format.npz, tmp_path / "a.npz", list(range(1000)), [1.0], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fmt", [Format.grid, Format.npz, Format.parquet])
def test_a_device_or_pipe_is_not_replaced(tmp_path: Path, fmt: Format) -> None:
    os.mkfifo(tmp_path / "pipe")
    _, parts = batches(1, 3)
    with pytest.raises(OSError, match="is not a regular file"):
        write(fmt, tmp_path / "pipe", [0, 1, 2], [1.0], parts)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_grid_has_a_row_for_each_image(tmp_path: Path) -> None:
    images, parts = batches(2, 5)
    write(Format.grid, tmp_path / "a.png", list(range(5)), [0.0, 1.0], parts)
    scale = 64 // SHAPE[-1]
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)[::scale, ::scale]
    assert pixels.shape == (5 * 5 - 1, 2 * 6 - 1, 3)  # a pixel between images
    for i, k in np.ndindex(5, 2):
        cell = pixels[5 * i : 5 * i + 4, 6 * k : 6 * k + 5]
        assert np.array_equal(cell, images[k, i].permute(1, 2, 0).numpy())
