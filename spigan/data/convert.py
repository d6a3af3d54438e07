"""`spigan data convert`: write the images of any source, as squares, to parquet files.

Every image is decoded once, in worker processes. Memory use does not grow with the size of the data.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from spigan.data.config import DataConfig, source_name
from spigan.data.decode import ImageReader
from spigan.data.sources.base import Source
from spigan.data.sources.find import find_source
from spigan.data.sources.names import describe
from spigan.data.sources.parquet import split_of
from spigan.data.workers import Failed, available_cores, chunks, map_chunks
from spigan.files import atomic_path, remove_stale, write_text
from spigan.images import to_pil

ImageFormat = Literal["png", "webp", "jpeg"]

# Size of a row group; the image that reaches it ends the group. Reading one image at random reads its whole group.
GROUP_BYTES = 1 << 19

_KEY = b"spigan.convert"  # key of a file's metadata that holds its record, including the plan it was made from


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

    As on the Hub, the files are called train-00000-of-00003.parquet and so on, starting with the name of the split. An
    index, train-index.json, is written last. Each file is written completely or not at all, and does not depend on the
    number of workers. After an interruption, the same call continues with the missing files. A file that would contain
    a broken image is only written if `skip_broken` is set.

    Args:
        config: which images to convert, and how to turn them into squares. Its resolution and channels must be set.
        out: folder to write to. It may hold other splits.
        image_format: format of the stored images. png is lossless.
        quality: quality for webp and jpeg, 1 to 100. Default: 95.
        shard_size: images per file.
        workers: number of worker processes. None: one per CPU core. 0: convert in this process.
        skip_broken: whether to leave out broken images.
        progress: whether to show a progress bar.

    Returns:
        The contents of the index: "complete", "images" written, "broken" [{index, error}], "files" [{file, images,
        bytes}] and the options. Also "converted", the number of images that this call read, and the "seconds" it took.

    Raises:
        OSError: if a file cannot be written, for example because the disk is full.
        ValueError: if an option is out of range, `out` holds files of another conversion, or `open_dataset` would raise
            an error that is not about a single image.
    """
    _check_options(config, out, image_format, quality, shard_size)
    source = find_source(config, progress)
    if left_out := getattr(source, "left_out", {}):
        warnings.warn(f"{source_name(config)} has files that are left out: {describe(left_out)}", stacklevel=2)
    plan = _plan(config, source, image_format, quality, shard_size)
    total = -(-len(source) // shard_size)
    names = [f"{config.split}-{number:05}-of-{total:05}.parquet" for number in range(total)]
    done = _finished(out, names, plan)
    kept = sum(record["images"] + len(record["broken"]) for record in done.values())
    encoder = _Encoder(source, config, plan)
    workers = available_cores() if workers is None else workers
    began = time.perf_counter()
    with tqdm(total=len(source), initial=kept, unit="img", desc=source_name(config), disable=not progress) as bar:
        failed = _write_missing(out, names, done, encoder, plan, workers, skip_broken, bar)
    index = _index(names, done, failed, plan)
    if index["complete"]:
        write_text(out / f"{config.split}-index.json", json.dumps(index, indent=2) + "\n")
    return {**index, "converted": len(source) - kept, "seconds": time.perf_counter() - began}


def _check_options(
    config: DataConfig, out: Path, image_format: ImageFormat, quality: int | None, shard_size: int
) -> None:
    if config.resolution is None or config.channels is None:
        raise ValueError("a conversion needs the resolution and channels of the images to write: set both")
    if shard_size < 1:
        raise ValueError(f"shard_size must be 1 or more, got {shard_size}")
    if quality is not None and (image_format == "png" or not 1 <= quality <= 100):
        raise ValueError(f"quality must be 1 to 100, and only for webp and jpeg; got {quality} for {image_format}")
    if Path(config.source).expanduser().resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} is inside the source: choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose a folder")


