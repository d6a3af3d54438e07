"""Images for training: uint8 tensors from folders, zips, parquet, LMDB, tar shards, the CIFAR-10 archive or the hub.

`open_dataset` finds out what a source is and checks every image once; `loader` yields shuffled batches for ever, in an
order that depends on the seed and on the number of images seen so far alone, so that a resumed run sees the very images
it would have seen. Images stay uint8 until the training step. Every error about an image names its file:
"photos/a.png", "photos.zip!a.png" or "train.parquet row 17" (rows count from 0).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import os
import pickletools
import re
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CACHE_BYTES = 2 << 30  # cache="auto" keeps a set decoded in memory up to this size, and parquet files encoded
ROW_GROUP_BYTES = 4 << 20  # parquet files beyond that are read in place where their row groups are not larger
MAX_COLUMN_BYTES = 2 * CACHE_BYTES  # of images of a parquet file in memory: what is larger has a footer that lies
MAX_PIXELS = 1 << 26  # of one image as stored (8192 x 8192): what claims to be larger is taken for a decompression bomb
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# The same kinds as Pillow calls them. It must never try others (EPS would start Ghostscript) on data from anywhere.
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
CIFAR_ARCHIVE, CIFAR_BATCH = 1 << 28, 1 << 25  # more bytes than they have: 186 MB unpacked and 31 MB
CIFAR_IMAGES, CIFAR_VALUES = 10_000, 3_072  # in a batch; in an image: channel, row, column
CIFAR_IMPORTS = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}  # what rebuilding an array takes
PICKLE_LENGTH = 1_000_000  # instructions; a batch has some 50,000
PICKLE_IMPORTS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # the instructions that can name a function
SPLIT_FOLDERS = {"train", "test", "val", "valid", "validation"}


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which images to train on, and how they become squares of one size."""

    source: str = Field(
        min_length=1,
        description='"digits" (bundled with scikit-learn), "cifar10" (from the hub), a path, or a hub id such as '
        '"uoft-cs/cifar10". A path is a folder or zip of images, a parquet file, a folder of parquet files, an LMDB '
        "folder (LSUN's), a tar file or a folder of them (WebDataset's), cifar-10-python.tar.gz or its extracted "
        "folder. A local folder called digits is ./digits.",
    )
    split: str = Field(
        "train",
        min_length=1,
        description="Part of the source. It chooses among parquet files by name (train-00000-of-00003.parquet), among "
        "tar files (train-000000.tar) and the top folders of an image folder or zip where they are all called train, "
        "test, val, valid or validation, and among the splits of CIFAR-10 and of hub datasets. Other sources are all "
        "train.",
    )
    resolution: int | None = Field(
        None, gt=0, description="Side of the square images in pixels. None: as stored, where all must be the same."
    )
    channels: Literal[1, 3] | None = Field(
        None,
        description="1 (grey) or 3 (RGB) converts every image; transparent ones are laid on white. None: as stored, "
        "where all must be the same and none may have an alpha channel. Palette images count as RGB.",
    )
    resize: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = Field(
        "lanczos", description="Filter (Pillow's, antialiased) used where an image is not of the resolution already."
    )
    crop: Literal["center", "none"] = Field(
        "center", description="center: cut out the largest centred square first. none: an image not square is an error."
    )
    column: str | None = Field(
        None,
        description="Column that holds the images, for parquet and the hub; for tar files the images' extension, all "
        "after the first dot of their names. None: the only one.",
    )
    cache: Literal["auto", "memory", "none"] = Field(
        "auto",
        description="memory: decode every image once and keep it. none: check every header once, decode on demand. "
        "auto: memory where that takes at most 2 GiB.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Processes that decode while the model trains, where images are not kept decoded. No image depends "
        "on it. None: one for each CPU core, at most 8.",
    )


