"""Grid files, which define the arms of an ablation study."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spigan.choices import did_you_mean
from spigan.config import TrainConfig, describe_problems
from spigan.files import read_json, read_text, shorten
from spigan.presets import preset

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILT_IN = Path(__file__).parents[1] / "assets" / "grids"
"""Folder of the bundled grid files: table5 (the paper's Table 5) and digits (a small study)."""

MAX_RUNS = 1000


class GridFile(BaseModel):
    """Contents of a grid file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("digits", description="preset from which every arm starts")
    base: dict[str, Any] = Field({}, description="fields of TrainConfig that all arms share")
    arms: dict[str, dict[str, Any]] = Field({}, description="fields of TrainConfig for each arm, by the arm's name")
    product: dict[str, list[Any]] = Field(
        {},
        description='values of fields ("intervals", "model.ode_steps"); each combination is added to each arm, if any',
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        [], description="seeds with which to train each arm; the table shows the mean and the spread over them"
    )
    budget: list[Annotated[float, Field(gt=0)]] = Field(
        [],
        description="seconds for which to train each run (see total_seconds), instead of total_kimg; with several, "
        "increasing values, only the better half of the arms continues after each (successive halving)",
    )
    metric: str = Field("FD-ResNet56", description="column of metrics.jsonl, or otherwise of stats.jsonl")
    better: Literal["lower", "higher"] | None = Field(
        None, description="which values of the metric are better; None if neither, as for a loss"
    )


@dataclass(frozen=True)
class Study:
    """An ablation study, read from a grid file.

    Attributes:
        preset: preset from which the arms start.
        runs: configurations of the runs, by name, which is also the name of the run folder.
        arms: names of the runs of each arm, which differ in the seed alone, by the arm's name.
        budget: seconds after each of which only the better half of the arms continues; the last is the end.
        metric: column of metrics.jsonl or stats.jsonl to report.
        better: which values of the metric are better; None if neither.
    """

    preset: str
    runs: dict[str, TrainConfig]
    arms: dict[str, list[str]]
    budget: tuple[float, ...]
    metric: str
    better: Literal["lower", "higher"] | None


def grid_path(grid: str) -> Path:
    """Return the path of a grid file.

    Args:
        grid: a path, or the name of a bundled grid.

    Raises:
        FileNotFoundError: if there is neither a file nor a bundled grid with that name.
    """
    names = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    if grid in names and not Path(grid).is_file():
        return BUILT_IN / f"{grid}.toml"
    if not Path(grid).is_file():
        raise FileNotFoundError(
            f"{grid} is neither a file nor a bundled grid ({', '.join(names)}){did_you_mean(grid, names)}"
        )
    return Path(grid)


def read_grid(path: Path) -> Study:
    """Read a grid file.

    Args:
        path: a TOML file, or a JSON file (.json), which can contain null.

    Raises:
        ValueError: if the file has the wrong format or does not describe a valid study. The message names the arm and
            the field.
    """
    try:
        return _study(path, read_json(path) if path.suffix.lower() == ".json" else _toml(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def _toml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _study(path: Path, content: dict[str, Any]) -> Study:
    try:
        file = GridFile.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_problems(error, GridFile)}") from error
    count = max(1, len(file.arms)) * math.prod(map(len, file.product.values())) * max(1, len(file.seeds))
    if count > MAX_RUNS:
        raise ValueError(f"{path} has {shorten(count)} runs; at most {MAX_RUNS} are allowed")
    _check_budget(path, file)
    changes = _combinations(file)
    if not changes:
        raise ValueError(f"{path} has no arms: add [arms.NAME] tables or a [product]")
    runs: dict[str, TrainConfig] = {}
    arms = {}
    for name, fields in changes.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=,+-]{0,199}", name):
            what = "at most 200 letters, digits and . _ - = , +"
            raise ValueError(f"{path}: {shorten(repr(name))} cannot be the name of a folder: use {what}")
        limit = {"total_seconds": file.budget[-1]} if file.budget else {}
        try:
            config = preset(file.preset, **_merged(file.base, fields) | limit)
        except ValidationError as error:
            raise ValueError(f"{path}: arm {name}: {describe_problems(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: arm {name}: {error}") from error
        by_seed = {f"{name}_seed={seed}": config.model_copy(update={"seed": seed}) for seed in file.seeds}
        runs |= by_seed or {name: config}
        arms[name] = list(by_seed) or [name]
    return Study(file.preset, runs, arms, tuple(file.budget), file.metric, file.better)


def _check_budget(path: Path, file: GridFile) -> None:
    if len(set(file.seeds)) != len(file.seeds):
        raise ValueError(f"{path}: seeds {file.seeds} has a seed twice")
    if file.budget != sorted(set(file.budget)):
        raise ValueError(f"{path}: budget {file.budget} must increase")
    if len(file.budget) > 1 and file.better is None:
        raise ValueError(
            f'{path}: a budget of several values keeps the better arms, so it needs better = "lower" or "higher"'
        )


def _combinations(file: GridFile) -> dict[str, dict[str, Any]]:
    """Return the changes for each arm: every arm in `arms` with every combination in `product`."""
    changes = {}
    for name, fields in (file.arms or ({"": {}} if file.product else {})).items():
        for values in product(*file.product.values()):
            parts = [name] if name else []
            arm = fields
            for field, value in zip(file.product, values, strict=True):
                nested: Any = value
                for key in reversed(field.split(".")):
                    nested = {key: nested}
                arm = _merged(arm, nested)
                parts.append(f"{field.rpartition('.')[2]}={str(value).lower()}")
            changes["_".join(parts)] = arm
    return changes


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return `first` updated with `second`. Tables (model, data) are merged field by field."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
