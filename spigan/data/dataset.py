"""`open_dataset` and `ImageDataset`: square uint8 images of one size, all of them checked when the data are opened.

Images stay uint8 until the training step. Every error about an image names the image: "photos/a.png",
"photos.zip!a.png" or "train.parquet row 17" (rows are counted from 0).
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spigan.data import limits
from spigan.data.config import DataConfig, source_name
from spigan.data.decode import ImageReader
from spigan.data.skip import Kept, find_broken
from spigan.data.sources.base import READING, Source, require
from spigan.data.sources.find import NAMES, find_source
from spigan.data.sources.names import describe
from spigan.data.workers import available_cores
from spigan.files import printable, shorten, user_path

_SAMPLED = 128  # images whose pixels `ImageDataset.sample` compares


class ImageDataset(torch.utils.data.Dataset[Tensor]):
    """Square images of one size: `dataset[i]` is uint8 [C, H, W] in 0..255. Usually created by `open_dataset`.

    Args:
        source: where the images are stored.
        config: how to turn the images into squares, and whether to keep them decoded.
        progress: whether to show a progress bar while the images are checked, if that takes over 2 s.
        skipped: indices of images to leave out, as a run recorded them. None: find them if `config.skip` is set.
        reading: version of the rules by which the source chose the images.

    Attributes:
        name: short name of the source.
        resolution: H = W in pixels.
        channels: C, 1 or 3.
        workers: number of processes in which `loader` decodes images that are not cached.
        description: facts that a run records about its data, as plain JSON values.
        left_out: what the source does not read: numbers of files by a short description.
        skipped: indices of images that `config.skip` leaves out.
        reading: version of the rules by which the source chose the images.

    Raises:
        ValueError: if an image is damaged, has more than 8 bits per channel or several frames, is transparent, or
            differs from the others. The message names the image.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        progress: bool = True,
        skipped: Sequence[int] | None = None,
        reading: int = READING,
    ) -> None:
        self.left_out: dict[str, int] = getattr(source, "left_out", {})
        self.reading = reading
        if skipped is None:
            skipped = find_broken(source, config, progress) if config.skip else []
        self.skipped = list(skipped)
        if self.skipped:
            source = Kept(source, self.skipped)
        self._count = len(source)
        self.name = source_name(config)
        self.workers = min(8, available_cores()) if config.workers is None else config.workers
        reader = ImageReader(source, config)
        with reader.opened(0) as first:
            self.resolution, self.channels = reader.require_like(first)
            # Threads compete for the GIL on tiny images: 50,000 CIFAR-10 PNGs took 3.9 s in a plain loop and 7 s in a
            # pool of two, 560 JPEGs of 256 x 256 0.30 s and 0.16 s (2 cores, Pillow 13.0). They break even at 64 x 64.
            threads = min(8, available_cores()) if first.width * first.height >= 64 * 64 else 1
        shape = (self._count, self.channels, self.resolution, self.resolution)
        self._data: Tensor | ImageReader  # the decoded images [N, C, H, W], or what decodes them on demand
        if config.cache == "memory" or (config.cache == "auto" and math.prod(shape) <= limits.CACHE_BYTES):
            self._data = torch.empty(shape, dtype=torch.uint8)
            pixels = self._data.numpy()
            width, height = self._for_all(
                lambda index: reader.read(index, pixels[index]), threads, "decoding", progress
            )
        else:  # a bad image must stop a run at its start, not after hours
            self._data = reader
            look = reader.decoded_size if config.check else reader.stored_size
            width, height = self._for_all(look, threads, "checking", progress)
        self.description: dict[str, Any] = {
            "source": config.source,
            "split": config.split,
            "count": self._count,
            "resolution": self.resolution,
            "channels": self.channels,
            "resize": config.resize,
            "crop": config.crop,
            "native_width": width,
            "native_height": height,
        }

    @property
    def cached(self) -> bool:
        """Whether all decoded images are kept in memory. If not, `dataset[i]` decodes the image."""
        return isinstance(self._data, Tensor)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the data.

        If the images are cached, it covers their count, shape and pixels. Otherwise it covers the description and the
        source's `identity`. For files, the identity consists of sizes, and of names relative to the source, so that a
        folder keeps its fingerprint when it is moved.
        """
        if isinstance(self._data, Tensor):
            sha = hashlib.sha256(repr(tuple(self._data.shape)).encode())
            sha.update(self._data.numpy().reshape(-1).data)
        else:
            facts = {key: value for key, value in self.description.items() if key != "source"}
            sha = hashlib.sha256(json.dumps(facts).encode())
            for part in self._data.source.identity():
                sha.update(part)
        return sha.hexdigest()

    @cached_property
    def sample(self) -> list[str | None]:
        """Digests of the pixels of up to 128 images, evenly spread over the data; None for one that cannot be read.

        If images are not cached, the fingerprint knows only names and sizes. This tells whether other images have the
        same names and sizes, and whether images are the same although their files are not.
        """
        indices = np.unique(np.linspace(0, self._count - 1, min(_SAMPLED, self._count)).astype(np.int64))
        digests: list[str | None] = []
        for index in indices.tolist():
            try:
                digests.append(hashlib.sha256(self.images([index]).numpy().tobytes()).hexdigest()[:16])
            except ValueError:
                digests.append(None)
        return digests

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Return a copy of image `index` (negative indices count from the end), uint8 [C, H, W].

        Raises:
            IndexError: if there is no such image.
            ValueError: if the image is not cached and has become unreadable. The message names it.
        """
        return self.images([range(self._count)[index]])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self._count))

    def images(self, indices: Sequence[int]) -> Tensor:
        """Return the images with these indices, each in 0..N-1, as uint8 [B, C, H, W].

        Raises:
            ValueError: if an image is not cached and has become unreadable. The message names it.
        """
        if isinstance(self._data, Tensor):
            # Not images[indices], which takes 2.7 ms instead of 0.2 ms for 512 CIFAR-10 images (2 cores, PyTorch 2.13).
            return self._data.index_select(0, torch.tensor(indices, dtype=torch.int64))
        batch = np.empty((len(indices), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        for pixels, index in zip(batch, indices, strict=True):
            self._data.read(index, pixels)
        return torch.from_numpy(batch)

    __getitems__ = images  # the name under which DataLoader asks for a batch

    def _for_all(
        self, function: Callable[[int], tuple[int, int]], threads: int, what: str, progress: bool
    ) -> tuple[list[int], list[int]]:
        """Call `function` for every index. Return [smallest, largest] for the widths and heights that it returns."""
        from tqdm import tqdm

        def some(start: int) -> list[tuple[int, int]]:  # one task per image would cost more than a small image
            return [function(index) for index in range(start, min(start + 64, self._count))]

        width, height = [sys.maxsize, 0], [sys.maxsize, 0]
        starts = range(0, self._count, 64)
        with (
            ThreadPoolExecutor(threads) as pool,  # does not start threads before it is used
            tqdm(total=self._count, desc=f"{what} {self.name}", unit="img", delay=2, disable=not progress) as bar,
        ):
            for part in pool.map(some, starts) if threads > 1 else map(some, starts):
                for extent, values in zip((width, height), zip(*part, strict=True), strict=True):
                    extent[:] = min(extent[0], *values), max(extent[1], *values)
                bar.update(len(part))
        return width, height


def open_dataset(
    config: DataConfig, *, progress: bool = True, skipped: Sequence[int] | None = None, reading: int = READING
) -> ImageDataset:
    """Open the images that `config.source` names, and check all of them.

    A warning says what the source does not read, and which images `config.skip` leaves out.

    Args:
        config: which images to open, and how to turn them into squares.
        progress: whether to show a progress bar if this takes over 2 s.
        skipped: indices of images to leave out. None: find them if `config.skip` is set.
        reading: version of the rules that choose the images; 1 is that of runs which record none.

    Raises:
        FileNotFoundError: if the source does not exist.
        ModuleNotFoundError: if a package that the source needs is not installed.
        ValueError: if the source is of an unknown kind, lacks the split or column, or has no images; or if an image is
            damaged, has more than 8 bits per channel or several frames, is transparent, or differs from the others. The
            message names the file.
    """
    require("PIL.Image", "pillow")  # otherwise a missing Pillow would be reported as an error of the first image
    source = find_source(config, progress, reading)
    try:
        dataset = ImageDataset(source, config, progress=progress, skipped=skipped, reading=reading)
    except ValueError as error:  # about one image, and there may be more
        raise ValueError(
            f"{error} (`spigan data check` lists all such images; data.skip=true, or `spigan data convert "
            "--skip-broken`, leaves them out)"
        ) from error
    if dataset.left_out:
        warnings.warn(f"{dataset.name} has files that are left out: {describe(dataset.left_out)}", stacklevel=2)
    smallest = min(dataset.description["native_width"][0], dataset.description["native_height"][0])
    if smallest < dataset.resolution and config.source not in NAMES:
        warnings.warn(
            f"images of {dataset.name} are enlarged to {dataset.resolution} x {dataset.resolution}: the smallest side "
            f"has {smallest} pixels",
            stacklevel=2,
        )
    if dataset.skipped:
        names = ", ".join(printable(source.name(index)) for index in dataset.skipped[:5])
        more = f" and {len(dataset.skipped) - 5} more" if len(dataset.skipped) > 5 else ""
        warnings.warn(f"data.skip leaves out {len(dataset.skipped)} images: {names}{more}", stacklevel=2)
    return dataset


def open_for_model(
    config: DataConfig, resolution: int, channels: int, *, progress: bool = True, record: dict[str, Any] | None = None
) -> ImageDataset:
    """Open images at the resolution of a model, and check that they have its channels.

    Args:
        config: which images, and how they become squares.
        resolution: of the model.
        channels: of the model.
        progress: show a progress bar if this takes over 2 s.
        record: what a run recorded about its images (see `data_record`), which these must be.

    Raises:
        ValueError: `config` sets another resolution, the images have other channels or are not those of the record, or
            as `open_dataset`.
    """
    if config.resolution not in (None, resolution):
        raise ValueError(
            f"data.resolution is {config.resolution}, but the model makes images of {resolution} x {resolution}: "
            "leave it out; images of another size are resized with the filter data.resize"
        )
    config = config.model_copy(update={"resolution": resolution})
    if record is None:
        dataset = open_dataset(config, progress=progress)
    else:
        dataset = open_dataset(config, progress=progress, **recorded_options(record))
        check_record(dataset, record)
    if dataset.channels != channels:
        raise ValueError(
            f"{config.source!r} has images of {dataset.channels} channel(s), but the model makes {channels}: set "
            f"data.channels to {channels} to convert them (spigan evaluate: --channels {channels}; spigan train: --set "
            f"data.channels={channels}), or use a model of {dataset.channels}"
        )
    return dataset


# ---- What a run records ----


def data_record(dataset: ImageDataset, config: DataConfig) -> dict[str, Any]:
    """Return what a run records about its images, as plain JSON values."""
    path = user_path(config.source)
    return {
        **dataset.description,
        **({"path": str(path.resolve())} if path.exists() and config.source not in NAMES else {}),
        "reading": dataset.reading,
        "skipped": dataset.skipped,
        "left_out": dataset.left_out,
        "cached": dataset.cached,
        "sample": dataset.sample,
        "fingerprint": dataset.fingerprint,
    }


def recorded_options(record: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `open_dataset` that make it choose the images of a record."""
    reading, skipped = record.get("reading", 1), record.get("skipped", [])
    if reading not in range(1, READING + 1) or not isinstance(skipped, list):
        raise ValueError(f"the run's data.json has the reading {shorten(reading)}; this version knows 1 to {READING}")
    if not all(isinstance(index, int) and 0 <= index < 2**62 for index in skipped):
        raise ValueError("the run's data.json is damaged: `skipped` must be a list of indices")
    return {"reading": reading, "skipped": skipped}


def check_record(dataset: ImageDataset, record: dict[str, Any]) -> None:
    """Check that images are those of a record. Warn if they are, but their files have changed.

    Raises:
        ValueError: if they are others.
    """
    source, sample = dataset.description["source"], record.get("sample")
    same = record.get("fingerprint") == dataset.fingerprint
    if same and sample is None:  # of an earlier version
        return
    if not isinstance(sample, list):
        raise ValueError(
            f"the images of {source!r} are not those that the run was trained on (see its data.json), or it kept "
            "decoded images in memory and does not now, or the other way round (data.cache): an exact resume is not "
            "possible. Restore the images or data.cache, or start a new run"
        )
    count = record.get("count")
    pairs = list(zip(sample, dataset.sample, strict=False))
    changed = sum(None not in pair and pair[0] != pair[1] for pair in pairs)
    if count != len(dataset) or len(sample) != len(dataset.sample) or changed:
        what = f"{changed} of {len(pairs)} compared images differ" if count == len(dataset) else ""
        what = what or f"there are {len(dataset)}, and there were {count}"
        raise ValueError(
            f"the images of {source!r} are not those that the run was trained on ({what}; see its data.json): an exact "
            "resume is not possible. Restore the images, or start a new run"
        )
    # Decoded images have a fingerprint of another kind.
    if not same and record.get("cached") == dataset.cached:
        warnings.warn(
            f"files of {source!r} have changed since the run began, but the {len(pairs)} compared images are the same: "
            "the run continues, but not exactly as it would have",
            stacklevel=2,
        )