class ImageDataset(torch.utils.data.Dataset[Tensor]):
    """Square images of one size: `dataset[i]` is uint8 [C, H, W] in 0..255. Made by `open_dataset`.

    Attributes:
        name: short name of the source.
        resolution: H = W in pixels.
        channels: C, 1 or 3.
        cached: whether all images are decoded in memory (else `dataset[i]` decodes).
        workers: processes in which `loader` decodes where they are not.
        description: what a run records about its data; plain JSON values.
        fingerprint: sha256 (hex) of the data. Cached: of count, shape and pixels. Otherwise: of the description, and of
            file names and sizes relative to the source, so that a moved folder keeps its fingerprint.
    """

    def __init__(self, source: _Source, config: DataConfig, *, progress: bool = True, check: bool = True) -> None:
        self._source, self._config = source, config
        self._images: Tensor | None = None  # [N, C, H, W] where cached
        self._count = len(source)
        self.name = re.sub(r"\.(zip|parquet|tar|tar\.gz|tgz)$", "", Path(config.source).resolve().name)
        self.workers = min(8, _cores()) if config.workers is None else config.workers
        # 0: not known yet, `_check` lets the first image have any.
        self.resolution, self.channels = (0, 0) if check else (config.resolution or 0, config.channels or 0)
        if not check:  # spigan.convert goes through all images itself; there is no description then
            return
        with self._opened(0) as first:
            self.resolution = config.resolution or min(first.size)
            self.channels = config.channels or _channels(first)
            # Threads fight over the GIL on tiny images: 50,000 CIFAR-10 PNGs took 3.9 s in a plain loop and 7 s in a
            # pool of two, 560 JPEGs of 256 x 256 0.30 s and 0.16 s (2 cores, Pillow 13.0). They break even at 64 x 64.
            threads = min(8, _cores()) if first.width * first.height >= 64 * 64 else 1
        shape = (self._count, self.channels, self.resolution, self.resolution)
        if config.cache == "memory" or (config.cache == "auto" and math.prod(shape) <= CACHE_BYTES):
            self._images = torch.empty(shape, dtype=torch.uint8)
            width, height = self._for_all(self._decode_into(self._images.numpy()), threads, "decoding", progress)
            del self._source  # what is encoded is not needed any more
        else:  # a wrong image must end a run at its start, not after hours
            width, height = self._for_all(self._native_size, threads, "checking", progress)
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
        return self._images is not None

    @cached_property
    def fingerprint(self) -> str:
        if self._images is not None:
            sha = hashlib.sha256(repr(tuple(self._images.shape)).encode())
            sha.update(self._images.numpy().reshape(-1).data)
        else:
            facts = {key: value for key, value in self.description.items() if key != "source"}
            sha = hashlib.sha256(json.dumps(facts).encode())
            for part in self._source.identity():
                sha.update(part)
        return sha.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        """Image `index` (negative ones count from the end), uint8 [C, H, W]; the caller's own copy."""
        return self.__getitems__([range(self._count)[index]])[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(self._count))

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """The images of `indices`, each in 0..N-1, as uint8 [B, C, H, W]. DataLoader calls this for a whole batch."""
        if self._images is not None:
            # Not images[indices]: 2.7 ms instead of 0.2 ms for 512 CIFAR-10 images (2 cores, PyTorch 2.13).
            return self._images.index_select(0, torch.tensor(indices, dtype=torch.int64))
        batch = np.empty((len(indices), self.channels, self.resolution, self.resolution), dtype=np.uint8)
        for pixels, index in zip(batch, indices, strict=True):
            self._decode(index, pixels)
        return torch.from_numpy(batch)

    def _decode_into(self, images: np.ndarray) -> Callable[[int], tuple[int, int]]:
        return lambda index: self._decode(index, images[index])

    def _decode(self, index: int, out: np.ndarray) -> tuple[int, int]:
        """Writes image `index` to `out`, uint8 [C, H, W]; returns its width and height as stored."""
        with self._opened(index) as image:
            size = image.size
            pixels = np.asarray(self._squared(image))
            out[:] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        return size

    def _native_size(self, index: int) -> tuple[int, int]:
        with self._opened(index) as image:
            return image.size

    def _squared(self, image: Image.Image) -> Image.Image:
        """The image upright, in this dataset's channels, a square of its resolution."""
        from PIL import Image, ImageOps

        ImageOps.exif_transpose(image, in_place=True)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        mode = "L" if self.channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        side = min(image.size)
        if image.size != (side, side):
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if side != self.resolution:
            image = image.resize((self.resolution,) * 2, Image.Resampling[self._config.resize.upper()])
        return image

    @contextmanager
    def _opened(self, index: int) -> Iterator[Image.Image]:
        """Image `index` with its header checked and its pixels not decoded yet. Any error within names the image."""
        try:
            with self._source.open(index) as image:
                self._check(image)
                yield image
        except _Unsuitable as error:
            raise ValueError(f"{self._source.name(index)} {error}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            raise ValueError(
                f"{self._source.name(index)} cannot be read as an image ({type(error).__name__}: {error}): "
                "repair it or take it out"
            ) from error

    def _check(self, image: Image.Image) -> None:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _Unsuitable(f"has {width} x {height} pixels; at most {MAX_PIXELS} are accepted: make it smaller")
        # A camera's MPO is a photograph with a second view or a preview behind it.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise _Unsuitable("holds several frames; expected one image: save its frames as files, or take it out")
        # Pillow opens 16-bit RGB as 8-bit RGB without a word; the decoder's raw mode ("RGB;16B") still tells.
        if image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            raise _Unsuitable(
                "has more than 8 bits a channel; expected 8: convert it first, choosing how values are scaled"
            )
        if self._config.channels is None:
            if image.has_transparency_data:
                raise _Unsuitable("has an alpha channel: give channels=3 (or 1) to lay transparent images on white")
            if self.channels not in (0, _channels(image)):
                kinds = {1: "grey", 3: "RGB"}
                raise _Unsuitable(
                    f"is {kinds[_channels(image)]} but {self._source.name(0)} is {kinds[self.channels]}: "
                    "give channels=3 (or 1) to convert all images"
                )
        if self._config.crop == "none" and width != height:
            raise _Unsuitable(f'has {width} x {height} pixels, not a square: give crop="center", or crop it yourself')
        if self._config.resolution is None and self.resolution not in (0, min(width, height)):
            raise _Unsuitable(
                f"has {width} x {height} pixels but {self._source.name(0)} makes a square of {self.resolution}: "
                "give a resolution to resize all images to"
            )

    def _for_all(
        self, function: Callable[[int], tuple[int, int]], threads: int, what: str, progress: bool
    ) -> tuple[list[int], list[int]]:
        """[least, most] width and height of function(i) of every i, with a progress bar where it takes over 2 s."""
        from tqdm import tqdm

        def some(start: int) -> list[tuple[int, int]]:  # a task for each image would cost more than a small image
            return [function(index) for index in range(start, min(start + 64, self._count))]

        width, height = [sys.maxsize, 0], [sys.maxsize, 0]
        starts = range(0, self._count, 64)
        with (
            ThreadPoolExecutor(threads) as pool,  # starts no thread before it is used
            tqdm(total=self._count, desc=f"{what} {self.name}", unit="img", delay=2, disable=not progress) as bar,
        ):
            for part in pool.map(some, starts) if threads > 1 else map(some, starts):
                for limits, values in zip((width, height), zip(*part, strict=True), strict=True):
                    limits[:] = min(limits[0], *values), max(limits[1], *values)
                bar.update(len(part))
        return width, height


