"""Read a run folder: its configuration, statistics, metrics and best model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spigan.config import TrainConfig, describe_problems
from spigan.data import DataConfig
from spigan.files import read_json, read_text, user_path

# Names in a run folder.
CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
STATS_FILE = "stats.jsonl"
METRICS_FILE = "metrics.jsonl"
REALS_FILE = "reals.png"
CHECKPOINTS = "checkpoints"
MODEL = "model"
BEST = "best"
BEST_RECORD = "metrics.json"  # in BEST
FAILED = "failed"


def run_of(model: str | Path) -> Path | None:
    """Return the run folder of a model, given as that folder or its model/ or best/; None if it belongs to no run."""
    return next((folder for folder in (Path(model), Path(model).parent) if (folder / MODEL).is_dir()), None)


def read_config(run_dir: Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        FileNotFoundError: if `run_dir` is not a run folder.
        ValueError: if its config.json is damaged.
    """
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is not a run folder: it has no config.json")
    try:
        return TrainConfig.model_validate_json(read_text(path))
    except ValueError as error:
        cause = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} is not the configuration of a training run: {cause}") from error


def read_data(run_dir: Path) -> tuple[DataConfig, dict[str, Any]]:
    """Return the images of a run, and what it recorded about them.

    The record is empty if the run has none.

    Raises:
        FileNotFoundError: if `run_dir` is not a run folder.
        ValueError: if its config.json or data.json is damaged.
    """
    config = read_config(run_dir).data
    record = read_json(run_dir / DATA_FILE) if (run_dir / DATA_FILE).is_file() else {}
    return locate(config, record).model_copy(update={"resolution": None}), record


def locate(config: DataConfig, record: dict[str, Any]) -> DataConfig:
    """Return the images of a run with an absolute path, from any folder.

    A path in the configuration counts from the folder in which the run was begun. The record has it as an absolute
    path, which is used if it exists.
    """
    path = record.get("path")
    if not isinstance(path, str) or record.get("source") != config.source or not user_path(path).exists():
        return config
    return config.model_copy(update={"source": path})


def read_stats(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of stats.jsonl, the statistics of each tick."""
    return read_rows(run_dir / STATS_FILE, "iteration")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl, the metrics measured during training."""
    return read_rows(run_dir / METRICS_FILE, "iteration")


def read_rows(path: Path, *numbers: str) -> list[dict[str, Any]]:
    """Return the rows of a JSON lines file.

    An incomplete last line is ignored, because it may still be being written, or the writer may have been killed.

    Args:
        path: the file. If it is missing, there are no rows.
        numbers: names of fields that must be numbers in every row.

    Raises:
        ValueError: if any other line is not a JSON object with these numbers.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or not all(_is_number(row.get(name)) for name in numbers):
            raise ValueError(f"{path}, line {number}, is not a row of statistics: the file is damaged; remove the line")
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e18


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Return the record {"metric", "value", "iteration", "kimg", ...} of the model in best/, or None."""
    try:
        record = read_json(run_dir / BEST / BEST_RECORD)
    except (OSError, ValueError):
        return None
    kinds = {"metric": str, "value": float, "iteration": int, "kimg": float}
    return record if all(isinstance(record.get(name), kind) for name, kind in kinds.items()) else None
