"""The user's cache: features of reference images, which evaluations keep between runs as safetensors files."""

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
    """Return `folder`, or if None $SPIGAN_CACHE, $XDG_CACHE_HOME/spigan or ~/.cache/spigan, whichever is set first."""
    if folder is None:
        folder = os.environ.get("SPIGAN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spigan"
    return Path(folder).expanduser()


def load(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Return the tensors that `save` wrote, or None if the file is missing, damaged or has another key.

    A damaged file causes a warning; its contents are then computed again.

    Args:
        path: file of the cache.
        key: key that it was saved under.
        shapes: shape of each tensor that it must hold; all values must be finite floats.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            # Checked before anything is read: the header's shapes decide how much memory that takes.
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != shapes:
                raise ValueError("it holds unexpected tensors")
            tensors = {name: file.get_tensor(name) for name in shapes}
        kinds = (torch.float32, torch.float64)
        if not all(tensor.dtype in kinds and tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it must hold finite numbers of 32 or 64 bits")
        return tensors
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"{path} is damaged ({shorten(error)}) and will be computed again", stacklevel=2)
        return None


def save(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
    """Keep tensors in the cache. If the file cannot be written, only warn: it costs time, nothing else."""
    try:
        with atomic_path(path) as scratch:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch, {"key": key})
    except (SafetensorError, OSError) as error:
        warnings.warn(
            f"{path} cannot be kept for later ({error}): set SPIGAN_CACHE to a folder that you may write to",
            stacklevel=2,
        )
