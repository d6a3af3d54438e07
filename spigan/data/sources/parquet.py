"""Images in a column of parquet files, as the Hugging Face Hub and `spigan data convert` store them.

`open_parquet` chooses how to read the rows. Small files are kept in memory with their images encoded (`RowSource`).
Larger files are read in place, one row group at a time (`RowGroupSource`). Files with large row groups are first
written to an Arrow file in the cache of `datasets`, which is mapped into memory (`RowSource` again). `open_row` turns
the value of a row into an image.
"""

from __future__ import annotations

import io
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spigan.data import limits
from spigan.data.decode import open_image
from spigan.data.sources.base import READING, Source, UnsuitableImage, no_split, require, split_word
from spigan.files import folders_in, printable

if TYPE_CHECKING:
    from PIL import Image


class RowSource:
    """Images in the rows of Arrow columns.

    Args:
        columns: for every file, its name in error messages and its Arrow column. For the values, see `open_row`.
        open_paths: whether a value may be the path of a file, as in data sets downloaded from the Hub.
    """

    def __init__(self, columns: list[tuple[str, Any]], *, open_paths: bool = False) -> None:
        self._columns, self._open_paths = columns, open_paths
        self._ends = list(accumulate(len(column) for _, column in columns))

    def __len__(self) -> int:
        return self._ends[-1]

    def _locate(self, index: int) -> tuple[str, Any, int]:
        part = bisect_right(self._ends, index)
        title, column = self._columns[part]
        return title, column, index - (self._ends[part] - len(column))

    def name(self, index: int) -> str:
        title, _, row = self._locate(index)
        return f"{title} row {row}"

    def open(self, index: int) -> Image.Image:
        _, column, row = self._locate(index)
        return open_row(column[row].as_py(), open_paths=self._open_paths)

    def identity(self) -> Iterator[bytes]:
        for title, column in self._columns:
            yield f"{Path(title).name}\0{len(column)}\0{column.nbytes}\0".encode()


class RowGroupSource:
    """Images in a column of parquet files, read a row group at a time. Only the files' footers are kept in memory."""

    def __init__(self, files: list[Path], footers: list[Any], column: str) -> None:
        self._files, self._footers, self._column = files, footers, column
        groups = [(file, group) for file, footer in enumerate(footers) for group in range(footer.num_row_groups)]
        self._groups = np.array(groups, dtype=np.int64)  # [G, 2]
        self._ends = np.cumsum([footers[file].row_group(group).num_rows for file, group in groups])
        self._firsts = np.cumsum([0, *(footer.num_rows for footer in footers)])  # first row of each file
        self._checked: set[int] = set()  # groups
        # The group that each thread read last, and its column. They are reused when images are read in order.
        self._last = threading.local()

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
            # The file is opened for every group, because threads and workers may not share an open file.
            with parquet.ParquetFile(self._files[file], metadata=self._footers[file]) as opened:
                if at not in self._checked:
                    _check_unpacked(opened, self._column, [group])
                    self._checked.add(at)
                rows = opened.read_row_group(group, columns=[self._column], use_threads=False).column(0)
            self._last.group, self._last.rows = at, rows
        row = index - int(self._ends[at]) + len(self._last.rows)
        return open_row(self._last.rows[row].as_py())

    def identity(self) -> Iterator[bytes]:
        for file, footer in zip(self._files, self._footers, strict=True):
            yield f"{file.name}\0{footer.num_rows}\0{footer.serialized_size}\0{file.stat().st_size}\0".encode()


