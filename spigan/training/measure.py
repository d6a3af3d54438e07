"""Metrics of the averaged model during training, and the best model so far."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from spigan.config import TrainConfig
from spigan.data import ImageDataset
from spigan.evaluation.evaluate import draw
from spigan.evaluation.evaluator import Evaluator
from spigan.evaluation.features import load_features
from spigan.files import write_text
from spigan.models import SPIGAN
from spigan.runs import BEST_RECORD, read_best, read_metrics
from spigan.sampling import Sampler
from spigan.training.processes import Processes
from spigan.training.run_folder import writing
from spigan.training.signals import StopSignals
from spigan.training.snapshots import Snapshots
from spigan.training.statistics import StatsLog


class RunMetrics:
    """Measures the averaged model against the training images, without changing the run's random state.

    Args:
        config: configuration of the run. Its `metric_features` must be set.
        dataset: the training images, which are not mirrored here.
        processes: the processes that train together. Each draws its share of the samples, on its own device.
        progress: whether to show progress bars and print each distance.

    Raises:
        FileNotFoundError, ValueError: if the feature network cannot be loaded, or there are too few images.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, processes: Processes, progress: bool) -> None:
        assert config.metric_features is not None
        self.samples, self._processes, self._progress = config.metric_samples, processes, progress
        self._device = processes.device
        features = load_features(config.metric_features, device=self._device)
        self._evaluator = Evaluator(dataset, features, progress=progress)
        self._evaluator.check_count(self.samples)
        for doubt in self._evaluator.doubts(self.samples) if processes.main else []:
            warnings.warn(doubt, stacklevel=2)

    @property
    def distance(self) -> str:
        """Name of the Frechet distance that decides which model is best."""
        return self._evaluator.distance

    def measure(self, model: SPIGAN) -> dict[str, float]:
        """Return the metrics of the float32 images for seeds 0, 1, ... They depend only on the weights.

        Every process must call this. All except the main process get an empty dict.
        """
        # Sampling and metrics have their own random generators, but a TorchScript network may use the global one.
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            # All shares have the same size, so the last processes may draw a few images that are not counted.
            share = -(-self.samples // self._processes.count)
            images = draw(Sampler(model, output="uint8"), share, seed=self._processes.rank * share)
            features, probabilities = self._evaluator.features(images, share)
            features = self._processes.gather(features)[: self.samples]
            if probabilities is not None:
                probabilities = self._processes.gather(probabilities)[: self.samples]
            if not self._processes.main:
                return {}
            return self._evaluator.compare(features, probabilities).values

    def update(self, snapshots: Snapshots, log: StatsLog | None, stop: StopSignals) -> bool:
        """Measure the averaged model, and keep it if it is the best. Skip this if the log has the iteration already.

        A signal ends the measurement. It is repeated when the run resumes.

        Args:
            snapshots: snapshots of the run. They hold its state, and save it if a signal arrives.
            log: where to write the metrics. None except in the main process.
            stop: signals.

        Returns:
            Whether the model is the best so far, so that its checkpoint must be kept.
        """
        state = snapshots.state
        rows = read_metrics(snapshots.run_dir) if self._processes.main else []
        if self._processes.any(bool(rows) and rows[-1]["iteration"] == state.iteration):
            return False
        dumped = state.dump()  # stays the same meanwhile; the random state, which may change, is a copy
        measure = partial(self.measure, state.ema)
        with stop.backed(partial(snapshots.write, *dumped)):
            # With several processes, a process that stopped would leave the others waiting.
            values = measure() if self._processes.count > 1 else stop.attempt(measure)
        if values is None:  # abandoned at any point, perhaps while the random state was being restored
            snapshots.write(*dumped)
            return False
        return self._processes.any(log is not None and self._keep(values, snapshots, log))

    def _keep(self, values: dict[str, float], snapshots: Snapshots, log: StatsLog) -> bool:
        """Log the metrics, and keep the model if it is the best. Return whether it is the best."""
        state, run_dir = snapshots.state, snapshots.run_dir
        counts = {"iteration": state.iteration, "kimg": state.images_seen / 1000, "seconds": round(state.elapsed, 3)}
        row = counts | values
        with writing(run_dir, f"metrics in {run_dir}"):
            better = keep_best(run_dir, state.ema, row, self.distance)
        log.write_metrics(row)  # last: a resumed run repeats all of this if the row is missing
        if self._progress:
            distance = f"{self.distance} {values[self.distance]:.4g}"
            tqdm.write(f"{row['kimg']:.1f} kimg: {distance}{', the best so far' if better else ''}")
        best = read_best(run_dir)  # an earlier attempt, killed since, may have kept the model of this iteration
        return best is not None and best["iteration"] == state.iteration


def keep_best(run_dir: Path, model: SPIGAN, row: dict[str, Any], distance: str) -> bool:
    """Write `model` to best/ if row[distance] is lower than for the model there. Return whether it was written.

    The record is written last. If the process is killed between the two, the record is missing, and the resumed run
    measures again and writes both.
    """
    folder = run_dir / "best"
    best = read_best(run_dir)
    if best is not None and best.get("metric") == distance and best["value"] <= row[distance]:
        return False
    model.save_pretrained(folder)
    record = {"metric": distance, "value": row[distance], **{k: v for k, v in row.items() if k != "seconds"}}
    write_text(folder / BEST_RECORD, json.dumps(record, indent=2) + "\n")
    return True