def open_dataset(config: DataConfig, *, progress: bool = True) -> ImageDataset:
    """Opens `config.source` and checks all of its images; shows a bar when that takes long, unless `progress` is False.

    Raises FileNotFoundError where the source does not exist, ModuleNotFoundError where reading it needs a package that
    is not installed, and ValueError, naming the file, for everything else: an unknown kind of source, a missing split
    or column, no images at all, an image that is corrupt, of more than 8 bits, animated, transparent or unlike the
    others.
    """
    _require("PIL.Image", "pillow")  # else its absence would be reported as an error of the first image
    return ImageDataset(_find(config, progress), config, progress=progress)


class InfiniteShuffle(torch.utils.data.Sampler[list[int]]):
    """Batches of indices without end, epoch after epoch of shuffled images; a batch may reach into the next epoch.

    The permutation of an epoch comes from (seed, epoch) alone. So the batches that follow `start` images are the same
    whether the images before were drawn in this process, in another, or not at all.

    Args:
        count: number of images, at least 1.
        batch_size: indices in a batch, at least 1; may exceed `count`.
        seed: not negative.
        start: images consumed already, not negative.
        part: which indices of each batch to yield; default: all.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, start: int = 0, part: slice = slice(None)) -> None:
        for name, value, least in (
            ("count", count, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("start", start, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        self.count, self.batch_size, self.seed, self.start, self.part = count, batch_size, seed, start, part

    def permutation(self, epoch: int) -> np.ndarray:
        """The order of the images in `epoch` (from 0), int64 [count]."""
        # Of all generators, RandomState's stream is the one promised never to change between versions (NumPy's NEP 19).
        seeds = np.random.SeedSequence((self.seed, epoch))
        return np.random.RandomState(np.random.MT19937(seeds)).permutation(self.count)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.count)
        order = self.permutation(epoch)
        while True:
            batch = order[position : position + self.batch_size].tolist()
            position += len(batch)
            while len(batch) < self.batch_size:
                epoch += 1
                order = self.permutation(epoch)
                position = min(self.batch_size - len(batch), self.count)
                batch += order[:position].tolist()
            yield batch[self.part]


def loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    part: slice = slice(None),
    num_workers: int | None = None,
) -> Iterator[Tensor]:
    """Shuffled batches for ever, uint8 [batch_size, C, H, W], in pinned memory where CUDA is available.

    `seed`, `start` (images consumed already) and `part` are those of `InfiniteShuffle`. `num_workers` changes no image;
    None: no workers for a cached dataset, those of its configuration for one that decodes. torch's global generator is
    not touched.
    """
    if num_workers is None:
        num_workers = 0 if dataset.cached else dataset.workers
    batches = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=InfiniteShuffle(len(dataset), batch_size, seed=seed, start=start, part=part),
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # without one, the workers' base seed is drawn from the global generator
        worker_init_fn=_start_worker,
    )
    return start_workers(batches)


def start_workers(batches: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    """iter(batches), whose workers begin with `_start_worker`."""
    if not hasattr(signal, "sigtimedwait"):
        return iter(batches)
    # Workers inherit the mask, and so do threads that libraries start in them before `_start_worker` comes.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:  # a named function, because workers may have to unpickle it
    return batch


def _start_worker(worker: int) -> None:
    """What every DataLoader's worker begins with: the process that started it ends it, and nobody else.

    Terminals, torchrun and batch systems send SIGINT and SIGTERM to the workers too: without them that process could
    not finish what it does before it stops. DataLoader's own watch on it ends the loop of a worker, which then waits
    for ever for somebody to read its last results.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = getattr(signal, "sigtimedwait", None)  # Linux: only this tells who has sent a signal
    if told is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer, parent = multiprocessing.parent_process(), os.getppid()  # which a fork server may be
    assert trainer is not None

    def watch() -> None:
        while os.getppid() == parent:
            if told is None:
                time.sleep(1)
            elif (sent := told({signal.SIGTERM}, 1)) is not None and sent.si_pid == trainer.pid:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


