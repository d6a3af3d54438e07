"""`loader`: an endless stream of shuffled batches, in an order that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from spigan.data.dataset import ImageDataset
from spigan.data.workers import load_batches


class InfiniteShuffle(torch.utils.data.Sampler[list[int]]):
    """Endless batches of indices: epoch after epoch of shuffled images. A batch may extend into the next epoch.

    The permutation of an epoch depends only on (seed, epoch). Therefore the batches after the first `start` images are
    always the same, no matter whether and where the earlier batches were drawn.

    Args:
        count: number of images, at least 1.
        batch_size: indices per batch, at least 1. It may exceed `count`.
        seed: seed of the order, not negative.
        start: number of images already used, not negative.
        part: which indices of each batch to yield. Default: all.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, count: int, batch_size: int, *, seed: int, start: int = 0, part: slice = slice(None)) -> None:
        for name, value, least in (
            ("count", count, 1),
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("start", start, 0),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more")
        self.count, self.batch_size, self.seed, self.start, self.part = count, batch_size, seed, start, part

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the order of the images in `epoch` (from 0), int64 [count]."""
        # RandomState is the only generator whose stream is guaranteed not to change between versions (NumPy's NEP 19).
        seeds = np.random.SeedSequence((self.seed, epoch))
        return np.random.RandomState(np.random.MT19937(seeds)).permutation(self.count)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = divmod(self.start, self.count)
        order = self.permutation(epoch)
        while True:
            batch = order[position : position + self.batch_size].tolist()
            position += len(batch)
            while len(batch) < self.batch_size:
                epoch += 1
                order = self.permutation(epoch)
                position = min(self.batch_size - len(batch), self.count)
                batch += order[:position].tolist()
            yield batch[self.part]


def loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    part: slice = slice(None),
    num_workers: int | None = None,
) -> Iterator[Tensor]:
    """Yield an endless stream of shuffled batches, uint8 [batch_size, C, H, W], in pinned memory if CUDA is available.

    Torch's global random generator is not used.

    Args:
        dataset: the images.
        batch_size: images per batch, at least 1.
        seed: seed of the order, not negative.
        start: number of images already used. The order continues after them.
        part: which images of each batch to load. Default: all.
        num_workers: number of worker processes that decode images. It does not change the images. Default: 0 for a
            cached data set, otherwise `dataset.workers`.

    Raises:
        ValueError: if a number is out of range, or an image that is not cached has become unreadable.
    """
    if num_workers is None:
        num_workers = 0 if dataset.cached else dataset.workers
    return load_batches(
        dataset,
        num_workers=num_workers,
        batch_sampler=InfiniteShuffle(len(dataset), batch_size, seed=seed, start=start, part=part),
        pin_memory=torch.cuda.is_available(),
    )
