"""What evaluations keep in the user's cache between runs: features of reference images. safetensors, never a pickle."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spigan.files import atomic_path, shorten


def cache_folder(folder: str | Path | None = None) -> Path:
    """`folder`, or $SPIGAN_CACHE, or $XDG_CACHE_HOME/spigan, or ~/.cache/spigan."""
    if folder is None:
        folder = os.environ.get("SPIGAN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spigan"
    return Path(folder).expanduser()


def load(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """What `save` wrote; None where there is nothing, of another key, or damaged: it is computed again then.

    Args:
        path: file of the cache.
        key: what it was saved under.
        shapes: of each tensor that it must hold; all must be finite floats.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            # Before anything is read: shapes that are announced are memory.
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                raise ValueError("it holds other tensors")
            tensors = {name: file.get_tensor(name) for name in shapes}
        kinds = (torch.float32, torch.float64)
        if not all(tensor.dtype in kinds and tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds other numbers than finite ones of 32 or 64 bits")
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({shorten(error)}): it is computed again", stacklevel=2)
        return None


def save(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors, whole or not at all; a cache that cannot be written costs time, nothing else."""
    try:
        with atomic_path(path) as scratch:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch, {"key": key})
    except (SafetensorError, OSError) as error:
        warnings.warn(f"{path} cannot be kept for later ({error}): set SPIGAN_CACHE to a folder of yours", stacklevel=2)