def _plan(
    config: DataConfig, source: Source, image_format: ImageFormat, quality: int | None, shard_size: int
) -> dict[str, Any]:
    """Return everything that a file's contents depend on. Files with another plan belong to another conversion."""
    identity = hashlib.sha256()
    for part in source.identity():
        identity.update(part)
    return {
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


def _write_missing(
    out: Path,
    names: list[str],
    done: dict[str, dict[str, Any]],
    encoder: _Encoder,
    plan: dict[str, Any],
    workers: int,
    skip_broken: bool,
    bar: tqdm[Any],
) -> list[dict[str, Any]]:
    """Write the files that are not in `done`, and add their records to it.

    Returns:
        The broken images of the files that were not written.
    """
    count, size = plan["count"], plan["shard_size"]
    todo = {
        name: chunks(start, min(start + size, count))
        for name, start in zip(names, range(0, count, size), strict=True)
        if name not in done
    }
    failed: list[dict[str, Any]] = []
    encoded = map_chunks(encoder, [part for parts in todo.values() for part in parts], workers)
    for name, parts in todo.items():
        try:
            record = _write(out / name, _counted(zip(parts, encoded, strict=False), bar), plan, skip_broken)
        except OSError as error:
            raise OSError(
                f"{out / name} could not be written: {error}. {len(done)} of {len(names)} files are finished and kept. "
                "Free some space, or make the folder writable, and repeat the call to continue"
            ) from error
        if record["broken"] and not skip_broken:
            failed += record["broken"]
        else:
            done[name] = record
        bar.set_postfix(broken=len(failed) + sum(len(record["broken"]) for record in done.values()))
    return failed


def _index(
    names: list[str], done: dict[str, dict[str, Any]], failed: list[dict[str, Any]], plan: dict[str, Any]
) -> dict[str, Any]:
    files = [(name, done[name]) for name in names if name in done]
    broken = failed + [row for _, record in files for row in record["broken"]]
    return {
        "complete": len(files) == len(names),
        "images": sum(record["images"] for _, record in files),
        "broken": sorted(broken, key=lambda row: row["index"]),
        "files": [{"file": name, "images": record["images"], "bytes": record["bytes"]} for name, record in files],
        **plan,
    }


def _counted(batches: Iterable[tuple[range, Any]], bar: tqdm[Any]) -> Iterator[tuple[range, Any]]:
    for batch in batches:
        yield batch
        bar.update(len(batch[0]))


class _Encoder:
    """Turns an image into a square and encodes it in the planned format."""

    def __init__(self, source: Source, config: DataConfig, plan: dict[str, Any]) -> None:
        self.reader = ImageReader(source, config)
        self.shape = (config.channels or 3, config.resolution or 0, config.resolution or 0)
        self.kind, self.options = plan["image_format"], {}
        if self.kind != "png":
            self.options["quality"] = plan["quality"]
        if self.kind == "jpeg":
            self.options["subsampling"] = 0  # 4:4:4, which keeps the full resolution of the colours

    def __call__(self, index: int) -> bytes:
        pixels, buffer = np.empty(self.shape, dtype=np.uint8), io.BytesIO()
        self.reader.read(index, pixels)
        to_pil(torch.from_numpy(pixels)[None])[0].save(buffer, format=self.kind, **self.options)
        return buffer.getvalue()


def _finished(out: Path, names: list[str], plan: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the records of the files that an earlier call finished. Remove the remains of an interrupted call."""
    import pyarrow
    from pyarrow import parquet

    done, split = {}, glob.escape(plan["split"])  # the Hub has splits such as train[:10%]
    for file in sorted(out.glob(f"{split}*.parquet")):
        if split_of(file) != plan["split"]:
            continue
        try:
            record = json.loads((parquet.read_metadata(file).metadata or {}).get(_KEY, b"{}"))
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as a parquet file ({error}): delete it") from error
        if file.name not in names or not isinstance(record, dict) or record.get("plan") != plan:
            raise ValueError(
                f"{file} belongs to another conversion, of other images or with other options: choose another folder, "
                "or delete it"
            )
        done[file.name] = record
    for name in (f"{split}-*-of-*.parquet", f"{split}-index.json"):
        remove_stale(out, f".{name}-", age=0)
    return done


class _Discarded(Exception):
    """The file must not be kept."""


def _write(
    path: Path, batches: Iterable[tuple[range, list[bytes | Failed]]], plan: dict[str, Any], skip_broken: bool
) -> dict[str, Any]:
    """Write a file, unless it has broken images and `skip_broken` is not set. Return its record.

    The record is also stored in the metadata of the file.

    Args:
        path: the file to write.
        batches: indices, and for each index the encoded image or a `Failed`.
        plan: see `_plan`.
        skip_broken: whether to keep the file in spite of broken images.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    record: dict[str, Any] = {"plan": plan, "images": 0, "bytes": 0, "broken": []}
    group: list[dict[str, Any]] = []
    size = 0  # bytes in the group
    with contextlib.suppress(_Discarded), atomic_path(path) as scratch:
        # The images are already compressed, and their minimum and maximum would be useless.
        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with parquet.ParquetWriter(scratch, schema, **options) as file:

            def write_group() -> None:
                file.write_table(pyarrow.table({"image": group}, schema=schema))
                group.clear()

            for indices, results in batches:
                for index, result in zip(indices, results, strict=True):
                    if isinstance(result, Failed):
                        record["broken"].append({"index": index, "error": result.message})
                        continue
                    group.append({"bytes": result, "path": None})
                    record["images"] += 1
                    record["bytes"] += len(result)
                    size += len(result)
                    if size >= GROUP_BYTES:
                        write_group()
                        size = 0
            if group:
                write_group()
            file.add_key_value_metadata({_KEY: json.dumps(record)})
        if record["broken"] and not skip_broken:
            raise _Discarded
    return record
