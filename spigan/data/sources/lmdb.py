"""LMDB folders whose values are encoded images, as LSUN stores them.

The keys, and 8 bytes per image, are kept in memory.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from spigan.data.decode import check_size, open_image
from spigan.data.sources import lmdb_scan
from spigan.data.sources.base import UnsuitableImage, require

if TYPE_CHECKING:
    from PIL import Image

# A process may open an LMDB only once. Forked workers use the one that their parent opened: without a lock file,
# reading only accesses mapped memory.
_environments: WeakValueDictionary[str, Any] = WeakValueDictionary()
_opening = threading.Lock()


class LMDBSource:
    """The values of an LMDB folder (data.mdb), each an encoded image, in the order of their keys.

    Raises:
        ModuleNotFoundError: if `lmdb` is not installed.
        ValueError: if the folder is damaged or has no entries.
    """

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
                raise UnsuitableImage("has been removed: open the data again")
            check_size(len(value))
            return open_image(io.BytesIO(value))  # a copy: the mapped memory is only valid within the transaction

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


def _scan(folder: Path) -> tuple[bytes, array[int], bytes]:
    """List the keys of an LMDB in another process, because a damaged file may crash the process.

    Returns:
        All keys in one string, the position where each key ends, and the SHA-256 of keys and sizes.
    """
    require("lmdb", "lmdb", extra="data")
    keys, ends, sha = bytearray(), array("Q"), hashlib.sha256()
    # The other process must find the same packages as this one, whatever has put them on the path.
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
        # A negative status is the signal that ended the process, such as SIGSEGV.
        problem = message or f"a process that reads it ends with status {process.returncode}"
        raise ValueError(f"{folder} cannot be read as an LMDB ({problem}): copy or download it again")
    if not ends:
        raise ValueError(f"{folder} has no entries: expected encoded images as values")
    return bytes(keys), ends, sha.digest()