def open_row(value: Any, *, open_paths: bool = False) -> Image.Image:
    """Open the image of a row.

    Args:
        value: bytes of an encoded image, or {"bytes": ..., "path": ...}, as the Hub stores images.
        open_paths: whether to open the file at "path" if there are no bytes. Do not use this with untrusted files: the
            path may point to any file on this machine.

    Raises:
        UnsuitableImage: if the row holds no image, or a path that is not opened.
        Exception: see `open_image`.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is not None:
        return open_image(io.BytesIO(data))
    if value is None or not value.get("path"):
        raise UnsuitableImage("holds no image: remove the row")
    if not open_paths:
        raise UnsuitableImage(
            "holds a path instead of an image, which is not opened because it may point to any file: use the folder of "
            "the images as source, or store their bytes"
        )
    return open_image(Path(value["path"]))


def open_parquet(files: list[Path], column: str | None) -> Source:
    """Open a column of images in parquet files.

    Args:
        files: the files, in order.
        column: name of the column. None: the only one that holds images.

    Raises:
        ModuleNotFoundError: if a package that reads parquet files is not installed.
        ValueError: if a file is damaged, the column does not exist, the images are in differently named columns, or
            there are no rows.
    """
    names: list[str] = []
    footers: list[Any] = []
    for file in files:
        with _opened(file) as table:
            names.append(image_column(table.schema_arrow, column, str(file)))
            footers.append(table.metadata)
    if not any(footer.num_rows for footer in footers):
        raise ValueError(f"{', '.join(map(str, files))} has no rows: expected images")
    name = names[0]
    if other := next((file for file, found in zip(files, names, strict=True) if found != name), None):
        raise ValueError(
            f"{files[0]} and {other} have images in different columns, {sorted(set(names))}: set `column` to the name "
            "of one that all files have, or move the other files away"
        )
    size = sum(_column_bytes(footer, name) for footer in footers)
    if size <= limits.ENCODED_CACHE_BYTES:
        # With pyarrow, not with `datasets`. For the 50,000 encoded images of CIFAR-10 it takes 0.3 to 0.7 s instead of
        # 1.2 s, including imports, and does not write a second copy to the user's cache.
        return RowSource([(str(file), _read_column(file, name)) for file in files])
    if size <= sum(footer.num_row_groups for footer in footers) * limits.ROW_GROUP_BYTES:
        return RowGroupSource(files, footers, name)
    # Opening one image would mean reading a large row group. Instead, `datasets` writes an Arrow file to its cache,
    # once, and maps it into memory.
    datasets = require("datasets", "datasets")
    rows = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train", columns=[name])
    return RowSource([(str(files[0].parent), rows.with_format("arrow")[:].column(name))])


def has_images(file: Path, column: str | None) -> bool:
    """Return whether a parquet file has a column of images. A table of metadata has none."""
    arrow, parquet = require("pyarrow", "pyarrow"), require("pyarrow.parquet", "pyarrow")
    try:
        return column is not None or any(_columns(parquet.read_schema(file)))
    except (arrow.ArrowException, OSError):  # damaged, which is reported when it is opened
        return True


def parquet_files(root: Path, reading: int = READING, split: str | None = None) -> list[Path]:
    """Return a folder's parquet files, sorted: those at its top and in data/, else those in folders of splits.

    Args:
        root: the folder. Folders of splits, such as train/, may also lie in its only folder, as on the Hub.
        reading: version of the rules; see `READING`.
        split: return only the files of this split. None: all files, or an empty list if there are none.

    Raises:
        ValueError: if a split is given that is not there, or names (...-of-00003) show that some files are missing.
    """
    files = sorted([*root.glob("*.parquet"), *root.glob("data/*.parquet")])
    splits = {file: split_of(file) for file in files}
    if not files and reading > 1:
        splits = {
            file: file.parent.name for folder in _split_folders(root) for file in sorted(folder.glob("*.parquet"))
        }
    if split is None:
        return list(splits)
    word = split_word(split)
    found = [file for file, name in splits.items() if name == split] or [
        file for file, name in splits.items() if word and split_word(name) == word and reading > 1
    ]
    if not found:
        raise no_split(
            root,
            split,
            f"the splits of its parquet files are {sorted(set(splits.values()))}; expected names such as "
            f"{split}-00000-of-00001.parquet, or pass the path of one file",
        )
    total = re.search(r"-of-(\d+)", found[0].name)
    if total and int(total[1]) != len(found):
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{root}: expected {int(total[1])} parquet files of {split!r}, got {names}: add the others")
    return found


def _split_folders(root: Path) -> list[Path]:
    """Return the folders of parquet files that are named after splits, in `root` or in its only such folder."""

    def inside(folder: Path) -> list[Path]:
        return [path for path in folders_in(folder) if split_word(path.name) and any(path.glob("*.parquet"))]

    if found := inside(root):
        return found
    configurations = {path.name: found for path in folders_in(root)[:100] if (found := inside(path))}
    if len(configurations) > 1:
        raise ValueError(
            f"{root} has several configurations, {', '.join(map(printable, configurations))}: pass the folder of one"
        )
    return next(iter(configurations.values()), [])


def parquet_file(path: Path, split: str) -> list[Path]:
    """Return [path], after checking that the name of the file does not give another split.

    Raises:
        ValueError: if it does. Every file may be used as "train".
    """
    if split not in ("train", split_of(path)):
        raise ValueError(f"{path} holds the split {split_of(path)!r}, not {split!r}: pass another file")
    return [path]


def split_of(file: Path) -> str:
    """Return the split that a parquet file's name gives: "train" for train-00000-of-00003.parquet or train.parquet."""
    return re.split(r"-\d+-of-\d+", file.stem)[0]


