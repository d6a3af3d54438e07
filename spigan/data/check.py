"""`spigan data check`: decode every image of a source once, and report what the source contains."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from spigan.data.config import DataConfig, source_name
from spigan.data.decode import ImageReader, channels_of
from spigan.data.sources.base import Source
from spigan.data.sources.find import find_source
from spigan.data.workers import Failed, available_cores, chunks, map_chunks

_Size = tuple[int, int]


def check(config: DataConfig, *, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Decode every image of a source, as training does, and report what the source contains.

    Args:
        config: which images to check. Without a resolution, they may have any size. If the channels are not set, all
            images must have those of the first one, as in training.
        workers: number of worker processes. None: one per CPU core. 0: decode in this process.
        progress: whether to show a progress bar.

    Returns:
        A report of plain JSON values:

        - "source", "split", "images": what was checked, and the number of images
        - "left_out": what the source does not read, numbers of files by a short description
        - "broken": [{index, error}]
        - "width", "height": [smallest, largest]
        - "sizes", "modes", "formats": the number of images for each, most frequent first, at most 20 sizes
        - "profiles": the number of images with a colour profile, by "sRGB" and "other". Profiles are not applied
        - "enlarged": the number of images that are smaller than the resolution
        - "duplicates": the number of "groups" of identical images, the number of "images" beyond the first of each
          group, and "examples" (names of at most 5 images of a group, for at most 10 groups)
        - "seconds", "workers", "images_per_second" of this call
        - "images_per_second_core": images that one core decodes (and crops and resizes) per second, not counting the
          time spent waiting for the disk

    Raises:
        ValueError: if `open_dataset` would raise an error that is not about a single image.
    """
    source = find_source(config, progress)
    workers = available_cores() if workers is None else workers
    began = time.perf_counter()
    tally = _tally(source, config, workers, progress)
    elapsed = time.perf_counter() - began
    groups = _equal(tally.digests, np.flatnonzero(tally.sound))
    sizes = tally.sizes
    ranges = [[min(side), max(side)] for side in zip(*sizes, strict=True)] if sizes else [None, None]
    return {
        "source": config.source,
        "split": config.split,
        "images": len(source),
        "left_out": getattr(source, "left_out", {}),
        "broken": tally.broken,
        "width": ranges[0],
        "height": ranges[1],
        "sizes": {f"{width} x {height}": count for (width, height), count in sizes.most_common(20)},
        "modes": dict(tally.modes.most_common()),
        "formats": dict(tally.formats.most_common()),
        "profiles": dict(tally.profiles.most_common()),
        "enlarged": sum(count for size, count in sizes.items() if min(size) < (config.resolution or 0)),
        "duplicates": {
            "groups": len(groups),
            "images": sum(len(group) - 1 for group in groups),
            "examples": [[source.name(index) for index in group[:5]] for group in groups[:10]],
        },
        "seconds": elapsed,
        "workers": workers,
        "images_per_second": len(source) / elapsed,
        "images_per_second_core": int(tally.sound.sum()) / tally.busy if tally.busy else None,
    }


class _Tally:
    """Counts over all images."""

    def __init__(self, count: int) -> None:
        self.broken: list[dict[str, Any]] = []
        self.sizes: Counter[_Size] = Counter()
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.profiles: Counter[str] = Counter()
        self.digests = np.zeros(count, dtype="S16")
        self.sound = np.zeros(count, dtype=bool)
        self.busy = 0.0  # seconds of CPU time

    def add(self, index: int, found: _Found | Failed) -> None:
        if isinstance(found, Failed):
            self.broken.append({"index": index, "error": found.message})
            return
        self.digests[index], self.sound[index] = found.digest, True
        self.sizes[found.size] += 1
        self.modes[found.mode] += 1
        self.formats[found.kind] += 1
        self.profiles.update([found.profile] if found.profile else [])
        self.busy += found.seconds


class _Found(NamedTuple):
    """Facts about an image: stored size, Pillow's mode and format, digest of the pixels, CPU seconds to decode it."""

    size: _Size
    mode: str
    kind: str
    profile: str  # "sRGB", "other", or "" without one
    digest: bytes
    seconds: float


def _tally(source: Source, config: DataConfig, workers: int, progress: bool) -> _Tally:
    tally, parts = _Tally(len(source)), chunks(0, len(source))
    with tqdm(total=len(source), unit="img", desc=source_name(config), disable=not progress) as bar:
        for indices, results in zip(parts, map_chunks(_Inspector(source, config), parts, workers), strict=True):
            for index, result in zip(indices, results, strict=True):
                tally.add(index, result)
            bar.update(len(indices))
            bar.set_postfix(broken=len(tally.broken), refresh=False)
    return tally


class _Inspector:
    """Decodes an image and records facts about it."""

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.reader = ImageReader(source, config)
        for index in range(len(source)):
            with suppress(ValueError), self.reader.opened(index) as first:
                self.reader.channels = config.channels or channels_of(first)
                break

    def __call__(self, index: int) -> _Found:
        began = time.thread_time()
        with self.reader.opened(index) as image:
            size, mode, kind = image.size, image.mode, str(image.format or "array")
            profile = _profile(image.info.get("icc_profile"))
            image.load()
            decoded = time.thread_time()
            # Indices mean nothing without their palette.
            pixels = image.convert("RGBA" if image.has_transparency_data else "RGB") if mode == "P" else image
            digest = hashlib.blake2b(f"{pixels.mode} {size}".encode() + pixels.tobytes(), digest_size=16).digest()
            hashed = time.thread_time()
            self.reader.square(image)
        return _Found(size, mode, kind, profile, digest, time.thread_time() - hashed + decoded - began)


_SRGB = {  # XYZ of the primaries, adapted to D50 (ICC.1:2022 and IEC 61966-2-1)
    b"rXYZ": (0.4360, 0.2225, 0.0139),
    b"gXYZ": (0.3851, 0.7169, 0.0971),
    b"bXYZ": (0.1431, 0.0606, 0.7139),
}


def _profile(data: object) -> str:
    """Return "sRGB" if a colour profile says so in its name (ASCII or UTF-16) and its primaries, else "other"."""
    if not isinstance(data, bytes) or not data:
        return ""
    if b"sRGB" not in data and "sRGB".encode("utf-16-be") not in data:
        return "other"
    found = 0
    for at in range(132, min(132 + 12 * int.from_bytes(data[128:132], "big"), len(data), 2000), 12):  # table of tags
        start = int.from_bytes(data[at + 4 : at + 8], "big") + 8
        values = [int.from_bytes(data[i : i + 4], "big", signed=True) / 65536 for i in range(start, start + 12, 4)]
        expected = _SRGB.get(data[at : at + 4])
        found += expected is not None and all(abs(a - b) < 0.01 for a, b in zip(values, expected, strict=True))
    return "sRGB" if found == len(_SRGB) else "other"


def _equal(digests: np.ndarray, indices: np.ndarray) -> list[list[int]]:
    """Group the `indices` with equal digests. Return groups of two or more, ordered by their first index."""
    order = indices[np.argsort(digests[indices], kind="stable")]
    starts = np.flatnonzero(digests[order[1:]] != digests[order[:-1]]) + 1
    return sorted(group.tolist() for group in np.split(order, starts) if len(group) > 1)
