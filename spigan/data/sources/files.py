"""Image files in a folder or in a zip file."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spigan.data.decode import IMAGE_SUFFIXES, check_size, open_image
from spigan.data.sources.base import READING, UnsuitableImage
from spigan.data.sources.names import choose_images, named

if TYPE_CHECKING:
    from PIL import Image


_MOST_LINKS = 100  # times that links may lead to one folder; links to links could repeat it without end


class FolderSource:
    """Image files: `names` are relative to `root`, with forward slashes. `left_out`: see `Source`."""

    def __init__(self, root: Path, names: list[str], left_out: dict[str, int]) -> None:
        self._root, self._names, self.left_out = root, names, left_out

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return str(self._root / self._names[index])

    def open(self, index: int) -> Image.Image:
        return open_image(self._root / self._names[index])

    def identity(self) -> Iterator[bytes]:
        for name in self._names:
            try:
                size = (self._root / name).stat().st_size
            except OSError:  # a broken link, or removed since; reported when it is opened
                size = -1
            yield f"{name}\0{size}\0".encode(errors="surrogateescape")


class ZipSource:
    """Members of a zip file, read in place. `left_out`: see `Source`."""

    def __init__(self, path: Path, members: list[zipfile.ZipInfo], left_out: dict[str, int]) -> None:
        self._path, self._members, self.left_out = path, members, left_out
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
            yield f"{member.filename}\0{member.file_size}\0{member.CRC}\0".encode(errors="surrogateescape")


def open_folder(root: Path, split: str, reading: int = READING) -> FolderSource:
    """Open all images below a folder, in the order of their names. Links to folders are followed.

    Raises:
        OSError: if a folder cannot be read.
        ValueError: if there are no images or no such split, or a link leads in a circle; see `choose_images`.
    """

    def refuse(error: OSError) -> None:  # os.walk would silently skip folders that it may not read
        raise error

    names: list[str] = []
    dangling: list[str] = []
    visits: Counter[str] = Counter()
    above: dict[str, tuple[str, ...]] = {}  # real paths of a folder and of those on the way to it
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        real, way = os.path.realpath(folder), above.pop(folder, ())
        visits[real] += 1
        if real in way or visits[real] > _MOST_LINKS:  # a link to a parent folder would repeat its images forever
            raise ValueError(f"{folder} links to a folder that is already in {root}, in a circle: remove the link")
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        above |= {os.path.join(folder, name): (*way, real) for name in subfolders}
        for file in files:
            name = (Path(folder) / file).relative_to(root).as_posix()
            # An image whose link is broken is an error when it is opened. Other broken links may be those of folders.
            broken = (
                not file.lower().endswith(IMAGE_SUFFIXES)
                and os.path.islink(path := os.path.join(folder, file))
                and not os.path.exists(path)
            )
            (dangling if broken else names).append(name)
    chosen = choose_images(names, split, root, reading)
    return FolderSource(root, chosen.images, chosen.left_out | named("link that leads nowhere", dangling))


def open_zip(path: Path, split: str, reading: int = READING) -> ZipSource:
    """Open all images in a zip file, in the order of their names.

    Raises:
        ValueError: if the file is damaged, or has no images or no such split; see `choose_images`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename: member for member in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        raise ValueError(f"{path} cannot be read as a zip file ({error}): copy or download it again") from error
    if reading > 1 and not any("/" in name for name in members):  # some Windows programs write backslashes
        members = {name.replace("\\", "/"): member for name, member in members.items()}
    chosen = choose_images(list(members), split, path, reading)
    return ZipSource(path, [members[name] for name in chosen.images], chosen.left_out)
