"""Seeds: one integer for each image."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from torch import Tensor


def resolve_seeds(n: int | None, seed: int | Sequence[int] | Tensor) -> list[int]:
    """Return the seeds of n images.

    Args:
        n: number of images. Default: 16, or the number of seeds in a list.
        seed: an int s for the seeds s, s + 1, ..., s + n - 1; or a list of n seeds.

    Raises:
        ValueError: if n differs from the length of the list, or a seed is out of range.
        TypeError: if a seed is not an integer.
    """
    if isinstance(seed, (int, np.integer)):
        n = 16 if n is None else n
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        seeds = list(range(int(seed), int(seed) + n))
    else:
        if isinstance(seed, Tensor) and seed.ndim == 1:
            seed = seed.tolist()  # one transfer from the GPU instead of one for each seed
        seeds = [operator.index(s) for s in seed]
        if n is not None and n != len(seeds):
            raise ValueError(f"n is {n}, but {len(seeds)} seeds were given: leave out n")
    if bad := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"seeds must be in [0, 2**63), got {bad[0]}")
    return seeds