def image_column(schema: Any, wanted: str | None, where: str) -> str:
    """Return the name of the column of images in an Arrow schema.

    Args:
        schema: the schema.
        wanted: name of the column, which may also hold plain bytes. None: the only column of {bytes, path} values, or
            else the only one of plain bytes.
        where: name of the file, for error messages.

    Raises:
        ValueError: if there is no such column, or if `wanted` is None and the schema has no or several columns of
            images.
    """
    images, binary = _columns(schema)
    if wanted is None and len(images or binary) == 1:
        return str((images or binary)[0])
    if wanted in images + binary:
        return str(wanted)
    problem = f"has {len(images)} columns of images" if wanted is None else f"has no column of images called {wanted!r}"
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise ValueError(f"{where} {problem}: set `column` (--column) to one of its columns, {columns}")


def _columns(schema: Any) -> tuple[list[str], list[str]]:
    """Return the names of the columns of {bytes, path} values, and of those of plain bytes."""
    types = require("pyarrow", "pyarrow").types
    images = [
        field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    return images, [field.name for field in schema if types.is_binary(field.type) or types.is_large_binary(field.type)]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a parquet file, whose name errors inside the block then give."""
    arrow, parquet = require("pyarrow", "pyarrow"), require("pyarrow.parquet", "pyarrow")
    try:
        with parquet.ParquetFile(file) as table:
            yield table
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as a parquet file ({error}): copy or download it again") from error


def _read_column(file: Path, name: str) -> Any:
    """Read a column of a file, with its images encoded, into memory."""
    from pyarrow import ArrowInvalid

    with _opened(file) as table:
        _check_unpacked(table, name, range(table.num_row_groups))
        images = table.read(columns=[name]).column(name)
        if len(images) != table.metadata.num_rows:
            raise ArrowInvalid(f"{len(images)} rows, but {table.metadata.num_rows} in its footer")
    return images


def _check_unpacked(table: Any, name: str, groups: Sequence[int]) -> None:
    """Raise ArrowInvalid if a column of row groups takes more than `limits.MAX_COLUMN_BYTES` of memory.

    Footers may lie, and a few bytes may stand for any number of copies of a large value. Therefore the column is
    unpacked once, row by row. This takes 0.3 s for the 50,000 images of CIFAR-10. Four rows at a time would take 0.1 s,
    but twice the memory for values of 600 MB.
    """
    from pyarrow import ArrowInvalid

    size = 0
    for rows in table.iter_batches(batch_size=1, row_groups=list(groups), columns=[name], use_threads=False):
        size += rows.nbytes
        if size > limits.MAX_COLUMN_BYTES:
            raise ArrowInvalid(f"the column {name!r} unpacks to more than {limits.MAX_COLUMN_BYTES} bytes")


def _column_bytes(footer: Any, name: str) -> int:
    """Return the number of bytes of a column in memory, according to the footer of the file."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    chunks = (group.column(index) for group in groups for index in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{name}."))