class _Unsuitable(Exception):
    """What is wrong with an image and what to do, as the rest of a sentence that starts with its name."""


class _Source(Protocol):
    """A sequence of encoded images. It must survive pickling and forking, to be read in DataLoader's workers."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What errors call image `index`."""

    def open(self, index: int) -> Image.Image:
        """Image `index`, its header read; a new object that its caller closes."""

    def identity(self) -> Iterator[bytes]:
        """What tells this source's data from others' without decoding it."""


class _Array:
    """Images decoded already: `images` uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, title: str, images: np.ndarray) -> None:
        self._title, self._images = title, images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"

    def open(self, index: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self._images[index])

    def identity(self) -> Iterator[bytes]:
        yield np.ascontiguousarray(self._images).tobytes()


class _Folder:
    """Image files: `names` relative to `root`, with forward slashes."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._root / self._names[index])

    def open(self, index: int) -> Image.Image:
        return _open_image(self._root / self._names[index])

    def identity(self) -> Iterator[bytes]:
        for name in self._names:
            yield f"{name}\0{(self._root / name).stat().st_size}\0".encode()


class _Zip:
    """Members of a zip file, read in place."""

    def __init__(self, path: Path, members: list[zipfile.ZipInfo]) -> None:
        self._path, self._members = path, members
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # and the process that opened it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        return f"{self._path}!{self._members[index].filename}"

    def open(self, index: int) -> Image.Image:
        # A forked worker shares the position in its parent's open file, so it needs a file of its own.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._path)
        member = self._members[index]
        if member.file_size > 4 * MAX_PIXELS:  # no image within the limit needs more
            raise _Unsuitable(
                f"unpacks to {member.file_size} bytes; at most {4 * MAX_PIXELS} are accepted: make it smaller"
            )
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Python unpacks a member of bzip2 or LZMA whole, whatever its size: 200 bytes may fill the memory.
            raise _Unsuitable("is not packed by deflate, the usual method of zip files: make the zip file again")
        data = io.BytesIO()
        with self._archive[1].open(member) as packed:
            shutil.copyfileobj(packed, data, 1 << 14)  # its read() would unpack all there is before it counts
        data.seek(0)
        return _open_image(data)

    def identity(self) -> Iterator[bytes]:
        for member in self._members:
            yield f"{member.filename}\0{member.file_size}\0{member.CRC}\0".encode()


