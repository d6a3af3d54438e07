"""Sets of images too large for memory, read from disk image by image: LSUN's LMDB, WebDataset's tar shards, parquet.

Each is a `_Source` of spigan.data with random access, so that the order of training is a true permutation of all images
and resumes exactly, as for a folder. What is held in memory is an index: for an LMDB its keys and 8 bytes an image, for
tar shards 24 bytes an image, for parquet the files' footers.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np
from tqdm import tqdm

from spigan.data.dataset import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    SPLIT_FOLDERS,
    _open_image,
    _open_row,
    _require,
    _Unsuitable,
    check_unpacked,
    tar_members,
)

if TYPE_CHECKING:
    from PIL import Image


def _open_stored(data: bytes | memoryview) -> Image.Image:
    if len(data) > 4 * MAX_PIXELS:  # no image within the limit needs more
        raise _Unsuitable(f"has {len(data)} bytes; at most {4 * MAX_PIXELS} are accepted: make it smaller")
    return _open_image(io.BytesIO(data))


# LMDB ---------------------------------------------------------------------------------------------------------------

# liblmdb allows a file to be open once in a process. Forked workers use their parent's: without its lock file, reading
# is nothing but reading mapped memory.
_environments: WeakValueDictionary[str, Any] = WeakValueDictionary()
_opening = threading.Lock()


def _environment(folder: Path) -> Any:
    key = str(folder.resolve())
    with _opening:
        found = _environments.get(key)
        if found is None:
            lmdb = _require("lmdb", "lmdb", extra="data")
            found = lmdb.open(key, readonly=True, lock=False, readahead=False, create=False)
            _environments[key] = found
        return found


class LMDB:
    """Values of an LMDB folder (data.mdb), each an encoded image, in the order of their keys; LSUN's layout."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keys, self._ends, self._digest = _scan(folder)
        self._environment = _environment(folder)

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
        with self._environment.begin(buffers=True) as transaction:
            value = transaction.get(self._key(index))
            if value is None:
                raise _Unsuitable("is not there any more: open the data again")
            return _open_stored(value)  # which copies it: the mapped memory is only valid within

    def identity(self) -> Iterator[bytes]:
        yield self._digest


def _scan(folder: Path) -> tuple[bytes, array[int], bytes]:
    """All keys in one string, where each ends in it, and the sha256 of keys and sizes."""
    _require("lmdb", "lmdb", extra="data")
    from spigan.data import lmdb_scan

    keys, ends, sha = bytearray(), array("Q"), hashlib.sha256()
    # The same packages as here, whatever put them on the path.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, lmdb_scan.__file__, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        while len(record := process.stdout.read(lmdb_scan.RECORD.size)) == lmdb_scan.RECORD.size:
            key = process.stdout.read(lmdb_scan.RECORD.unpack(record)[0])
            keys += key
            ends.append(len(keys))
            sha.update(record + key)
        message = process.stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    if process.returncode:
        # A negative status is the signal that ended it, such as SIGSEGV.
        problem = message or f"reading it ends a process with status {process.returncode}"
        raise ValueError(f"{folder} cannot be read as an LMDB ({problem}): copy or download it again")
    if not ends:
        raise ValueError(f"{folder} has no entries: expected encoded images as values")
    return bytes(keys), ends, sha.digest()


# Tar shards ---------------------------------------------------------------------------------------------------------


class Tar:
    """Images in tar files that are not compressed, in the order of files and members."""

    def __init__(self, files: list[Path], column: str | None, progress: bool) -> None:
        self._files, self._digests = files, []
        headers, offsets, sizes = array("q"), array("q"), array("q")
        counts: list[int] = []
        for file in tqdm(files, desc="listing", unit="tar", delay=2, disable=not progress):
            sha = hashlib.sha256()
            for member in _images(file, column):
                headers.append(member.offset)
                offsets.append(member.offset_data)
                sizes.append(member.size)
                sha.update(f"{member.name}\0{member.size}\0".encode(errors="surrogateescape"))
            counts.append(len(sizes) - sum(counts))
            self._digests.append(sha.digest())
        if not sizes:
            expected = f"members named *.{column}" if column else f"members named *{', *'.join(IMAGE_SUFFIXES)}"
            raise ValueError(f"{', '.join(map(str, files))} has no images in it: expected {expected}")
        self._members = np.stack([np.frombuffer(part, dtype=np.int64) for part in (headers, offsets, sizes)])  # [3, N]
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1]

    def name(self, index: int) -> str:
        file, offset = self._files[bisect_right(self._ends, index)], int(self._members[0, index])
        try:
            with file.open("rb") as opened:
                opened.seek(offset)
                with tarfile.open(fileobj=opened, mode="r:") as archive:
                    member = archive.next()
                    return f"{file}!{member.name if member else offset}"
        except (tarfile.TarError, OSError, ValueError, RecursionError):  # while an error is reported: not another one
            return f"{file}!{offset}"

    def open(self, index: int) -> Image.Image:
        _, offset, size = self._members[:, index].tolist()
        if size > 4 * MAX_PIXELS:
            raise _Unsuitable(f"has {size} bytes; at most {4 * MAX_PIXELS} are accepted: make it smaller")
        # Opened for every image (some 20 us): a forked worker would share the position in a file kept open, and sets
        # have more shards than a process may have files.
        with self._files[bisect_right(self._ends, index)].open("rb", buffering=0) as file:
            file.seek(offset)
            return _open_stored(file.read(size))

    def identity(self) -> Iterator[bytes]:
        for file, digest in zip(self._files, self._digests, strict=True):
            yield file.name.encode(errors="surrogateescape") + b"\0" + digest


