"""Find the `Source` for `DataConfig.source`: in the tables `NAMES`, `FOLDERS` and `FILES`, and then on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from spigan.data.config import DataConfig
from spigan.data.sources.array import open_digits
from spigan.data.sources.base import Source
from spigan.data.sources.cifar import is_cifar_archive, is_cifar_folder, open_cifar
from spigan.data.sources.files import open_folder, open_zip
from spigan.data.sources.hub import CIFAR10, open_hub
from spigan.data.sources.lmdb import LMDBSource
from spigan.data.sources.parquet import has_parquet, open_parquet, parquet_file, parquet_files
from spigan.data.sources.tar import TarSource, tar_files
from spigan.files import is_hub_id, user_path

Open = Callable[[DataConfig, bool], Source]
OpenPath = Callable[[Path, DataConfig, bool], Source]

NAMES: dict[str, Open] = {
    "digits": lambda config, progress: open_digits(config.split),
    "cifar10": lambda config, progress: open_hub(CIFAR10, config.split, config.column),
}
"""Named sources. `register_source` adds to them."""

FOLDERS: list[tuple[Callable[[Path], bool], OpenPath]] = [
    (is_cifar_folder, lambda path, config, progress: open_cifar(path, config.split)),
    (has_parquet, lambda path, config, progress: open_parquet(parquet_files(path, config.split), config.column)),
    (lambda path: (path / "data.mdb").is_file(), lambda path, config, progress: LMDBSource(path)),
    (
        lambda path: any(path.glob("*.tar")),
        lambda path, config, progress: TarSource(tar_files(path, config.split), config.column, progress),
    ),
    (lambda path: True, lambda path, config, progress: open_folder(path, config.split)),
]
"""Kinds of folders: how to recognise and how to open each kind. The first kind that fits is used."""

FILES: list[tuple[Callable[[Path], bool], OpenPath]] = [
    (is_cifar_archive, lambda path, config, progress: open_cifar(path, config.split)),
    (lambda path: path.suffix == ".tar", lambda path, config, progress: TarSource([path], config.column, progress)),
    (
        lambda path: path.suffix == ".parquet",
        lambda path, config, progress: open_parquet(parquet_file(path, config.split), config.column),
    ),
    (lambda path: path.suffix == ".zip", lambda path, config, progress: open_zip(path, config.split)),
]
"""Kinds of files, in the same form."""


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


def find_source(config: DataConfig, progress: bool) -> Source:
    """Return the source of images that a configuration names.

    Args:
        config: the configuration. Its `source`, `split` and `column` are used.
        progress: whether to show a progress bar if this takes long.

    Raises:
        FileNotFoundError: if the source does not exist.
        ModuleNotFoundError: if a package that the source needs is not installed.
        ValueError: if the source is damaged or of an unknown kind, lacks the split or the column, or has no images.
    """
    source = config.source
    if source in NAMES:
        return NAMES[source](config, progress)
    path = user_path(source)
    for fits, open_path in FOLDERS if path.is_dir() else FILES if path.is_file() else []:
        if fits(path):
            return open_path(path, config, progress)
    if path.is_file():
        raise ValueError(
            f"{path} is not a source of images: expected a folder, .zip, .parquet, .tar or cifar-10-python.tar.gz; "
            "for a single image, pass its folder"
        )
    if is_hub_id(source) and path.suffix not in (".zip", ".parquet", ".gz", ".tgz", ".tar"):
        return open_hub(source, config.split, config.column)
    raise FileNotFoundError(
        f'source {source!r} does not exist: expected "digits", "cifar10", the path of a folder, .zip, .parquet, .tar '
        'or cifar-10-python.tar.gz, or a Hub dataset id "owner/name"'
    )
