"""What a training run leaves on disk while it runs: configuration, statistics, TensorBoard events, pictures."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from spigan.files import write_text
from spigan.runs import read_rows


def next_run_dir(parent: Path = Path("runs")) -> Path:
    """First unused folder of the form runs/00000, runs/00001, ..."""
    numbers = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / f"{max(numbers, default=-1) + 1:05d}"


def unused(run_dir: Path) -> bool:
    """Whether a run may begin in a folder: there is none, or at most what a run leaves that is killed as it begins."""
    ours = re.compile(r"data\.json|\.(config|data)\.json-.{8}")
    return not run_dir.is_dir() or all(ours.fullmatch(path.name) for path in run_dir.iterdir())


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
