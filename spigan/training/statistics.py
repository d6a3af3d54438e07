"""Statistics of a run: means of each tick, a clock, and the files that keep them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.files import write_text
from spigan.runs import METRICS_FILE, STATS_FILE, read_rows
from spigan.training.divergence import Diverged, divergence
from spigan.training.processes import Processes
from spigan.training.run_folder import writing


class Statistics:
    """Records scalars, and detects divergence from them.

    Args:
        config: configuration of the run.
        processes: the processes that train together.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self._config = config
        self._processes = processes
        self._values: dict[str, list[Tensor]] = {}
        self._unchecked: list[tuple[int, str, Tensor]] = []  # (iteration, name, value) not yet known to be finite

    def record(self, iteration: int, **values: Tensor) -> None:
        """Record scalars of an iteration, without waiting for a GPU."""
        for name, value in values.items():
            kept = value.detach().double()
            self._values.setdefault(name, []).append(kept)
            self._unchecked.append((iteration, name, kept))

    def check(self) -> None:
        """Raise `Diverged` if a recorded scalar is not finite, or the norm of a gradient exceeds `grad_norm_limit`."""
        values = torch.stack([value for *_, value in self._unchecked]).tolist() if self._unchecked else []
        for (iteration, name, _), value in zip(self._unchecked, values, strict=True):
            limit = self._config.grad_norm_limit if name.startswith("grad_norm_") else None
            if not math.isfinite(value):
                raise self._diverged(name, value, iteration)
            if limit is not None and value > limit:
                raise self._diverged(name, value, iteration, limit)
        self._unchecked.clear()

    def check_weights(self, modules: Mapping[str, nn.Module], iteration: int) -> None:
        """Raise `Diverged` if `check` does, or if a parameter of a module is not finite."""
        self.check()
        for name, module in modules.items():
            if not all(parameter.isfinite().all() for parameter in module.parameters()):
                raise self._diverged(f"weights of {name}", None, iteration)

    def _diverged(self, what: str, value: float | None, iteration: int, limit: float | None = None) -> Diverged:
        kimg = (iteration + 1) // 2 * self._config.batch / 1000
        return Diverged(divergence(what, value, iteration, kimg, limit, self._config.precision == "bf16"))

    def take_means(self) -> dict[str, float]:
        """Return the means over all processes since the last call, and start over. Every process must call this."""
        series = {name: torch.stack(values) for name, values in self._values.items()}
        self._values.clear()
        return {name: self._processes.mean(values.mean()).item() for name, values in series.items()}

    def lengths(self) -> dict[str, int]:
        """Return the number of recorded scalars, by name."""
        return {name: len(values) for name, values in self._values.items()}

    def tensors(self, *, joint: bool) -> dict[str, Tensor]:
        """Return the recorded scalars by name, each as a float64 series.

        Args:
            joint: average them over all processes. Every process must then call this. If False, return the scalars of
                this process.
        """
        own = {name: torch.stack(values) for name, values in self._values.items()}
        return {name: self._processes.mean(values) for name, values in own.items()} if joint else own

    def load(self, series: Mapping[str, list[Tensor]]) -> None:
        """Restore the scalars that `tensors` returned."""
        self._values = {name: values for name, values in series.items() if values}


class Clock:
    """Measures the training time in seconds, and the images per second.

    Args:
        seconds: training time in earlier sessions.
        images: number of images seen so far.
        now: the clock, which returns seconds.
    """

    def __init__(self, seconds: float, images: int, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        start = now()
        self._began = start - seconds
        self._tick_began = start
        self._tick_images = images

    def seconds(self) -> float:
        """Return the training time in seconds, including earlier sessions and excluding pauses."""
        return self._now() - self._began

    def tick(self, images: int) -> float:
        """Return the images per second since the last tick, and begin a new tick.

        Args:
            images: number of images seen so far.
        """
        now = self._now()
        rate = (images - self._tick_images) / (now - self._tick_began)
        self._tick_began = now
        self._tick_images = images
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time that the block takes."""
        began = self._now()
        yield
        paused = self._now() - began
        self._began += paused
        self._tick_began += paused


class StatsLog:
    """Writes stats.jsonl (one JSON object per tick), metrics.jsonl (one per measurement), and TensorBoard events.

    Args:
        run_dir: the run's folder.
        iteration: the iteration at which the run begins or resumes. Later rows, from an earlier attempt, are dropped.
    """

    def __init__(self, run_dir: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        self.path = run_dir / STATS_FILE
        self.metrics_path = run_dir / METRICS_FILE
        with writing(run_dir, f"statistics in {run_dir}"):
            self.path.touch()
            for path in (self.path, self.metrics_path):
                if path.is_file():
                    kept = [row for row in read_rows(path, "iteration") if row["iteration"] <= iteration]
                    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._events = SummaryWriter(str(run_dir), purge_step=iteration + 1)

    def write(self, row: dict[str, Any]) -> None:
        """Append one tick. `row` contains at least "iteration"."""
        with writing(self.run_dir, f"statistics in {self.run_dir}"):
            self._append(self.path, row, "")

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Append one measurement. `row` contains "iteration", "kimg", "seconds" and the metrics."""
        with writing(self.run_dir, f"metrics in {self.run_dir}"):
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

    def __enter__(self) -> StatsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
