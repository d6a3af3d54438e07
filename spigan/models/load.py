"""Load the model that the arguments `model` and `device` name: a bundled model, a folder, a run or a hub id."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import torch

from spigan.models.spigan import SPIGAN

BUNDLED_MODELS = ("digits", "cifar10-small")
"""Names of the models bundled with spigan. They were trained from the presets of the same names (docs/models.md). The
first is the default of `sample`."""

Model = SPIGAN | str | Path | None


@cache
def _bundled_model(name: str) -> SPIGAN:
    return SPIGAN.from_pretrained(Path(__file__).parents[1] / "assets" / name).requires_grad_(False)


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """Return the device with a name. None and "auto" mean cuda if available, else the CPU.

    Raises:
        ValueError: if the name is unknown, or this machine has no such device.
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
        raise ValueError(f"device {str(device)!r} was requested, but torch {torch.__version__} {seen}")
    return resolved


def load_model(model: Model = None, device: torch.device | str | None = None) -> SPIGAN:
    """Return the model that the argument `model` names.

    Args:
        model: a SPIGAN; the name of a bundled model, which takes precedence over a folder with that name in the working
            directory (`./name` and a `Path` are always folders); a folder or hub id for `SPIGAN.from_pretrained`; a
            run folder, for its exported model; or None for the bundled digits.
        device: device of the result. Default: the SPIGAN's own device, or cuda if available, else the CPU.

    Returns:
        `model` itself if it is a SPIGAN that is already on `device`. Otherwise a model that does not require gradients.

    Raises:
        FileNotFoundError: if there is no such model. The message lists the bundled models.
    """
    if isinstance(model, SPIGAN):
        here = next(model.parameters()).device
        # An empty tensor shows which device "cuda" currently stands for.
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
