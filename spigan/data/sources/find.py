"""Find the `Source` for `DataConfig.source`: by a name in `NAMES`, by the kind of folder or file, or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from spigan.data.config import DataConfig
from spigan.data.decode import IMAGE_SUFFIXES
from spigan.data.sources.array import open_digits
from spigan.data.sources.base import READING, Source
from spigan.data.sources.cifar import is_cifar_archive, is_cifar_folder, open_cifar
from spigan.data.sources.files import open_folder, open_zip
from spigan.data.sources.hub import CIFAR10, open_hub
from spigan.data.sources.kinds import UNPACK
from spigan.data.sources.lmdb import LMDBSource, lmdb_folder
from spigan.data.sources.parquet import has_images, open_parquet, parquet_file, parquet_files
from spigan.data.sources.tar import TarSource, tar_files
from spigan.files import is_hub_id, printable, user_path

Open = Callable[[DataConfig, bool], Source]

NAMES: dict[str, Open] = {
    "digits": lambda config, progress: open_digits(config.split),
    "cifar10": lambda config, progress: open_hub(CIFAR10, config.split, config.column),
}
"""Named sources. `register_source` adds to them."""


def register_source(name: str, open_source: Open) -> None:
    """Make `DataConfig(source=name)` open images with your own function.

    Register the source in the program that trains or evaluates, before it opens data. A resumed run needs it too.

    Args:
        name: name of the source. It takes precedence over a file or folder with that name.
        open_source: function that returns a `Source`. It is called with the `DataConfig` and with a bool, whether to
            show progress bars.

    Raises:
        ValueError: if the name is already taken.
    """
    if name in NAMES:
        raise ValueError(f"there is a source called {name!r} already: choose another name")
    NAMES[name] = open_source


def find_source(config: DataConfig, progress: bool, reading: int = READING) -> Source:
    """Return the source of images that a configuration names.

    Args:
        config: the configuration. Its `source`, `split` and `column` are used.
        progress: whether to show a progress bar if this takes long.
        reading: version of the rules that choose the images; see `READING`.

    Raises:
        FileNotFoundError: if the source does not exist.
        ModuleNotFoundError: if a package that the source needs is not installed.
        ValueError: if the source is damaged or of an unknown kind, lacks the split or the column, or has no images.
    """
    source = config.source
    if source in NAMES:
        return NAMES[source](config, progress)
    path = user_path(source)
    if path.is_dir():
        return _open_folder(path, config, progress, reading)
    if path.is_file():
        return _open_file(path, config, progress, reading)
    identifier, _, configuration = source.partition(":")
    if is_hub_id(identifier) and path.suffix not in (".zip", ".parquet", ".gz", ".tgz", ".tar"):
        return open_hub(identifier, config.split, config.column, configuration or None)
    raise FileNotFoundError(
        f'source {source!r} does not exist: expected "digits", "cifar10", the path of a folder, .zip, .parquet, .tar '
        'or cifar-10-python.tar.gz, or a Hub dataset id "owner/name" or "owner/name:configuration"'
    )


def _open_folder(path: Path, config: DataConfig, progress: bool, reading: int) -> Source:
    """Open a folder, whose kind its files tell."""
    if is_cifar_folder(path):
        return open_cifar(path, config.split)
    if parquet := parquet_files(path, reading):
        nested = reading > 1 and not has_images(parquet[0], config.column) and _has_pictures(path)
        if not nested:  # otherwise the table describes the pictures
            _refuse_pictures(path, "parquet", parquet[0], reading)
            return open_parquet(parquet_files(path, reading, config.split), config.column)
    if (path / "data.mdb").is_file():
        return LMDBSource(path, config, reading)
    if reading > 1 and (found := lmdb_folder(path, config.split)):
        return LMDBSource(found, config)
    if tar := next(path.glob("*.tar"), None):
        _refuse_pictures(path, "tar", tar, reading)
        return TarSource(tar_files(path, config.split, reading), config.column, progress, reading)
    return open_folder(path, config.split, reading)


def _open_file(path: Path, config: DataConfig, progress: bool, reading: int) -> Source:
    suffix = path.suffix.lower()
    if is_cifar_archive(path):
        return open_cifar(path, config.split)
    if suffix == ".tar":
        return TarSource([path], config.column, progress, reading)
    if suffix == ".parquet":
        return open_parquet(parquet_file(path, config.split), config.column)
    if suffix == ".zip":
        return open_zip(path, config.split, reading)
    if suffix in UNPACK:
        raise ValueError(
            f"{path} is packed in a way that gives no access to single images: unpack it with `{UNPACK[suffix]} "
            f"{path.name}`, and pass the result"
        )
    raise ValueError(
        f"{path} is not a source of images: expected a folder, .zip, .parquet, .tar or cifar-10-python.tar.gz; "
        "for a single image, pass its folder"
    )


def _pictures(path: Path) -> list[str]:
    return [name for name in os.listdir(path) if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]


def _has_pictures(path: Path) -> bool:
    return any(name.lower().endswith(IMAGE_SUFFIXES) for _, _, files in os.walk(path) for name in files)


def _refuse_pictures(path: Path, kind: str, file: Path, reading: int) -> None:
    """Raise ValueError if pictures lie beside the parquet or tar files of a folder: either may be what is meant."""
    if reading > 1 and (pictures := _pictures(path)):
        raise ValueError(
            f"{path} has {kind} files, such as {file.name}, and {len(pictures)} pictures, such as "
            f"{printable(min(pictures))}: pass {file} to read that file, or move the pictures or the {kind} files to "
            "another folder"
        )
