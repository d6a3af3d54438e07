"""The original CIFAR-10 archive, cifar-10-python.tar.gz or its extracted folder, read without unpickling."""

from __future__ import annotations

import gzip
import io
import pickletools
import tarfile
import zlib
from pathlib import Path
from typing import IO, Literal

import numpy as np

from spigan.data import limits
from spigan.data.sources.array import ArraySource
from spigan.data.sources.base import no_split
from spigan.data.sources.tar import tar_members

BATCH_IMAGES = 10_000  # images in a batch
IMAGE_VALUES = 3_072  # values in an image, in order of channel, row, column
ALLOWED_IMPORTS = {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}  # to rebuild an array
IMPORT_INSTRUCTIONS = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}  # these can name a function


def is_cifar_folder(path: Path) -> bool:
    """Return whether a folder is the extracted archive."""
    return path.name == "cifar-10-batches-py" or (path / "data_batch_1").exists()


def is_cifar_archive(path: Path) -> bool:
    """Return whether a file may be the archive."""
    return path.name.endswith((".tar.gz", ".tgz")) or path.name == "cifar-10-python.tar"


def open_cifar(path: Path, split: str) -> ArraySource:
    """Read all 50,000 (train) or 10,000 (test) images of cifar-10-python.tar.gz or its extracted folder into memory.

    Raises:
        ValueError: if there is no such split, or the archive is damaged, incomplete or not that of CIFAR-10.
    """
    batches = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}.get(split)
    if batches is None:
        raise no_split(path, split, "the CIFAR-10 archive has train and test")
    read = _read_folder if path.is_dir() else _read_archive
    pickles = read(path, batches)
    if not pickles and not path.is_dir() and path.name != "cifar-10-python.tar.gz":
        raise ValueError(
            f"{path} is a compressed tar file, but not CIFAR-10, and gives no access to single images: unpack it with "
            f"`gunzip -k {path.name}`, and pass the .tar file"
        )
    missing = [name for name in batches if name not in pickles]
    if missing:
        raise ValueError(
            f"{path} lacks {', '.join(missing)}: expected the complete CIFAR-10 python archive; download it again"
        )
    separator = "/" if path.is_dir() else "!"
    pixels = np.concatenate([_batch_pixels(pickles[name], f"{path}{separator}{name}") for name in batches])
    return ArraySource(str(path), pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_folder(path: Path, names: list[str]) -> dict[str, bytes]:
    files = {name: path / name for name in names}
    return {
        name: file.read_bytes()
        for name, file in files.items()
        if file.is_file() and file.stat().st_size < limits.MAX_CIFAR_BATCH_BYTES
    }


def _read_archive(path: Path, names: list[str]) -> dict[str, bytes]:
    """Read the members cifar-10-batches-py/{name} in one pass. Nothing is written to disk."""
    found: dict[str, bytes] = {}
    try:
        with _unpacked(path) as data:
            for member in tar_members(data):
                folder, _, name = member.name.rpartition("/")
                if (
                    folder == "cifar-10-batches-py"
                    and name in names
                    and member.isreg()
                    and member.size < limits.MAX_CIFAR_BATCH_BYTES
                ):
                    data.seek(member.offset_data)
                    found[name] = data.read(member.size)
                    if len(found) == len(names):
                        break
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as a tar archive ({error}): copy or download it again") from error
    return found


def _unpacked(path: Path) -> IO[bytes]:
    """Open a file that may be compressed with gzip."""
    with path.open("rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path.open("rb")
    with gzip.open(path) as packed:
        data = packed.read(limits.MAX_CIFAR_ARCHIVE_BYTES + 1)
    if len(data) > limits.MAX_CIFAR_ARCHIVE_BYTES:
        raise ValueError(f"it unpacks to more than {limits.MAX_CIFAR_ARCHIVE_BYTES} bytes")
    return io.BytesIO(data)


def _batch_pixels(data: bytes, name: str) -> np.ndarray:
    """Return the images in a batch of CIFAR-10, a pickle written by Python 2, as uint8 [10000, 3072].

    Unpickling would execute whatever a file asks for. This function only lists the instructions of the pickle, and
    takes the one string that is as long as the images.

    Raises:
        ValueError: if there is no such string, or the pickle imports anything other than NumPy's array.
    """
    found = []
    try:
        previous = ""
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number == limits.MAX_PICKLE_INSTRUCTIONS:
                raise ValueError(f"it has more than {limits.MAX_PICKLE_INSTRUCTIONS} instructions")
            if opcode.name in IMPORT_INSTRUCTIONS and argument not in ALLOWED_IMPORTS:
                raise ValueError(f"it would import {argument!r}, which no CIFAR-10 file does")
            # A Python 2 string, which pickletools shows as latin-1 text: one character for each byte.
            if opcode.name == "BINSTRING" and len(str(argument)) == BATCH_IMAGES * IMAGE_VALUES:
                # The end of an array's state is (..., is_fortran, bytes).
                order: Literal["C", "F"] = "F" if previous == "NEWTRUE" else "C"
                flat = np.frombuffer(str(argument).encode("latin-1"), dtype=np.uint8)
                found.append(flat.reshape(BATCH_IMAGES, IMAGE_VALUES, order=order))
            previous = opcode.name
        if len(found) != 1:
            raise ValueError(f"it holds {len(found)} arrays of {BATCH_IMAGES} x {IMAGE_VALUES} bytes; expected one")
    except Exception as error:  # pickletools also raises IndexError, UnicodeDecodeError and others on garbage
        raise ValueError(
            f"{name} is not a batch of the CIFAR-10 python archive ({error}): download it again"
        ) from error
    return found[0]
