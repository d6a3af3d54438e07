"""LMDB folders whose values are encoded images, as LSUN stores them, or raw RGB, as NVAE and DD-GAN store CelebA-HQ.

The keys, and 8 bytes per image, are kept in memory.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import subprocess
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from spigan.data.config import DataConfig
from spigan.data.decode import check_size, open_image
from spigan.data.sources import lmdb_scan
from spigan.data.sources.base import READING, UnsuitableImage, no_split, require, split_word
from spigan.files import folders_in, printable

if TYPE_CHECKING:
    from PIL import Image

# A process may open an LMDB only once. Forked workers use the one that their parent opened: without a lock file,
# reading only accesses mapped memory.
_environments: WeakValueDictionary[str, Any] = WeakValueDictionary()
_opening = threading.Lock()


_NO_IMAGES = re.compile(rb"length|__len__|__keys__")
"""Keys whose values say how many images there are, as the scripts of StyleGAN2 in PyTorch and others write them."""

_SIZED = re.compile(rb"(\d+)-\d+")  # keys such as 256-00017, of images that are stored in several sizes


class LMDBSource:
    """The values of an LMDB folder (data.mdb), each an image, in the order of their keys.

    If every image is stored in several sizes, `config.column` selects the size. By default it is the smallest that is
    at least `config.resolution`, or else the largest.

    Attributes:
        left_out: see `Source`.

    Raises:
        ModuleNotFoundError: if `lmdb` is not installed.
        ValueError: if the folder is damaged or has no entries, or not the size.
    """

    def __init__(self, folder: Path, config: DataConfig, reading: int = READING) -> None:
        self._folder = folder
        self.left_out: dict[str, int] = {}
        keys, sizes, self._digest = _scan(folder)
        if reading > 1:
            kept = self._choose(keys, config)
            if len(kept) < len(keys):
                keys, sizes = [keys[i] for i in kept], array("Q", [sizes[i] for i in kept])
                self._digest = hashlib.sha256(repr(list(zip(keys, sizes, strict=True))).encode()).digest()
        if not keys:
            raise ValueError(f"{folder} has no entries: expected encoded images as values")
        self._keys, self._ends = b"".join(keys), array("Q", accumulate(map(len, keys)))
        self._environment = _environment(folder)
        with self._environment.begin(buffers=True) as transaction:
            start = bytes(transaction.get(keys[0])[:16])
        self._side = _raw_side(sizes, start) if reading > 1 else None

    def _choose(self, keys: list[bytes], config: DataConfig) -> list[int]:
        """Return the indices of the keys of images, all of one size."""
        kept = [index for index, key in enumerate(keys) if not _NO_IMAGES.fullmatch(key)]
        self.left_out = {f"entry {printable(key.decode())}": 1 for key in keys if _NO_IMAGES.fullmatch(key)}
        matches = [_SIZED.fullmatch(keys[index]) for index in kept]
        stored = Counter(int(match[1]) for match in matches if match)
        if not kept or None in matches or (len(stored) == 1 and config.column is None):
            return kept
        names = ", ".join(map(str, sorted(stored)))
        wanted = min([size for size in stored if size >= (config.resolution or math.inf)], default=max(stored))
        if config.column is not None:
            wanted = next((size for size in stored if str(size) == config.column), 0)
            if not wanted:
                raise ValueError(
                    f"{self._folder} has its images in the sizes {names}: set `column` (--column) to one of them, got "
                    f"{config.column!r}"
                )
        self.left_out |= {f"images of size {size}": count for size, count in sorted(stored.items()) if size != wanted}
        return [index for index, match in zip(kept, matches, strict=True) if match and int(match[1]) == wanted]

    def _value(self, index: int) -> bytes:
        with self._environment.begin(buffers=True) as transaction:
            value = transaction.get(self._key(index))
            if value is None:
                raise UnsuitableImage("has been removed: open the data again")
            check_size(len(value))
            return bytes(value)  # a copy: the mapped memory is only valid within the transaction

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _environment=_environment(state["_folder"]))

    def __len__(self) -> int:
        return len(self._ends)

    def _key(self, index: int) -> bytes:
        return self._keys[self._ends[index - 1] if index else 0 : self._ends[index]]

    def name(self, index: int) -> str:
        return f"{self._folder}!{self._key(index).decode('ascii', 'backslashreplace')}"

    def open(self, index: int) -> Image.Image:
        value = self._value(index)
        if self._side is None:
            return open_image(io.BytesIO(value))
        if len(value) != 3 * self._side**2:
            raise UnsuitableImage(f"has {len(value)} bytes; expected raw RGB of {self._side} x {self._side} pixels")
        from PIL import Image

        return Image.frombytes("RGB", (self._side, self._side), value)

    def identity(self) -> Iterator[bytes]:
        yield self._digest


def _environment(folder: Path) -> Any:
    key = str(folder.resolve())
    with _opening:
        found = _environments.get(key)
        if found is None:
            lmdb = require("lmdb", "lmdb", extra="data")
            found = lmdb.open(key, readonly=True, lock=False, readahead=False, create=False)
            _environments[key] = found
        return found


def lmdb_folder(root: Path, split: str) -> Path | None:
    """Return the LMDB of a split in a folder of them, such as train.lmdb or church_outdoor_train_lmdb; None for none.

    Raises:
        ValueError: if there are LMDBs, but not one of the split.
    """
    found = [folder for folder in folders_in(root) if (folder / "data.mdb").is_file()]
    words = {folder: {split_word(part) for part in re.split(r"[^a-zA-Z]+", folder.name)} for folder in found}
    chosen = [folder for folder in found if split_word(split) in words[folder] - {None}]
    if not found or len(chosen) == 1:
        return chosen[0] if chosen else None
    names = ", ".join(printable(folder.name) for folder in chosen or found)
    raise no_split(root, split, f"it has the LMDB folders {names}: pass one of them")


def _raw_side(sizes: array[int], start: bytes) -> int | None:
    """Return the side of the images if all values are raw RGB of one square; None if they are encoded images.

    Args:
        sizes: numbers of bytes of all values.
        start: first bytes of the first value.
    """
    side = math.isqrt(sizes[0] // 3)
    encoded = start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*", b"MM\0*"))
    return side if 3 * side**2 == sizes[0] and len(set(sizes)) == 1 and side and not encoded else None


def _scan(folder: Path) -> tuple[list[bytes], array[int], bytes]:
    """List the keys of an LMDB in another process, because a damaged file may crash the process.

    Returns:
        All keys, the sizes of their values in bytes, and the SHA-256 of keys and sizes.
    """
    require("lmdb", "lmdb", extra="data")
    keys: list[bytes] = []
    sizes, sha = array("Q"), hashlib.sha256()
    # The other process must find the same packages as this one, whatever has put them on the path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, lmdb_scan.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        while len(record := process.stdout.read(lmdb_scan.RECORD.size)) == lmdb_scan.RECORD.size:
            length, size = lmdb_scan.RECORD.unpack(record)
            key = process.stdout.read(length)
            keys.append(key)
            sizes.append(size)
            sha.update(record + key)
        message = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    if process.returncode:
        # A negative status is the signal that ended the process, such as SIGSEGV.
        problem = message or f"a process that reads it ends with status {process.returncode}"
        raise ValueError(f"{folder} cannot be read as an LMDB ({problem}): copy or download it again")
    return keys, sizes, sha.digest()
