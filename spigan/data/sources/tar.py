"""Images in uncompressed tar files, such as WebDataset's shards, read in place.

Because of random access, training uses a true permutation of all images and resumes exactly, as with a folder. The
index takes 24 bytes of memory per image.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from spigan.data.decode import FORMER_SUFFIXES, IMAGE_SUFFIXES, check_size, open_image
from spigan.data.sources.base import READING, SPLITS, no_split, split_word
from spigan.files import printable

if TYPE_CHECKING:
    from PIL import Image


class TarSource:
    """Images in tar files, in the order of files and members.

    Args:
        files: uncompressed tar files.
        column: extension of the images, which is everything after the first dot of a member's name. None: any image.
        progress: whether to show a progress bar while the files are listed, if that takes over 2 s.
        reading: version of the rules; see `READING`.

    Raises:
        ValueError: if a file is damaged or compressed, no member is an image, or a sample has several.
    """

    def __init__(self, files: list[Path], column: str | None, progress: bool, reading: int = READING) -> None:
        from tqdm import tqdm

        self._files, self._digests = files, []
        headers, offsets, sizes = array("q"), array("q"), array("q")
        counts: list[int] = []
        for file in tqdm(files, desc="listing", unit="tar", delay=2, disable=not progress):
            sha = hashlib.sha256()
            for member in _image_members(file, column, FORMER_SUFFIXES if reading == 1 else IMAGE_SUFFIXES):
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
        except (tarfile.TarError, OSError, ValueError, RecursionError):  # must not hide the error to report
            return f"{file}!{offset}"

    def open(self, index: int) -> Image.Image:
        _, offset, size = self._members[:, index].tolist()
        check_size(size)
        # The file is opened for every image (about 20 us). If it were kept open, forked workers would share its
        # position, and data sets may have more shards than a process may have open files.
        with self._files[bisect_right(self._ends, index)].open("rb", buffering=0) as file:
            file.seek(offset)
            return open_image(io.BytesIO(file.read(size)))

    def identity(self) -> Iterator[bytes]:
        for file, digest in zip(self._files, self._digests, strict=True):
            yield file.name.encode(errors="surrogateescape") + b"\0" + digest


def tar_files(root: Path, split: str, reading: int = READING) -> list[Path]:
    """Return a folder's tar files of one split, sorted. Return all of them if their names do not give splits.

    Raises:
        ValueError: if there is no such split.
    """
    files = sorted(root.glob("*.tar"))
    splits = {file: re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem) for file in files}
    if not all(name in SPLITS if reading == 1 else split_word(name) for name in splits.values()):
        if split == "train":
            return files
        raise no_split(root, split, f"the names of its tar files, such as {files[0].name}, do not give a split")
    found = [file for file in files if splits[file] == split] or [
        file for file in files if reading > 1 and split_word(splits[file]) == split_word(split)
    ]
    if not found:
        raise no_split(root, split, f"the splits of its tar files are {sorted(set(splits.values()))}")
    return found


def _image_members(file: Path, column: str | None, suffixes: tuple[str, ...]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of `file` that are images, without reading them. For `column`, see `TarSource`."""
    seen: set[str] = set()  # extensions
    try:
        with file.open("rb") as opened:
            sample = ""
            for member in tar_members(opened):
                folder, _, name = member.name.rpartition("/")
                hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
                stem, _, extension = name.partition(".")
                wanted = name.lower().endswith(suffixes) if column is None else extension == column
                if hidden or not wanted or not member.isreg() or member.issparse():
                    continue
                # The dots of 2024.05.01_17.png are those of a date or a number: digits follow, and no other image has
                # the same extension.
                dotted = "." in extension and extension[0].isdigit() and extension not in seen
                seen.add(extension)
                if column is None and f"{folder}/{stem}" == sample and not dotted:
                    raise ValueError(
                        f"{file} has several images of the sample {printable(sample.strip('/'))!r}: set `column` "
                        "(--column) to the extension of one, everything after the first dot of their names, such as "
                        f'"{printable(extension)}"'
                    )
                sample = f"{folder}/{stem}"
                yield member
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as an uncompressed tar file ({error}): copy, download or decompress it again"
        ) from error


def tar_members(data: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an uncompressed tar file in order, without keeping them in memory.

    Raises:
        tarfile.TarError: if `data` is not a tar file, or is damaged.
    """
    try:
        with tarfile.open(fileobj=data, mode="r:") as archive:
            end = -1
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep all members here
                if member.offset <= end or member.size < 0:  # a malicious size would lead back, into an endless loop
                    raise tarfile.ReadError(f"the member at byte {member.offset} has a size of {member.size}")
                end = member.offset
                yield member
            data.seek(archive.offset)  # tarfile treats any block that is not a header as the end
            if data.read(512).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (ValueError, OverflowError, RecursionError) as error:  # malformed numbers; headers about headers
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from error
