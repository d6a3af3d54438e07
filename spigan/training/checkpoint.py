"""Checkpoints: safetensors files with all tensors of a run, and with its counters as JSON in the metadata.

A checkpoint is written to a temporary file, which is then renamed. If the process is killed, the last good checkpoint
remains.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spigan.files import atomic_path, shorten

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{8,})\.safetensors")


def checkpoint_path(run_dir: Path, iteration: int) -> Path:
    """Return the path of the checkpoint of an iteration."""
    return run_dir / "checkpoints" / f"checkpoint-{iteration:08d}.safetensors"


def checkpoints(run_dir: Path) -> list[Path]:
    """Return all checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in (run_dir / "checkpoints").glob("*.safetensors") if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None if there is none."""
    return next(reversed(checkpoints(run_dir)), None)


def remove_scratch(run_dir: Path) -> None:
    """Delete unfinished files, left by a process that was killed while writing them."""
    patterns = (
        *("checkpoints/.checkpoint-*", ".samples-*", ".reals.png-*", ".*.jsonl-*", ".*.json-*", "failed/.*-*"),
        *("best/.metrics.json-*", "best/.saving-*", "model/.saving-*"),
    )
    for path in (path for pattern in patterns for path in run_dir.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and JSON-serialisable counters to a file. The file is written completely or not at all.

    Raises:
        OSError: if the file cannot be written, for example because the disk is full.
    """
    metadata = {"format": "pt", "spigan_checkpoint": str(FORMAT), "state": json.dumps(state)}
    with atomic_path(path) as scratch:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch, metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and counters that `save_checkpoint` wrote.

    Raises:
        ValueError: if the file is damaged, or is not a checkpoint of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("spigan_checkpoint") != str(FORMAT):
                raise ValueError(f"{path} is not a spigan checkpoint of format {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({shorten(error)}): remove it to resume from the "
            "checkpoint before it"
        ) from error
    try:
        state = json.loads(metadata["state"])
        if not isinstance(state, dict):
            raise ValueError("expected a JSON object")
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"the counters in {path} cannot be read ({type(error).__name__}: {error})") from error
    return tensors, state


def counter(state: dict[str, Any], name: str) -> int:
    """Return a count from the counters of a checkpoint.

    Raises:
        KeyError: if the counter is missing.
        ValueError: if the counter is not a non-negative integer.
    """
    value = state[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**62:
        raise ValueError(f"{name} must be a non-negative integer, got {shorten(repr(value))}")
    return value


def seconds(state: dict[str, Any], name: str) -> float:
    """Return a duration in seconds from the counters of a checkpoint.

    Raises:
        KeyError: if the counter is missing.
        ValueError: if the counter is not a duration.
    """
    value = state[name]
    if not isinstance(value, (int, float)) or not 0 <= value <= 1e12 or math.isnan(value):
        raise ValueError(f"{name} must be a number of seconds, got {shorten(repr(value))}")
    return float(value)


def series(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """Return the values of a list that a checkpoint stores as one tensor, or an empty list if it has no such tensor.

    Raises:
        ValueError: if the tensor is not a one-dimensional tensor of floats.
    """
    values = tensors.get(name, torch.empty(0))
    if values.ndim != 1 or not values.is_floating_point():
        raise ValueError(f"{shorten(name)} must be a list of floats, got {values.dtype} {list(values.shape)}")
    return list(values.unbind(0))


def check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError unless `tensors` has all names in `expected`, with the same shapes and dtypes."""
    problems = [f"it lacks {name!r}" for name in expected if name not in tensors]
    problems += [
        f"{name} is {found.dtype} {list(found.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
        for name, tensor in expected.items()
        if (found := tensors.get(name)) is not None and (found.shape, found.dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        raise ValueError(f"the checkpoint does not fit the run's configuration: {'; '.join(problems[:5])}")


def module_tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with `prefix.` before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}


def load_module(prefix: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors that `module_tensors` returned.

    Raises:
        ValueError: if names, shapes or dtypes differ from those expected.
    """
    start = prefix + "."
    check_tensors(module_tensors(prefix, module), tensors)  # load_state_dict would cast dtypes
    try:
        module.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the run's configuration: {error}") from error


def optimizer_tensors(prefix: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's state, with names of the form `prefix.<parameter index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{index}.{name}": tensor for index, values in state.items() for name, tensor in values.items()}


def load_optimizer(prefix: str, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned into an Adam optimiser, which keeps its hyperparameters.

    Raises:
        ValueError: if names, shapes or dtypes differ from those expected.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found = {key: tensor for key, tensor in tensors.items() if key.startswith(prefix + ".")}
    expected: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameters):
        start = f"{prefix}.{index}."
        if any(key.startswith(start) for key in found):  # otherwise the parameter has had no step yet
            expected[start + "step"] = torch.zeros((), dtype=torch.float32)
            expected |= {start + name: parameter for name in ("exp_avg", "exp_avg_sq")}
    check_tensors(expected, found)
    if unknown := [shorten(key) for key in found if key not in expected]:
        raise ValueError(f"the checkpoint does not fit the run's configuration: {unknown[0]} belongs to no parameter")
    for key, tensor in found.items():
        number, name = key.removeprefix(prefix + ".").split(".")
        if tensor.ndim:  # a moment; the fused optimiser needs it in the memory layout of its parameter
            tensor = torch.empty_like(parameters[int(number)]).copy_(tensor)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
