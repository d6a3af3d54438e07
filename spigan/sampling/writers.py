"""Write images to a folder of PNGs, a grid, an npz file or a parquet file, while the next batch is computed."""

from __future__ import annotations

import io
import os
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spigan.data.workers import available_cores
from spigan.files import atomic_path, remove_stale
from spigan.images import display_scale, make_grid, save_png, to_pil

Add = Callable[[Tensor], None]


class Format(str, Enum):
    """File formats of images."""

    png = "png"
    grid = "grid"
    npz = "npz"
    parquet = "parquet"


def image_format(out: Path) -> Format:
    """Return the format for the suffix of a path.

    Raises:
        ValueError: if the suffix is unknown.
    """
    formats = {".png": Format.grid, ".npz": Format.npz, ".parquet": Format.parquet, "": Format.png}
    if out.suffix.lower() not in formats and not out.is_dir():
        raise ValueError(f"{out}: expected a .png, .npz or .parquet file, or a folder for --format png")
    return formats.get(out.suffix.lower(), Format.png)


def image_writer(
    fmt: Format, out: Path, seeds: Sequence[int], times: Sequence[float], shape: tuple[int, int, int]
) -> AbstractContextManager[Add]:
    """Return a context manager that yields a function, which takes batches of images in the order of their seeds.

    A batch is uint8 [K, B, C, H, W] on the CPU. The files are complete when the block ends. If the block fails, it does
    not leave an incomplete file behind. Memory use does not grow with the number of images, except for a grid.

    Args:
        fmt: format of the files. png: one file for each image, named after its seed (and its time if there are
            several). grid: one PNG, with a row for each image if there are several times. npz: `images` uint8
            [N, H, W, C], or [K, N, H, W, C] for several times, `seeds` [N] and `t` [K]. parquet: one row for each
            image, with `image` {bytes: PNG, path}, `seed` and `t`, which `datasets.load_dataset("parquet", ...)` can
            read.
        out: folder (png) or file.
        seeds: N seeds.
        times: K times.
        shape: (C, H, W).

    Raises:
        ValueError: if `out` is a folder but must be a file, or vice versa.
    """
    if fmt is Format.png and out.is_file():
        raise ValueError(f"{out} is a file; --format png needs a folder")
    if fmt is not Format.png and out.is_dir():
        raise ValueError(f"{out} is a folder; --format {fmt.value} needs a file name")
    writers = {Format.png: _png_folder, Format.grid: _grid, Format.npz: _npz, Format.parquet: _parquet}
    return writers[fmt](out, seeds, times, shape)


@contextmanager
def _png_folder(out: Path, seeds: Sequence[int], times: Sequence[float], shape: tuple[int, int, int]) -> Iterator[Add]:
    names = [f"{moment:.2f}" for moment in times]
    if len(set(names)) < len(names):  # two decimals are not enough
        names = [repr(float(moment)) for moment in times]
    if len(set(names)) < len(names):
        raise ValueError(f"times must differ, because each is written to its own file, got {list(times)}")

    def save(images: Tensor, part: Sequence[int]) -> None:
        for name, row in zip(names, images, strict=True):
            suffix = f"-t{name}" if len(times) > 1 else ""
            for seed, image in zip(part, row, strict=True):
                save_png(image, out / f"seed{seed:06d}{suffix}.png", durable=False)

    out.mkdir(parents=True, exist_ok=True)
    remove_stale(out, ".seed*.png-")
    with _encoders() as submit:
        start = 0

        def add(images: Tensor) -> None:
            nonlocal start
            for some in images.split(16, dim=1):
                submit(save, some, seeds[start : start + some.shape[1]])
                start += some.shape[1]

        yield add


@contextmanager
def _encoders() -> Iterator[Callable[..., Future[Any]]]:
    """Yield the `submit` of a pool of threads, which blocks while the queue is long.

    Threads are sufficient, because Pillow releases the interpreter's lock while it encodes.
    """
    threads = available_cores()
    waiting: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(threads) as pool:

        def submit(function: Callable[..., Any], *args: Any) -> Future[Any]:
            while len(waiting) >= 16 * threads:
                waiting.popleft().result()
            waiting.append(pool.submit(function, *args))
            return waiting[-1]

        try:
            yield submit
            for future in waiting:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _grid(out: Path, seeds: Sequence[int], times: Sequence[float], shape: tuple[int, int, int]) -> Iterator[Add]:
    batches: list[Tensor] = []
    yield batches.append
    images = torch.cat(batches, dim=1)
    columns = len(times) if len(times) > 1 else None
    cells = images.transpose(0, 1).flatten(0, 1)  # image by image, with the times of each side by side
    save_png(make_grid(cells, columns=columns, scale=display_scale(shape[-1])), out)


@contextmanager
def _npz(out: Path, seeds: Sequence[int], times: Sequence[float], shape: tuple[int, int, int]) -> Iterator[Add]:
    channels, height, width = shape
    size = (len(times), len(seeds), height, width, channels)
    # Images are first written to an unnamed file, which disappears if the process is killed. It can be written in any
    # order, which is needed because the leading axis holds the times.
    with atomic_path(out) as scratch, tempfile.TemporaryFile(dir=out.parent) as file:
        array: Any = np.memmap(file, np.uint8, "w+", shape=size) if 0 not in size else np.empty(size, np.uint8)
        # If the disk is full, this raises an error. Writing to mapped memory would kill the process instead.
        if hasattr(os, "posix_fallocate") and array.size:
            os.posix_fallocate(file.fileno(), 0, array.size)
        start = 0

        def add(images: Tensor) -> None:
            nonlocal start
            array[:, start : start + images.shape[1]] = images.movedim(-3, -1).numpy()
            start += images.shape[1]

        yield add
        if start != len(seeds):
            raise ValueError(f"expected {len(seeds)} images, got {start}")
        values = {
            "images": array if len(times) > 1 else array[0],
            "seeds": np.array(seeds, dtype=np.int64),
            "t": np.array(times, dtype=np.float64),
        }
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, value in values.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:  # as in NumPy's savez
                    np.lib.format.write_array(entry, value)


@contextmanager
def _parquet(out: Path, seeds: Sequence[int], times: Sequence[float], shape: tuple[int, int, int]) -> Iterator[Add]:
    import datasets
    import pyarrow
    from pyarrow import parquet

    features = {"image": datasets.Image(), "seed": datasets.Value("int64"), "t": datasets.Value("float64")}
    schema = datasets.Features(features).arrow_schema
    start = 0
    with (
        _encoders() as submit,
        atomic_path(out) as scratch,
        parquet.ParquetWriter(scratch, schema, compression="none") as file,  # PNGs are compressed
    ):
        written: deque[tuple[Future[list[bytes]], Sequence[int]]] = deque()

        def write_one() -> None:
            encoded, part = written.popleft()
            columns = {
                "image": [{"bytes": data, "path": None} for data in encoded.result()],
                "seed": [seed for seed in part for _ in times],
                "t": [moment for _ in part for moment in times],
            }
            file.write_table(pyarrow.table(columns, schema=schema))

        def add(images: Tensor) -> None:
            nonlocal start
            part = seeds[start : start + images.shape[1]]
            start += images.shape[1]
            # Image by image, with the times of each one after the other.
            written.append((submit(_encode, images.transpose(0, 1).flatten(0, 1)), part))
            if len(written) > available_cores():
                write_one()

        yield add
        while written:
            write_one()


def _encode(images: Tensor) -> list[bytes]:
    """Encode uint8 [N, C, H, W] as N PNG files."""
    files = []
    for picture in to_pil(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        files.append(buffer.getvalue())
    return files
