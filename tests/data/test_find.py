"""Which source is chosen, how to add one, and sources that do not exist."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data_helpers import open_source, picture, write_folder, write_parquet, write_zip
from PIL import Image

from spigan.data import DataConfig, Source, UnsuitableImage, loader, open_dataset, register_source
from spigan.data.sources import find


@pytest.mark.parametrize("source", ["no-such-thing", "/no/such/folder", "./no/such", "no/such.zip", "a/b/c"])
def test_missing_source(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{source!r} does not exist: expected \"digits\", \"cifar10\""):
        open_source(source)


def test_sources_without_images(tmp_path: Path) -> None:
    write_folder(tmp_path, {"empty/.keep": b"", "a.png": b"", "b.zip": b"x", "c.parquet": b"x", "d.tar.gz": b"x"})
    for name, message in {
        "empty": "has no images in it",
        "a.png": "is not a source of images.*pass its folder",
        "b.zip": "cannot be read as a zip file",
        "c.parquet": "cannot be read as a parquet file",
        "d.tar.gz": "cannot be read as a tar archive",
    }.items():
        with pytest.raises(ValueError, match=f"{name} {message}"):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match=r"e\.zip has no images in it"):
        open_source(write_zip(tmp_path / "e.zip", {"notes.txt": b""}))
    with pytest.raises(ValueError, match=r"f\.parquet has no rows"):
        open_source(write_parquet(tmp_path / "f.parquet", []))


# A source of one's own ------------------------------------------------------------------------------------------------


@pytest.fixture
def _names_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find, "NAMES", dict(find.NAMES))


@pytest.mark.usefixtures("_names_are_restored")
def test_the_example_of_a_source_works() -> None:
    """The code in the docstring of `Source`, as a reader would copy it."""
    documentation = inspect.getdoc(Source) or ""
    code = documentation[documentation.index("import numpy") : documentation.index("`Trainer` and")]
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent("    " + code), namespace)
    dataset = namespace["dataset"]
    assert (dataset.name, len(dataset), dataset.channels, dataset.resolution) == ("gradients", 100, 3, 32)
    assert (dataset[7] == 7).all()
    # On demand and in workers, as for any other source.
    config = DataConfig(source="gradients", cache="none", resolution=8)
    batches = loader(open_dataset(config, progress=False), batch_size=4, seed=0, num_workers=1)
    assert next(batches).shape == (4, 3, 8, 8)


class Broken:
    """Two images, the second of which cannot be used."""

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return f"number {index}"

    def open(self, index: int) -> Image.Image:
        if index:
            raise UnsuitableImage("is out of order: call the service")
        return picture(0)

    def identity(self) -> Iterator[bytes]:
        yield b"broken"


@pytest.mark.usefixtures("_names_are_restored")
def test_errors_of_a_registered_source_name_the_image() -> None:
    register_source("service", lambda config, progress: Broken())
    with pytest.raises(ValueError, match=r"^number 1 is out of order: call the service \(`spigan data check` lists"):
        open_source("service")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_registered_names_are_unique(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is a source called '{name}' already"):
        register_source(name, lambda config, progress: Broken())