class _Rows:
    """Rows of Arrow columns, one column for each file: binary, or {bytes, path} as the hub stores images.

    `paths`: a path is that of a file to be opened, as in sets downloaded from the hub; a parquet file's names nothing.
    """

    def __init__(self, columns: list[tuple[str, Any]], *, paths: bool = False) -> None:
        self._columns, self._paths = columns, paths
        self._ends = list(accumulate(len(column) for _, column in columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[str, Any, int]:
        part = bisect_right(self._ends, index)
        title, column = self._columns[part]
        return title, column, index - (self._ends[part] - len(column))

    def name(self, index: int) -> str:
        title, _, row = self._locate(index)
        return f"{title} row {row}"

    def open(self, index: int) -> Image.Image:
        _, column, row = self._locate(index)
        return _open_row(column[row].as_py(), self._paths)

    def identity(self) -> Iterator[bytes]:
        for title, column in self._columns:
            yield f"{Path(title).name}\0{len(column)}\0{column.nbytes}\0".encode()


def _find(config: DataConfig, progress: bool) -> _Source:
    """Finds out what kind of source it is."""
    from spigan.data import shards  # which builds on this module

    source, split = config.source, config.split
    if source == "digits":
        return _digits(split)
    if source == "cifar10":
        return _hub("uoft-cs/cifar10", split, config.column)
    path = user_path(source)
    if path.is_dir():
        if path.name == "cifar-10-batches-py" or (path / "data_batch_1").exists():
            return _cifar_archive(path, split)
        if any(path.glob("*.parquet")) or any(path.glob("data/*.parquet")):
            return _parquet(_shards(path, split), config.column)
        if (path / "data.mdb").is_file():
            return shards.LMDB(path)
        if any(path.glob("*.tar")):
            return shards.Tar(shards.tar_files(path, split), config.column, progress)
        return _folder(path, split)
    if path.is_file():
        if path.name.endswith((".tar.gz", ".tgz")) or path.name == "cifar-10-python.tar":
            return _cifar_archive(path, split)
        if path.suffix == ".tar":
            return shards.Tar([path], config.column, progress)
        if path.suffix == ".parquet":
            if split not in ("train", _split_of(path)):
                raise ValueError(f"{path} holds the split {_split_of(path)!r}, not {split!r}: give another file")
            return _parquet([path], config.column)
        if path.suffix == ".zip":
            return _zip(path, split)
        raise ValueError(
            f"{path} is no source of images: expected a folder, .zip, .parquet, .tar or cifar-10-python.tar.gz; "
            "for a single image give its folder"
        )
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and path.suffix not in (".zip", ".parquet", ".gz", ".tgz", ".tar"):
        return _hub(source, split, config.column)
    raise FileNotFoundError(
        f'source {source!r} does not exist: expected "digits", "cifar10", the path of a folder, .zip, .parquet, .tar '
        'or cifar-10-python.tar.gz, or a hub dataset id "owner/name"'
    )


def _digits(split: str) -> _Source:
    """1,797 grey 8 x 8 digits; 0..16 becomes 0..255."""
    if split != "train":
        raise ValueError(f'digits has no split {split!r}: all of it is "train"')
    digits = _require("sklearn.datasets", "scikit-learn").load_digits()
    return _Array("digits", np.rint(digits.images * (255 / 16)).astype(np.uint8))


def _folder(root: Path, split: str) -> _Source:
    def refuse(error: OSError) -> None:  # else os.walk leaves out what it may not read
        raise error

    names, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files]
        if os.path.realpath(folder) in seen:  # a link to a folder above would repeat its images for ever
            raise ValueError(f"{folder} links to a folder that is in {root} already: remove the link")
        seen.add(os.path.realpath(folder))
    return _Folder(root, _image_names(names, split, root))


def _zip(path: Path, split: str) -> _Source:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a zip file ({error}): copy or download it again") from error
    return _Zip(path, [members[name] for name in _image_names(list(members), split, path)])


def _image_names(names: list[str], split: str, where: Path) -> list[str]:
    """The images among `names`, sorted, of one split where there are splits."""
    shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    images = sorted(name for name in shown if name.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise ValueError(f"{where} has no images in it: expected files named *{', *'.join(IMAGE_SUFFIXES)}")
    tops = {name.split("/")[0] for name in images}
    if tops <= SPLIT_FOLDERS:
        images = [name for name in images if name.startswith(f"{split}/")]
    if not images or (split != "train" and not tops <= SPLIT_FOLDERS):
        found = f"its folders are {sorted(tops)}" if tops <= SPLIT_FOLDERS else "it has no split folders at its top"
        raise ValueError(
            f"{where} has no split {split!r}: {found}; give one of them, or the path of the images themselves"
        )
    return images


def _shards(root: Path, split: str) -> list[Path]:
    """The parquet files of one split, in order, none missing."""
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    shards = [file for file in files if _split_of(file) == split]
    if not shards:
        raise ValueError(
            f"{root} has no split {split!r}: its parquet files are of {sorted(set(map(_split_of, files)))}; "
            f"expected names such as {split}-00000-of-00001.parquet, or give the path of one file"
        )
    total = re.search(r"-of-(\d+)", shards[0].name)
    if total and int(total[1]) != len(shards):
        names = ", ".join(file.name for file in shards)
        raise ValueError(
            f"{root} should have {int(total[1])} parquet files of {split!r} but has {names}: add what is missing"
        )
    return shards


def _split_of(file: Path) -> str:
    """The split that a parquet file's name tells: "train" of train-00000-of-00003.parquet and of train.parquet."""
    return re.split(r"-\d+-of-\d+", file.stem)[0]


def _parquet(files: list[Path], column: str | None) -> _Source:
    # Up to CACHE_BYTES the encoded images are held in memory, by pyarrow rather than `datasets`: it reads the 50,000
    # encoded CIFAR-10 images in 0.3 to 0.7 s, imports included, against 1.2 s, and writes no second copy of the data to
    # the user's cache.
    arrow, parquet = _require("pyarrow", "pyarrow"), _require("pyarrow.parquet", "pyarrow")
    names, footers, size, groups = set(), [], 0, 0
    columns = []
    for file in files:
        try:
            with parquet.ParquetFile(file) as table:
                name = _image_column(table.schema_arrow, column, str(file))
                names.add(name)
                footers.append(table.metadata)
                size += _column_bytes(table.metadata, name)
                groups += table.metadata.num_row_groups
                if size <= CACHE_BYTES:
                    check_unpacked(table, name, range(table.num_row_groups))
                    images = table.read(columns=[name]).column(name)
                    if len(images) != table.metadata.num_rows:
                        raise arrow.ArrowInvalid(f"{len(images)} rows, {table.metadata.num_rows} by its footer")
                    columns.append((str(file), images))
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{file} cannot be read as a parquet file ({error}): copy or download it again") from error
    if not any(footer.num_rows for footer in footers):
        raise ValueError(f"{', '.join(map(str, files))} has no rows: expected images")
    if size <= CACHE_BYTES:
        return _Rows(columns)
    del columns
    if len(names) > 1:
        raise ValueError(f"{files[0].parent} has files whose images are in different columns: {sorted(names)}")
    if size <= groups * ROW_GROUP_BYTES:
        from spigan.data.shards import RowGroups

        return RowGroups(files, footers, name)
    # An image would cost the reading of a large row group. `datasets` writes an Arrow file to its cache, once, which is
    # mapped into memory.
    datasets = _require("datasets", "datasets")
    rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", columns=[name])
    return _Rows([(str(files[0].parent), rows.with_format("arrow")[:].column(name))])


def check_unpacked(table: Any, name: str, groups: Sequence[int]) -> None:
    """Raise ArrowInvalid where a column of row groups would take far more memory than is meant to be used for it.

    Footers may lie, and a few bytes may stand for any number of copies of a large value. So it is unpacked once, row by
    row: 0.3 s for the 50,000 images of CIFAR-10. Four rows at a time take 0.1 s, but twice the memory where values have
    600 MB.
    """
    from pyarrow import ArrowInvalid

    size = 0
    for rows in table.iter_batches(batch_size=1, row_groups=list(groups), columns=[name], use_threads=False):
        size += rows.nbytes
        if size > MAX_COLUMN_BYTES:
            raise ArrowInvalid(f"the column {name!r} unpacks to more than {MAX_COLUMN_BYTES} bytes")


def _column_bytes(footer: Any, name: str) -> int:
    """Bytes in memory of a column of a parquet file, as its footer tells."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{name}."))


def _hub(identifier: str, split: str, column: str | None) -> _Source:
    datasets = _require("datasets", "datasets")
    try:
        rows = datasets.load_dataset(identifier, split=split).with_format("arrow")[:]
    except Exception as error:  # no network, no such dataset, no such split: the hub's clients raise many kinds
        advice = (
            "check the name and split, or give a local path: a folder of images, a zip or a folder of parquet files"
        )
        if identifier == "uoft-cs/cifar10":
            advice = (
                "give a local path as source: cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
                "or a folder of the parquet files of https://huggingface.co/datasets/uoft-cs/cifar10"
            )
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(
            f"{identifier!r}, split {split!r}, is no local path and could not be loaded from the Hugging Face hub "
            f"({type(error).__name__}: {error}): {advice}"
        ) from error
    name = _image_column(rows.schema, column, identifier)
    if not len(rows):
        raise ValueError(f"{identifier}, split {split!r}, has no rows: expected images")
    return _Rows([(identifier, rows.column(name))], paths=True)


def _image_column(schema: Any, wanted: str | None, where: str) -> str:
    """The column of images in an Arrow schema: `wanted`, or the only one of {bytes, path} values."""
    types = _require("pyarrow", "pyarrow").types
    images = [
        field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    binary = [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]
    if wanted is None and len(images) == 1:
        return str(images[0])
    if wanted in images + binary:
        return str(wanted)
    problem = f"has {len(images)} columns of images" if wanted is None else f"has no column of images called {wanted!r}"
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{where} {problem}: give the name of one as `column`; it has {columns}")


def _cifar_archive(path: Path, split: str) -> _Source:
    """cifar-10-python.tar.gz or its extracted folder."""
    batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}.get(split)
    if batches is None:
        raise ValueError(f"{path} has no split {split!r}: the CIFAR-10 archive has train and test")
    read = _read_folder if path.is_dir() else _read_tar
    pickles = read(path, batches)
    missing = [name for name in batches if name not in pickles]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: expected the CIFAR-10 python archive, complete; download it again"
        )
    separator = "/" if path.is_dir() else "!"
    pixels = np.concatenate([_cifar_batch(pickles[name], f"{path}{separator}{name}") for name in batches])
    return _Array(str(path), pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_folder(path: Path, names: list[str]) -> dict[str, bytes]:
    files = {name: path / name for name in names}
    return {
        name: file.read_bytes() for name, file in files.items() if file.is_file() and file.stat().st_size < CIFAR_BATCH
    }


def _read_tar(path: Path, names: list[str]) -> dict[str, bytes]:
    """Members cifar-10-batches-py/{name}, in one pass, to memory alone."""
    found: dict[str, bytes] = {}
    try:
        with _unpacked(path) as data:
            for member in tar_members(data):
                folder, _, name = member.name.rpartition("/")
                if folder == "cifar-10-batches-py" and name in names and member.isreg() and member.size < CIFAR_BATCH:
                    data.seek(member.offset_data)
                    found[name] = data.read(member.size)
                    if len(found) == len(names):
                        break
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a tar archive ({error}): copy or download it again") from error
    return found


def _unpacked(path: Path) -> IO[bytes]:
    """The bytes in a file that may be compressed by gzip."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path.open("rb")
    with gzip.open(path) as packed:
        data = packed.read(CIFAR_ARCHIVE + 1)
    if len(data) > CIFAR_ARCHIVE:
        raise ValueError(f"it unpacks to more than {CIFAR_ARCHIVE} bytes")
    return io.BytesIO(data)


def tar_members(data: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Members of a tar file that is not compressed, in order; none of them is kept.

    Raises:
        tarfile.TarError: it is none, or damaged.
    """
    try:
        with tarfile.open(fileobj=data, mode="r:") as archive:
            end = -1
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # where all members would be kept
                if member.offset <= end or member.size < 0:  # a hostile size would lead back, and round in circles
                    raise tarfile.ReadError(f"the member at byte {member.offset} has a size of {member.size}")
                end = member.offset
                yield member
            data.seek(archive.offset)  # tarfile takes any block that is no header for the end
            if data.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (ValueError, OverflowError, RecursionError) as error:  # numbers that are none; headers about headers
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error


def _cifar_batch(data: bytes, name: str) -> np.ndarray:
    """The images in a batch of CIFAR-10, a pickle written by Python 2: uint8 [10000, 3072].

    Unpickling would execute whatever a file asks for. So its instructions are only listed, and the one string as long
    as the images is taken. Raises ValueError where there is no such string, or where they import anything but NumPy's
    array.
    """
    found = []
    try:
        previous = ""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == PICKLE_LENGTH:
                raise ValueError(f"it has more than {PICKLE_LENGTH} instructions")
            if opcode.name in PICKLE_IMPORTS and argument not in CIFAR_IMPORTS:
                raise ValueError(f"it would import {argument!r}, which no CIFAR-10 file does")
            # A Python 2 string, which pickletools shows as latin-1 text: one character for each byte.
            if opcode.name == "BINSTRING" and len(str(argument)) == CIFAR_IMAGES * CIFAR_VALUES:
                order: Literal["C", "F"] = (
                    "F" if previous == "NEWTRUE" else "C"
                )  # an array's state: ..., is_fortran, bytes
                flat = np.frombuffer(str(argument).encode("latin-1"), dtype=np.uint8)
                found.append(flat.reshape(CIFAR_IMAGES, CIFAR_VALUES, order=order))
            previous = opcode.name
        if len(found) != 1:
            raise ValueError(f"it holds {len(found)} arrays of {CIFAR_IMAGES} x {CIFAR_VALUES} bytes; expected one")
    except Exception as error:  # pickletools also raises IndexError, UnicodeDecodeError and others on garbage
        raise ValueError(
            f"{name} is not a batch of the CIFAR-10 python archive ({error}): download it again"
        ) from error
    return found[0]


def _open_row(value: Any, paths: bool = False) -> Image.Image:
    """The image of a row: bytes, or {bytes, path} as the hub stores images; see `_Rows` for `paths`."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return _open_image(io.BytesIO(data))
    if value is None or not value.get("path"):
        raise _Unsuitable("holds no image: take the row out")
    if not paths:
        raise _Unsuitable(
            "holds no image but a path, which may be that of any file and is not opened: give the folder of the "
            "images, or store their bytes"
        )
    return _open_image(Path(value["path"]))  # hub datasets of loose files are downloaded as files


def _open_image(file: Path | io.BytesIO) -> Image.Image:
    from PIL import Image

    if isinstance(file, Path):
        if file.exists() and not file.is_file():  # opening a pipe would wait for ever
            raise _Unsuitable("is not a regular file: take it out")
        return Image.open(_File(file), formats=PILLOW_FORMATS)
    return Image.open(file, formats=PILLOW_FORMATS)


class _File(io.BufferedReader):
    """A file to read from; a read allocates no more than the file has bytes, whatever a header in it says to read."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, self._size))

    def __del__(self) -> None:
        if hasattr(self, "_size"):  # it is open: Pillow closes what it has opened itself, and lets go of this
            self.close()


def user_path(path: str) -> Path:
    """A path as the user may give it, "~" for the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~nobody": no such user, so no such file
        return Path(path)


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _channels(image: Image.Image) -> int:
    return 1 if image.mode in ("1", "L", "LA") else 3


def _require(module: str, package: str, extra: str | None = None) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        wanted = f'"spigan[{extra}]"' if extra else package
        raise ModuleNotFoundError(f"this source of images needs the package {package}: pip install {wanted}") from error
