"""Image files in a folder or in a zip file."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spigan.data.decode import IMAGE_SUFFIXES, check_size, open_image
from spigan.data.sources.base import SPLITS, UnsuitableImage, no_split

if TYPE_CHECKING:
    from PIL import Image


class FolderSource:
    """Image files: `names` are relative to `root`, with forward slashes."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._root / self._names[index])

    def open(self, index: int) -> Image.Image:
        return open_image(self._root / self._names[index])

    def identity(self) -> Iterator[bytes]:
        for name in self._names:
            yield f"{name}\0{(self._root / name).stat().st_size}\0".encode()


class ZipSource:
    """Members of a zip file, read in place."""

    def __init__(self, path: Path, members: list[zipfile.ZipInfo]) -> None:
        self._path, self._members = path, members
        self._archive: tuple[int, zipfile.ZipFile] | None = None  # with the id of the process that opened it

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_archive": None}

    def __len__(self) -> int:
        return len(self._members)

    def name(self, index: int) -> str:
        return f"{self._path}!{self._members[index].filename}"

    def open(self, index: int) -> Image.Image:
        # A forked worker opens the file again, because it would share the position in its parent's open file.
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self._path)
        member = self._members[index]
        check_size(member.file_size, "unpacks to")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            # Python unpacks a bzip2 or LZMA member all at once, whatever its size: 200 bytes may fill the memory.
            raise UnsuitableImage(
                "is not packed with deflate, the usual method of zip files: create the zip file again with it"
            )
        data = io.BytesIO()
        with self._archive[1].open(member) as packed:
            shutil.copyfileobj(packed, data, 1 << 14)  # read() would unpack everything before counting the bytes
        data.seek(0)
        return open_image(data)

    def identity(self) -> Iterator[bytes]:
        for member in self._members:
            yield f"{member.filename}\0{member.file_size}\0{member.CRC}\0".encode()


def open_folder(root: Path, split: str) -> FolderSource:
    """Open all images below a folder, in the order of their names. Links to folders are followed.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are no images or no such split, or a link leads in a circle.
    """

    def refuse(error: OSError) -> None:  # os.walk would silently skip folders that it may not read
        raise error

    names, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names += [(Path(folder) / file).relative_to(root).as_posix() for file in files]
        if os.path.realpath(folder) in seen:  # a link to a parent folder would repeat its images forever
            raise ValueError(f"{folder} links to a folder that is already in {root}: remove the link")
        seen.add(os.path.realpath(folder))
    return FolderSource(root, _image_names(names, split, root))


def open_zip(path: Path, split: str) -> ZipSource:
    """Open all images in a zip file, in the order of their names.

    Raises:
        ValueError: if the file is damaged, or has no images or no such split.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a zip file ({error}): copy or download it again") from error
    return ZipSource(path, [members[name] for name in _image_names(list(members), split, path)])


def _image_names(names: list[str], split: str, where: Path) -> list[str]:
    """Return the images among `names`, sorted. If the top folders are splits, return only those of `split`."""
    shown = (name for name in names if not any(part.startswith(".") for part in name.split("/")))
    images = sorted(name for name in shown if name.lower().endswith(IMAGE_SUFFIXES))
    if not images:
        raise ValueError(f"{where} has no images in it: expected files named *{', *'.join(IMAGE_SUFFIXES)}")
    tops = {name.split("/")[0] for name in images}
    if tops <= SPLITS:
        images = [name for name in images if name.startswith(f"{split}/")]
    if not images or (split != "train" and not tops <= SPLITS):
        found = f"its folders are {sorted(tops)}" if tops <= SPLITS else "it has no split folders at its top"
        raise no_split(where, split, f"{found}; choose one of them, or pass the folder of images")
    return images
