"""Leave out images that cannot be used: `DataConfig.skip`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from spigan.data.config import DataConfig, source_name
from spigan.data.decode import ImageReader
from spigan.data.sources.base import Source

if TYPE_CHECKING:
    from PIL import Image


class Kept:
    """A source without some of its images, given by their indices.

    Raises:
        ValueError: if none are left.
    """

    def __init__(self, source: Source, skipped: Sequence[int]) -> None:
        self._source = source
        self._kept = np.setdiff1d(np.arange(len(source)), np.asarray(skipped, dtype=np.int64))
        if not len(self._kept):
            raise ValueError(
                f"all {len(source)} images are to be skipped by the run's data.json: restore them, or start a new run"
            )

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, index: int) -> str:
        return self._source.name(int(self._kept[index]))

    def open(self, index: int) -> Image.Image:
        return self._source.open(int(self._kept[index]))

    def identity(self) -> Iterator[bytes]:
        yield from self._source.identity()
        yield self._kept.tobytes()


def find_broken(source: Source, config: DataConfig, progress: bool) -> list[int]:
    """Return the indices of the images that cannot be used.

    Raises:
        ValueError: if these are half of the images or more, which is rather a wrong option than damage. The message
            has the first error.
    """
    from tqdm import tqdm

    reader, broken, first = ImageReader(source, config), [], ""
    for index in tqdm(range(len(source)), f"checking {source_name(config)}", unit="img", delay=2, disable=not progress):
        try:
            with reader.opened(index) as image:
                reader.square(image)
                if reader.channels is None:
                    reader.require_like(image)
        except ValueError as error:
            first = first or str(error)
            broken.append(index)
    if len(broken) * 2 >= len(source):
        raise ValueError(f"data.skip would leave out {len(broken)} of {len(source)} images; the first error: {first}")
    return broken
