"""Statistics of a run: their means over each tick, the check for divergence, and the files that record them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.files import write_text
from spigan.runs import read_rows
from spigan.training.processes import Processes
from spigan.training.run_folder import writing


class Diverged(FloatingPointError):
    """Training has diverged. The message states where, and what to change."""


class Statistics:
    """Records scalars, and detects divergence from them.

    Args:
        config: configuration of the run.
        processes: the processes that train together.
    """

    def __init__(self, config: TrainConfig, processes: Processes) -> None:
        self._config, self._processes = config, processes
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

    def series(self) -> dict[str, list[float]]:
        """Return this process's recorded scalars since the last tick, by name."""
        return {name: torch.stack(values).tolist() for name, values in self._values.items()}

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
    """

    def __init__(self, seconds: float, images: int) -> None:
        now = time.perf_counter()
        self._began, self._tick_began, self._tick_images = now - seconds, now, images

    def seconds(self) -> float:
        """Return the training time in seconds, including earlier sessions and excluding pauses."""
        return time.perf_counter() - self._began

    def tick(self, images: int) -> float:
        """Return the images per second since the last tick, and begin a new tick.

        Args:
            images: number of images seen so far.
        """
        now = time.perf_counter()
        rate = (images - self._tick_images) / (now - self._tick_began)
        self._tick_began, self._tick_images = now, images
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time that the block takes."""
        began = time.perf_counter()
        yield
        paused = time.perf_counter() - began
        self._began, self._tick_began = self._began + paused, self._tick_began + paused


class StatsLog:
    """Writes stats.jsonl (one JSON object per tick), metrics.jsonl (one per measurement), and TensorBoard events.

    Args:
        run_dir: the run's folder.
        iteration: the iteration at which the run begins or resumes. Later rows, from an earlier attempt, are dropped.
    """

    def __init__(self, run_dir: Path, iteration: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir, self.path, self.metrics_path = run_dir, run_dir / "stats.jsonl", run_dir / "metrics.jsonl"
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


_SUSPECTS = {  # names of the scalars recorded in an update: (the update, what to change)
    ("loss_d", "real_logit", "fake_logit", "real_sign", "grad_norm_d"): (
        "the discriminator's step",
        "lower lr_d, raise r1_gamma",
    ),
    ("r1", "grad_norm_r1"): ("the discriminator's R1 step", "lower lr_d or r1_gamma"),
    ("loss_g", "grad_norm_g"): ("the generator's step", "lower lr_g"),
    ("path_length", "path_length_penalty", "grad_norm_pl"): ("the path-length step", "lower pl_weight or lr_g"),
}


def divergence(what: str, value: float | None, iteration: int, kimg: float, limit: float | None, bf16: bool) -> str:
    """Describe a divergence: which number diverged, where, and what to change.

    Args:
        what: name of a statistic, or another description.
        value: its value, if it is a single number.
        iteration: the iteration in which it was recorded.
        kimg: thousands of images seen by then.
        limit: the limit that the value exceeds, or None if the value is not finite.
        bf16: whether convolutions run in bfloat16.
    """
    step, advice = next(
        (suspect for names, suspect in _SUSPECTS.items() if what in names), ("the last steps", "lower lr_g and lr_d")
    )
    too_much = "not finite" if limit is None else f"above grad_norm_limit = {limit:g}"
    value_text = "" if value is None else f" ({value:g})"
    precision = ", or set precision to fp32" if bf16 else ""
    return (
        f"training has diverged: {what}{value_text} is {too_much} at iteration {iteration} ({kimg:g} kimg), in {step}. "
        f"Advice: {advice}{precision}"
    )
