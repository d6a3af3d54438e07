"""What an argument `model` means: a bundled model, a folder, a run, a hub id; and on which device."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch

from spigan.models.spigan import SPIGAN

BUNDLED_MODELS = ("digits", "cifar10-small")
"""Names of the models that come with spigan, trained by this project from the presets of these names (docs/models.md);
the first is that of `sample(model=None)`."""

Model = SPIGAN | str | Path | None


@cache
def _bundled_model(name: str) -> SPIGAN:
    return SPIGAN.from_pretrained(Path(__file__).parents[1] / "assets" / name).requires_grad_(False)


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """The device that a name means; None and "auto": cuda where there is one, else the CPU.

    Raises:
        ValueError: no such device, or none here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1, ..., got {device!r}") from None
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        seen = f"sees {count or 'no'} CUDA device{'s' * (count > 1)}"
        raise ValueError(f"device {str(device)!r} was asked for, but torch {torch.__version__} {seen}")
    return resolved


def load_model(model: Model = None, device: torch.device | str | None = None) -> SPIGAN:
    """The model that an argument `model` means.

    Args:
        model: a SPIGAN; the name of a bundled model, which comes before a folder of that name in the working directory
            (`./name` and a `Path` are always folders); a folder or hub id for `SPIGAN.from_pretrained`; a run folder,
            whose exported model is taken; None for the bundled digits.
        device: where it shall be; default: where a SPIGAN is, else cuda where there is one, else the CPU.

    Returns:
        The model; the one that was passed where it is on `device` already, else a copy.

    Raises:
        FileNotFoundError: no such model; the bundled ones are listed.
    """
    if isinstance(model, SPIGAN):
        here = next(model.parameters()).device
        # An empty tensor knows which device "cuda" is at the moment.
        if device is None or here == torch.empty(0, device=resolve_device(device)).device:
            return model
        return copy.deepcopy(model).to(resolve_device(device))
    device = resolve_device(device)
    name = BUNDLED_MODELS[0] if model is None else str(model)
    if name in BUNDLED_MODELS and not isinstance(model, Path):
        return load_model(_bundled_model(name), device)
    if "/" not in name and not Path(name).is_dir():
        raise FileNotFoundError(
            f"model {name!r} is neither an existing folder nor a hub id such as user/name nor a bundled model "
            f"({', '.join(BUNDLED_MODELS)})"
        )
    exported = Path(name) / "model"
    return SPIGAN.from_pretrained(exported if exported.is_dir() else name, device=device).requires_grad_(False)
