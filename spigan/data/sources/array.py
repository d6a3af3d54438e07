"""Images that are already decoded, such as scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from spigan.data.sources.base import no_split, require

if TYPE_CHECKING:
    from PIL import Image


class ArraySource:
    """Images in an array: uint8 [N, H, W] (grey) or [N, H, W, 3] (RGB)."""

    def __init__(self, title: str, images: np.ndarray) -> None:
        self._title, self._images = title, images

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"{self._title} image {index}"

    def open(self, index: int) -> Image.Image:
        from PIL import Image

        return Image.fromarray(self._images[index])

    def identity(self) -> Iterator[bytes]:
        yield np.ascontiguousarray(self._images).tobytes()


def open_digits(split: str) -> ArraySource:
    """Open scikit-learn's 1,797 grey digits of 8 x 8 pixels, whose values 0..16 are scaled to 0..255.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
        ValueError: if `split` is not "train".
    """
    if split != "train":
        raise no_split("digits", split, 'its only split is "train"')
    digits = require("sklearn.datasets", "scikit-learn").load_digits()
    return ArraySource("digits", np.rint(digits.images * (255 / 16)).astype(np.uint8))
