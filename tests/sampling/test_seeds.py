"""Seeds of images."""

from __future__ import annotations

import torch

from spigan.sampling import resolve_seeds


def test_resolve_seeds() -> None:
    assert resolve_seeds(3, 5) == [5, 6, 7]
    assert resolve_seeds(None, 0) == list(range(16))
    assert resolve_seeds(None, [4, 4]) == resolve_seeds(2, (4, 4)) == [4, 4]
    assert resolve_seeds(None, torch.tensor([4, 1])) == [4, 1]  # type: ignore[arg-type]
