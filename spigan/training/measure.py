"""Metrics of the averaged model during a training run, and the best model so far."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spigan.files import write_text
from spigan.runs import BEST_RECORD, read_best
from spigan.sampling import Sampler

if TYPE_CHECKING:
    from spigan.config import TrainConfig
    from spigan.data import ImageDataset
    from spigan.models import SPIGAN
    from spigan.training.processes import Processes


class RunMetrics:
    """Measures the averaged model against the images it is trained on, without touching the run's random state.

    Args:
        config: of the run; its `metric_features` is set.
        dataset: what it trains on (flips are not applied).
        processes: those that train; each measures on its device, and draws its share of the samples.
        progress: show progress bars.

    Raises:
        FileNotFoundError, ValueError: the feature network cannot be loaded, or there are too few images.
    """

    def __init__(self, config: TrainConfig, dataset: ImageDataset, processes: Processes, progress: bool) -> None:
        from spigan.evaluation.evaluator import Evaluator
        from spigan.evaluation.features import load_features

        assert config.metric_features is not None
        self.samples, self._processes, device = config.metric_samples, processes, processes.device
        self._device = device
        self._evaluator = Evaluator(dataset, load_features(config.metric_features, device=device), progress=progress)
        self._evaluator.check_count(self.samples)
        for doubt in self._evaluator.doubts(self.samples) if processes.main else []:
            warnings.warn(doubt, stacklevel=2)

    @property
    def distance(self) -> str:
        """Name of the Frechet distance, by which the best model is chosen."""
        return self._evaluator.distance

    def measure(self, model: SPIGAN) -> dict[str, float]:
        """Metrics of the images of seeds 0, 1, ..., drawn in float32: a model's values depend on its weights alone.

        Returns:
            The metrics, in the main process; nothing in others.
        """
        from spigan.evaluation.evaluate import draw

        # Sampling and metrics have generators of their own; a TorchScript network may not.
        with torch.random.fork_rng([self._device] if self._device.type == "cuda" else []):
            # Shares of one size: the last may draw some more than are counted.
            share = -(-self.samples // self._processes.count)
            images = draw(Sampler(model, output="uint8"), share, seed=self._processes.rank * share)
            features, probabilities = self._evaluator.features(images, share)
            features = self._processes.gather(features)[: self.samples]
            if probabilities is not None:
                probabilities = self._processes.gather(probabilities)[: self.samples]
            if not self._processes.main:
                return {}
            return self._evaluator.compare(features, probabilities).values


def keep_best(run_dir: Path, model: SPIGAN, row: dict[str, Any], distance: str) -> bool:
    """Write `model` to best/ where row[distance] is lower than that of the model there; says whether it was.

    The record comes last: after a kill between the two a lower value is still to be measured again, and then both
    are written.
    """
    folder = run_dir / "best"
    best = read_best(run_dir)
    if best is not None and best.get("metric") == distance and best["value"] <= row[distance]:
        return False
    model.save_pretrained(folder)
    record = {"metric": distance, "value": row[distance], **{k: v for k, v in row.items() if k != "seconds"}}
    write_text(folder / BEST_RECORD, json.dumps(record, indent=2) + "\n")
    return True
