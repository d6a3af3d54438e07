"""`Source`, the interface to stored images, and the errors that a source raises."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image


class Source(Protocol):
    """A sequence of stored images with random access.

    A source only finds and opens images. `ImageDataset` checks, crops and resizes them, and adds their names to error
    messages. Any class with these four methods is a source; it does not have to inherit from this class. It may also
    have a dict `left_out` that counts what it does not read, by a short description. Worker processes read the source,
    so it must survive pickling and forking: open files on demand, not in `__init__`.

    For example, this source computes its images. It is registered under the name "gradients":

        import numpy as np
        from PIL import Image
        from spigan.data import DataConfig, open_dataset, register_source

        class Gradients:
            def __len__(self):
                return 100

            def name(self, index):
                return f"gradient {index}"

            def open(self, index):
                return Image.fromarray(np.full((32, 32, 3), index, dtype=np.uint8))

            def identity(self):
                yield b"gradients, version 1"

        register_source("gradients", lambda config, progress: Gradients())
        dataset = open_dataset(DataConfig(source="gradients"))
        dataset[7]  # uint8 tensor of shape [3, 32, 32]

    `Trainer` and `evaluate` then also accept `DataConfig(source="gradients")`.
    """

    def __len__(self) -> int:
        """Return the number of images, which must be at least 1."""

    def name(self, index: int) -> str:
        """Return the name of image `index` for error messages, such as "photos.zip!a.png" or "train.parquet row 17"."""

    def open(self, index: int) -> Image.Image:
        """Open image `index` (0 <= index < len) as a new Pillow image, which the caller closes.

        The pixels need not be decoded yet. For encoded images, use `spigan.data.decode.open_image`, which limits what
        Pillow may do with untrusted data.

        Raises:
            UnsuitableImage: if the image cannot be used. Other exceptions are reported as "cannot be read as an image".
        """

    def identity(self) -> Iterator[bytes]:
        """Yield bytes that identify the data without decoding them, such as names and sizes.

        They become part of `ImageDataset.fingerprint`, which a resumed run compares. Leave out anything that may change
        while the data stay the same, such as the path of the folder.
        """


class UnsuitableImage(Exception):
    """An image cannot be used. The message continues a sentence that starts with the image's name: "has 3 frames"."""


READING = 2
"""Version of the rules that choose the images of a source. A run records it, and always reads its images by the same
rules. Version 1 knew fewer suffixes and words for splits, and took every image of a folder with other files on top."""

SPLITS = {"train", "test", "val", "valid", "validation"}
"""Names of folders and tar files that reading 1 treats as splits."""

_SPLIT_WORDS = {
    "train": {"train", "training", "trn"},
    "test": {"test", "testing", "tst"},
    "val": {"val", "valid", "validation", "dev"},
}


def split_word(name: str) -> str | None:
    """Return the split ("train", "test" or "val") that a word stands for in any case; None for other words."""
    return next((split for split, words in _SPLIT_WORDS.items() if name.lower() in words), None)


def no_split(where: object, split: str, hint: str) -> ValueError:
    """Return the error for a split that a source does not have. `hint` continues it: "its only split is train"."""
    return ValueError(f"{where} has no split {split!r}: {hint}")


def require(module: str, package: str, extra: str | None = None) -> Any:
    """Import a module that only some sources need.

    Args:
        module: name to import.
        package: package that provides the module.
        extra: extra of spigan that installs the package, if any.

    Raises:
        ModuleNotFoundError: if the package is not installed. The message states how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        wanted = f'"spigan[{extra}]"' if extra else package
        raise ModuleNotFoundError(f"this source of images needs the package {package}: pip install {wanted}") from error
