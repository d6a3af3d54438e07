"""What a training run leaves on disk while it runs: configuration, statistics, TensorBoard events, pictures."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spigan.config import TrainConfig, describe_problems, read_text
from spigan.images import atomic_path


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def next_run_dir(parent: Path = Path("runs")) -> Path:
    """First unused folder of the form runs/00000, runs/00001, ..."""
    numbers = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / f"{max(numbers, default=-1) + 1:05d}"


def run_of(model: str | Path) -> Path | None:
    """The run folder of a model, which may be given as its model/ or best/; None where it is of no run."""
    return next((folder for folder in (Path(model), Path(model).parent) if (folder / "model").is_dir()), None)


def unused(run_dir: Path) -> bool:
    """Whether a run may begin in a folder: there is none, or at most what a run leaves that is killed as it begins."""
    ours = re.compile(r"data\.json|\.(config|data)\.json-.{8}")
    return not run_dir.is_dir() or all(ours.fullmatch(path.name) for path in run_dir.iterdir())


def read_config(run_dir: Path) -> TrainConfig:
    """The configuration of a run.

    Raises:
        FileNotFoundError: `run_dir` is no run folder.
        ValueError: its config.json is damaged.
    """
    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} is no run folder: it has no config.json")
    try:
        return TrainConfig.model_validate_json(read_text(path))
    except ValueError as error:
        cause = describe_problems(error) if isinstance(error, ValidationError) else error
        raise ValueError(f"{path} is not the configuration of a training run: {cause}") from error


class StatsLog:
    """stats.jsonl (one JSON object a tick), metrics.jsonl (one for each measurement), and TensorBoard events of them.

    Args:
        run_dir: the run's folder.
        iteration: iteration at which the run begins or goes on; what an earlier attempt wrote beyond it is dropped.
    """

    def __init__(self, run_dir: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path, self.metrics_path = run_dir / "stats.jsonl", run_dir / "metrics.jsonl"
        self.path.touch()
        for path in (self.path, self.metrics_path):
            if path.is_file():
                kept = [row for row in read_rows(path, "iteration") if row["iteration"] <= iteration]
                write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._events = SummaryWriter(str(run_dir), purge_step=iteration + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one tick; `row` holds at least "iteration"."""
        self._append(self.path, row, "")

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Append one measurement; `row` holds "iteration", "kimg", "seconds" and the metrics."""
        self._append(self.metrics_path, row, "metrics/")

    def _append(self, path: Path, row: dict[str, Any], prefix: str) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in row.items():
            if name != "iteration":
                self._events.add_scalar(prefix + name, value, row["iteration"])
        self._events.flush()

    def close(self) -> None:
        """Finish the TensorBoard file."""
        self._events.close()


def read_stats(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of stats.jsonl, the statistics of each tick."""
    return read_rows(run_dir / "stats.jsonl", "iteration")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, the metrics during training."""
    return read_rows(run_dir / "metrics.jsonl", "iteration")


def read_rows(path: Path, *numbers: str) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; a last line that is being written, or that a kill cut short, is left out.

    Args:
        path: of the file; without one there are no rows.
        numbers: names that every row must have a number under.

    Raises:
        ValueError: another line is no such row.
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
            raise ValueError(f"{path}, line {number}, is no row of statistics: the file is damaged; take the line out")
        rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e18
