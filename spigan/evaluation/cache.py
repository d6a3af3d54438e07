"""The user's cache: features of reference images, which evaluations store as safetensors files and reuse."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spigan.files import atomic_path, shorten


def load(path: Path, key: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Return the tensors that `save` wrote, or None if the file is missing, damaged or has another key.

    A damaged file causes a warning, and its contents are computed again.

    Args:
        path: file in the cache.
        key: key under which the file was saved.
        shapes: shape of each tensor that the file must hold. All values must be finite floats.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            # Check the header before reading anything, because its shapes decide how much memory reading takes.
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
    """Save tensors in the cache. If the file cannot be written, only warn, because a missing file only costs time."""
    try:
        with atomic_path(path) as scratch:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, scratch, {"key": key})
    except (SafetensorError, OSError) as error:
        warnings.warn(
            f"{path} cannot be cached ({error}): set SPIGAN_CACHE to a folder that you may write to",
            stacklevel=2,
        )