def tar_files(root: Path, split: str) -> list[Path]:
    """The tar files of one split, in order, where their names tell splits (train-000000.tar); else all of them."""
    files = sorted(root.glob("*.tar"))
    splits = {file: re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem) for file in files}
    if not set(splits.values()) <= SPLIT_FOLDERS:
        if split == "train":
            return files
        raise ValueError(f"{root} has no split {split!r}: its tar files, such as {files[0].name}, name none")
    found = [file for file in files if splits[file] == split]
    if not found:
        raise ValueError(f"{root} has no split {split!r}: its tar files are of {sorted(set(splits.values()))}")
    return found


def _images(file: Path, column: str | None) -> Iterator[tarfile.TarInfo]:
    """Members of `file` that are images, without reading them.

    `column` is all that follows the first dot of their names, such as "jpg": WebDataset tells parts of a sample so.
    """
    try:
        with file.open("rb") as opened:
            sample = ""
            for member in tar_members(opened):
                folder, _, name = member.name.rpartition("/")
                hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
                stem, _, extension = name.partition(".")
                wanted = name.lower().endswith(IMAGE_SUFFIXES) if column is None else extension == column
                if hidden or not wanted or not member.isreg() or member.issparse():
                    continue
                if column is None and f"{folder}/{stem}" == sample:
                    raise ValueError(
                        f"{file} has several images of the sample {sample.strip('/')!r}: give as `column` which, by "
                        f'what follows the first dot of their names, such as "{extension}"'
                    )
                sample = f"{folder}/{stem}"
                yield member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as a tar file, not compressed ({error}): copy, download or unpack it again"
        ) from error


# Parquet ------------------------------------------------------------------------------------------------------------


class RowGroups:
    """Images in a column of parquet files, read a row group at a time."""

    def __init__(self, files: list[Path], footers: list[Any], column: str) -> None:
        self._files, self._footers, self._column = files, footers, column
        groups = [(file, group) for file, footer in enumerate(footers) for group in range(footer.num_row_groups)]
        self._groups = np.array(groups, dtype=np.int64)  # [G, 2]
        self._ends = np.cumsum([footers[file].row_group(group).num_rows for file, group in groups])
        self._firsts = np.cumsum([0, *(footer.num_rows for footer in footers)])  # of each file
        self._checked: set[int] = set()  # groups
        self._last = threading.local()  # group and column read last by a thread: images are also read in order

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _last=threading.local())

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return f"{self._files[file]} row {index - self._firsts[file]}"

    def open(self, index: int) -> Image.Image:
        from pyarrow import parquet

        at = int(np.searchsorted(self._ends, index, side="right"))
        if getattr(self._last, "group", None) != at:
            file, group = self._groups[at].tolist()
            # Opened for every group: a file kept open may not be read by several threads or workers.
            with parquet.ParquetFile(self._files[file], metadata=self._footers[file]) as opened:
                if at not in self._checked:
                    check_unpacked(opened, self._column, [group])
                    self._checked.add(at)
                rows = opened.read_row_group(group, columns=[self._column], use_threads=False).column(0)
            self._last.group, self._last.rows = at, rows
        row = index - int(self._ends[at]) + len(self._last.rows)
        return _open_row(self._last.rows[row].as_py())

    def identity(self) -> Iterator[bytes]:
        for file, footer in zip(self._files, self._footers, strict=True):
            yield f"{file.name}\0{footer.num_rows}\0{footer.serialized_size}\0{file.stat().st_size}\0".encode()
