"""`spigan data convert`: any source of images to parquet files of squares. `spigan data check`: a report on a source.

Both go through all images once, in worker processes, in memory that does not grow with the images' bytes.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from spigan.data import DataConfig, ImageDataset
from spigan.data.dataset import _cores, _find, _split_of, _start_worker, _unchanged, start_workers
from spigan.files import atomic_path, remove_stale
from spigan.images import to_pil

ImageFormat = Literal["png", "webp", "jpeg"]

_CHUNK = 32  # images that a worker hands over at a time
_GROUP_BYTES = 1 << 19  # a row group ends with the image that fills it: to read one image at random is to read a group
_KEY = b"spigan.convert"  # in a file's metadata: what it was made from, and how


def convert(
    config: DataConfig,
    out: Path,
    *,
    image_format: ImageFormat = "png",
    quality: int | None = None,
    shard_size: int = 4096,
    workers: int | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a source's images, as squares of one size, to parquet files that `open_dataset` reads as source `out`.

    The files are train-00000-of-00003.parquet, ... (the split's name first, as on the hub), and train-index.json,
    written last. Each is there whole or not at all, and is the same for every number of workers. The same call goes on
    where a killed one ended. A file with a broken image in it is not written unless `skip_broken`.

    Args:
        config: which images, and how they become squares: its resolution and channels must be given.
        out: folder; it may hold other splits.
        image_format: of the stored images; png loses nothing.
        quality: of webp and jpeg, 1..100; default 95.
        shard_size: images in a file.
        workers: processes; None: one for each CPU core, 0: this process.
        skip_broken: leave broken images out.
        progress: show a progress bar.

    Returns:
        What the index holds: "complete", "images" written, "broken" [{index, error}], "files" [{file, images, bytes}]
        and the options; besides "converted", images that this call went through, and "seconds" it took.

    Raises:
        OSError: the disk is full, or the like.
        ValueError: an option out of range, or `out` holds files of another conversion; and what `open_dataset` raises,
            but for single images.
    """
    if config.resolution is None or config.channels is None:
        raise ValueError("a conversion needs the resolution and channels that its images shall have")
    if shard_size < 1:
        raise ValueError(f"shard_size must be 1 or more, got {shard_size}")
    if quality is not None and (image_format == "png" or not 1 <= quality <= 100):
        raise ValueError(f"quality is 1 to 100 for webp and jpeg and not for png, got {quality} for {image_format}")
    if Path(config.source).expanduser().resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is in the source itself: choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder")
    source = _find(config, progress)
    identity = hashlib.sha256()
    for part in source.identity():
        identity.update(part)
    plan = {
        "split": config.split,
        "count": len(source),
        "identity": identity.hexdigest(),
        "resolution": config.resolution,
        "channels": config.channels,
        "resize": config.resize,
        "crop": config.crop,
        "image_format": image_format,
        "quality": None if image_format == "png" else quality or 95,
        "shard_size": shard_size,
    }
    names = [
        f"{config.split}-{number:05}-of-{-(-len(source) // shard_size):05}.parquet"
        for number in range(-(-len(source) // shard_size))
    ]
    done = _finished(out, names, plan)
    todo = {
        name: _chunks(start, min(start + shard_size, len(source)))
        for name, start in zip(names, range(0, len(source), shard_size), strict=True)
        if name not in done
    }
    images = ImageDataset(source, config, check=False)
    kept = sum(record["images"] + len(record["broken"]) for record in done.values())
    began, failed = time.perf_counter(), []
    encoded = _in_workers(_Encoder(images, plan), [chunk for chunks in todo.values() for chunk in chunks], workers)
    with tqdm(total=len(source), initial=kept, unit="img", desc=images.name, disable=not progress) as bar:
        for name, chunks in todo.items():
            try:
                record = _write(out / name, _counted(zip(chunks, encoded, strict=False), bar), plan, skip_broken)
            except OSError as error:
                raise OSError(
                    f"{out / name} could not be written: {error}. {len(done)} of {len(names)} files are finished and "
                    "kept; make room or the folder writable, then the same call goes on"
                ) from error
            if record["broken"] and not skip_broken:
                failed += record["broken"]
            else:
                done[name] = record
            bar.set_postfix(broken=len(failed) + sum(len(record["broken"]) for record in done.values()))
    files = [(name, done[name]) for name in names if name in done]
    broken = failed + [row for _, record in files for row in record["broken"]]
    index = {
        "complete": len(files) == len(names),
        "images": sum(record["images"] for _, record in files),
        "broken": sorted(broken, key=lambda row: row["index"]),
        "files": [{"file": name, "images": record["images"], "bytes": record["bytes"]} for name, record in files],
        **plan,
    }
    if index["complete"]:
        with atomic_path(out / f"{config.split}-index.json") as scratch:
            scratch.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return {**index, "converted": len(source) - kept, "seconds": time.perf_counter() - began}


def check(config: DataConfig, *, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Decode every image of a source and say what it holds.

    Args:
        config: which images. Where it has a resolution, they are also cropped and resized, as training would.
        workers: processes; None: one for each CPU core, 0: this process.
        progress: show a progress bar.

    Returns:
        A report of plain JSON values: "images"; "broken" [{index, error}]; "width" and "height" [least, most]; "sizes",
        "modes" and "formats", how many images have which, most frequent first, at most 20 sizes; "duplicates": "groups"
        of images equal in every pixel, "images" beyond the first of each, "examples" (names, at most 10 groups);
        "seconds", "workers", "images_per_second" of this call, and "images_per_second_core": images that one core
        decodes (and makes squares of) a second, without waiting for the disk.

    Raises:
        ValueError: what `open_dataset` raises, but for single images.
    """
    source = _find(config, progress)
    images = ImageDataset(source, config, check=False)
    workers = _cores() if workers is None else workers
    chunks = _chunks(0, len(source))
    began, busy = time.perf_counter(), 0.0
    broken: list[dict[str, Any]] = []
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    digests = np.zeros(len(source), dtype="S16")
    sound = np.zeros(len(source), dtype=bool)
    with tqdm(total=len(source), unit="img", desc=images.name, disable=not progress) as bar:
        for indices, results in _counted(
            zip(chunks, _in_workers(_Inspector(images), chunks, workers), strict=True), bar
        ):
            for index, result in zip(indices, results, strict=True):
                if isinstance(result, str):
                    broken.append({"index": index, "error": result})
                    continue
                size, mode, kind, digests[index], seconds = result
                sound[index] = True
                sizes[size] += 1
                modes[mode] += 1
                formats[kind] += 1
                busy += seconds
            bar.set_postfix(broken=len(broken), refresh=False)
    elapsed = time.perf_counter() - began
    groups = list(_equal(digests, np.flatnonzero(sound)))
    ranges = [[min(side), max(side)] for side in zip(*sizes, strict=True)] if sizes else [None, None]
    return {
        "source": config.source,
        "split": config.split,
        "images": len(source),
        "broken": broken,
        "width": ranges[0],
        "height": ranges[1],
        "sizes": {f"{width} x {height}": count for (width, height), count in sizes.most_common(20)},
        "modes": dict(modes.most_common()),
        "formats": dict(formats.most_common()),
        "duplicates": {
            "groups": len(groups),
            "images": sum(len(group) - 1 for group in groups),
            "examples": [[source.name(index) for index in group[:5]] for group in groups[:10]],
        },
        "seconds": elapsed,
        "workers": workers,
        "images_per_second": len(source) / elapsed,
        "images_per_second_core": int(sound.sum()) / busy if busy else None,
    }


def _chunks(start: int, stop: int) -> list[range]:
    return [range(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK)]


def _counted(batches: Iterable[tuple[range, Any]], bar: tqdm[Any]) -> Iterator[tuple[range, Any]]:
    for batch in batches:
        yield batch
        bar.update(len(batch[0]))


def _in_workers(dataset: _EachImage, chunks: list[range], workers: int | None) -> Iterator[list[Any]]:
    """`dataset.__getitems__(chunk)` of every chunk, in order."""
    return start_workers(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=chunks,  # type: ignore[arg-type]  # a range is as good as a list
            num_workers=_cores() if workers is None else workers,
            collate_fn=_unchanged,
            generator=torch.Generator(),
            worker_init_fn=_start_worker,
        )
    )


class _EachImage(torch.utils.data.Dataset[Any], ABC):
    """What `of` makes of an image, or the error as text, for each image of a chunk."""

    def __init__(self, images: ImageDataset) -> None:
        self.images = images

    @abstractmethod
    def of(self, index: int) -> Any:
        """Raises ValueError, naming the image, where something is wrong with it."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._result(index) for index in indices]

    def _result(self, index: int) -> Any:
        try:
            return self.of(index)
        except ValueError as error:  # whatever is wrong with an image: ImageDataset names it
            return str(error)


class _Encoder(_EachImage):
    """An image's square as a file of the planned format."""

    def __init__(self, images: ImageDataset, plan: dict[str, Any]) -> None:
        super().__init__(images)
        self.kind, self.options = plan["image_format"], {}
        if self.kind != "png":
            self.options["quality"] = plan["quality"]
        if self.kind == "jpeg":
            self.options["subsampling"] = 0  # 4:4:4, colours keep their resolution

    def of(self, index: int) -> bytes:
        buffer = io.BytesIO()
        to_pil(self.images[index][None])[0].save(buffer, format=self.kind, **self.options)
        return buffer.getvalue()


class _Inspector(_EachImage):
    """(width, height), mode, format, digest of the pixels, seconds of a core that decoding took."""

    def of(self, index: int) -> tuple[tuple[int, int], str, str, bytes, float]:
        began = time.thread_time()
        with self.images._opened(index) as image:
            size, mode, kind = image.size, image.mode, str(image.format or "array")
            image.load()
            decoded = time.thread_time()
            # Indices mean nothing without their palette.
            pixels = image.convert("RGBA" if image.has_transparency_data else "RGB") if mode == "P" else image
            digest = hashlib.blake2b(f"{pixels.mode} {size}".encode() + pixels.tobytes(), digest_size=16).digest()
            hashed = time.thread_time()
            if self.images.resolution:
                self.images._squared(image)
        return size, mode, kind, digest, time.thread_time() - hashed + decoded - began


def _equal(digests: np.ndarray, indices: np.ndarray) -> Iterator[list[int]]:
    """Groups of two or more of `indices` whose digests are equal, in the order of their first."""
    order = indices[np.argsort(digests[indices], kind="stable")]
    starts = np.flatnonzero(np.r_[True, digests[order[1:]] != digests[order[:-1]]]) if len(order) else order
    groups = (group.tolist() for group in np.split(order, starts[1:]) if len(group) > 1)
    return iter(sorted(groups))


def _finished(out: Path, names: list[str], plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records of the files that an earlier call finished; removes what a killed one was writing."""
    import pyarrow
    from pyarrow import parquet

    done, split = {}, glob.escape(plan["split"])  # the hub has splits such as train[:10%]
    for file in sorted(out.glob(f"{split}*.parquet")):
        if _split_of(file) != plan["split"]:
            continue
        try:
            record = json.loads((parquet.read_metadata(file).metadata or {}).get(_KEY, b"{}"))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as a parquet file ({error}): delete it") from error
        if file.name not in names or not isinstance(record, dict) or record.get("plan") != plan:
            raise ValueError(
                f"{file} is not of this conversion, but of other images or options: choose another folder, or delete it"
            )
        done[file.name] = record
    for name in (f"{split}-*-of-*.parquet", f"{split}-index.json"):
        remove_stale(out, f".{name}-", age=0)
    return done


class _Discarded(Exception):
    """A file is not to be kept."""


def _write(
    path: Path, batches: Iterable[tuple[range, list[bytes | str]]], plan: dict[str, Any], skip_broken: bool
) -> dict[str, Any]:
    """Write a file unless it is discarded for its broken images; returns the record that it holds of itself."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    record: dict[str, Any] = {"plan": plan, "images": 0, "bytes": 0, "broken": []}
    group: list[dict[str, Any]] = []
    size = 0  # of the group
    with contextlib.suppress(_Discarded), atomic_path(path) as scratch:
        # The images are compressed, and nobody asks for the least and the greatest.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with parquet.ParquetWriter(scratch, schema, **options) as file:

            def write_group() -> None:
                file.write_table(pyarrow.table({"image": group}, schema=schema))
                group.clear()

            for indices, results in batches:
                for index, result in zip(indices, results, strict=True):
                    if isinstance(result, str):
                        record["broken"].append({"index": index, "error": result})
                        continue
                    group.append({"bytes": result, "path": None})
                    record["images"] += 1
                    record["bytes"] += len(result)
                    size += len(result)
                    if size >= _GROUP_BYTES:
                        write_group()
                        size = 0
            if group:
                write_group()
            file.add_key_value_metadata({_KEY: json.dumps(record)})
        if record["broken"] and not skip_broken:
            raise _Discarded
    return record
