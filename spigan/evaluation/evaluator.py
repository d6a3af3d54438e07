"""`Evaluator`: compare images with a reference data set. Its statistics are computed once and cached."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spigan.data import ImageDataset
from spigan.data.workers import load_batches
from spigan.evaluation import cache, metrics
from spigan.evaluation.features import FeatureNet
from spigan.files import cache_folder

_FORMAT = 1  # version of the cached features; increase it if a change of this code changes them
_BATCH = 256  # reference images at a time
_LEAST = metrics.NEIGHBOURS_COVERAGE + 1


@dataclass
class Measured:
    """Metrics of a set of images against a reference.

    Attributes:
        values: metrics by name: Frechet distance, KID, Inception Score (if the network has class probabilities),
            precision, recall, density, coverage.
        spread: standard deviations of the metrics that are means: over subsets (KID) or parts (Inception Score).
        settings: numbers of images, neighbours, subsets and parts used for the values.
        warnings: reasons to doubt the values.
    """

    values: dict[str, float]
    spread: dict[str, float]
    settings: dict[str, int]
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Statistics:
    """Features of the reference, float32 [N, D], with their mean and covariance, float64 [D] and [D, D]."""

    features: Tensor
    mean: Tensor
    covariance: Tensor


class Evaluator:
    """Compares images with a reference data set. Its statistics are computed once and cached on disk.

    Args:
        dataset: the reference images.
        net: the feature network used to compare images.
        cache_dir: folder of the cache. Default: see `spigan.files.cache_folder`.
        progress: whether to show progress bars.

    Raises:
        ValueError: if there are too few reference images.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        net: FeatureNet,
        *,
        cache_dir: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        if len(dataset) < _LEAST:
            raise ValueError(
                f"the reference has {len(dataset)} images; at least {_LEAST} are needed, because coverage compares "
                f"each with its {metrics.NEIGHBOURS_COVERAGE} nearest neighbours"
            )
        self.dataset, self.net, self.progress = dataset, net, progress
        self._folder = cache_folder(cache_dir) / "features"

    @property
    def distance(self) -> str:
        """Name of the Frechet distance, which decides which model is best: "FID" or "FD-<network>"."""
        return self.net.metric("FD")

    def check_count(self, count: int) -> None:
        """Raise ValueError if `count` images are too few for a comparison."""
        if count < _LEAST:
            raise ValueError(
                f"samples is {count}; at least {_LEAST} are needed, and more than {self.net.dim} for a meaningful "
                f"{self.distance}"
            )

    def doubts(self, count: int) -> list[str]:
        """Return warnings that explain why metrics of `count` images are doubtful; an empty list if they are not."""
        found = []
        few = [f"{n} {what}" for n, what in ((count, "samples"), (len(self.dataset), "reference images"))
               if n <= self.net.dim]  # fmt: skip
        if few:
            found.append(
                f"{' and '.join(few)} are not more than the {self.net.dim} features, so the covariance is singular and "
                f"{self.distance} is far too high: compare it only with values for the same numbers of images"
            )
        if count == len(self.dataset) <= metrics.KID_SUBSET_SIZE:
            found.append(
                f"every subset of {self.net.metric('KID')} is all {count} images, so its spread is 0 and says nothing: "
                f"more than {metrics.KID_SUBSET_SIZE} of each are needed"
            )
        if self.net.classes is not None and (part := count // metrics.INCEPTION_SPLITS) < self.net.classes:
            found.append(
                f"each of the {metrics.INCEPTION_SPLITS} parts of {self.net.metric('IS')} has about {part} samples, "
                f"fewer than the {self.net.classes} classes, so it is far too low (a part of one sample scores 1): "
                f"{metrics.INCEPTION_SPLITS * self.net.classes} samples or more are needed"
            )
        return found

    def measure(self, batches: Iterable[Tensor], count: int) -> Measured:
        """Compute the metrics of images.

        Args:
            batches: batches of images, uint8 [B, C, H, W].
            count: total number of images.

        Raises:
            ValueError: if there are too few images, their number is not `count`, or their features are not finite.
        """
        self.check_count(count)
        return self.compare(*self.features(batches, count))

    def compare(self, features: Tensor, probabilities: Tensor | None) -> Measured:
        """Compute the metrics of images from their features [N, D] and class probabilities; see `features`."""
        count, reference = len(features), self.reference
        metrics.check_features(features, "features of the samples")
        mean, covariance = metrics.mean_and_covariance(features)
        name = self.net.metric
        values = {
            self.distance: metrics.frechet_distance(reference.mean, reference.covariance, mean, covariance),
        }
        spread, settings = {}, {"samples": count, "reference": len(self.dataset)}
        kid = metrics.kernel_distance(reference.features, features)
        values[name("KID")], spread[name("KID")] = kid
        settings |= {
            "kid_subsets": metrics.KID_SUBSETS,
            "kid_subset_size": min(metrics.KID_SUBSET_SIZE, count, len(self.dataset)),
        }
        if probabilities is not None:
            settings["inception_score_splits"] = min(metrics.INCEPTION_SPLITS, count)
            score = metrics.inception_score(probabilities, settings["inception_score_splits"])
            values[name("IS")], spread[name("IS")] = score
        n = min(count, len(self.dataset))
        some, radii = self._neighbours(n)
        near = metrics.neighbour_metrics(some, features[:n], radii, reference.mean, progress=self.progress)
        values |= near._asdict()
        settings |= {
            "neighbours_of": n,
            "precision_recall_k": metrics.NEIGHBOURS_MANIFOLD,
            "density_coverage_k": metrics.NEIGHBOURS_COVERAGE,
        }
        doubts = self.doubts(count)
        if repeated := metrics.count_repeated(some, radii, reference.mean):
            doubts.append(
                f"{repeated} of {n} reference images have {metrics.NEIGHBOURS_COVERAGE} or more copies, so nothing is "
                "nearer to them than those: density and coverage, which count what is nearer, are too low"
            )
        return Measured(values, spread, settings, doubts)

    @cached_property
    def reference(self) -> _Statistics:
        """Statistics of the reference, on the feature network's device. They come from the cache if possible."""
        path, key = self._file(), self._key()
        count, dim = len(self.dataset), self.net.dim
        found = cache.load(path, key, {"features": (count, dim), "mean": (dim,), "covariance": (dim, dim)})
        if found is None:
            features, _ = self.features(self._reference_batches(), count, reference=True)
            metrics.check_features(features, "features of the reference")
            mean, covariance = metrics.mean_and_covariance(features)
            found = {"features": features, "mean": mean, "covariance": covariance}
            cache.save(path, key, found)
        return _Statistics(**{name: tensor.to(self.net.device) for name, tensor in found.items()})

    def _neighbours(self, n: int) -> tuple[Tensor, Tensor]:
        """Return n rows of the reference's features (random if it has more), and the distances to their neighbours."""
        features = self.reference.features
        if n < len(features):  # data sets may be sorted
            order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
            features = features[order[:n].to(features.device)]
        path, key = self._file(f"-neighbours-{n}"), f"{self._key()} {n}"
        found = cache.load(path, key, {"radii": (n, metrics.NEIGHBOURS_COVERAGE)})
        if found is None:
            radii = metrics.neighbour_distances(features, self.reference.mean, progress=self.progress)
            found = {"radii": radii}
            cache.save(path, key, found)
        return features, found["radii"].to(features.device)

    def _reference_batches(self) -> Iterator[Tensor]:
        indices = range(len(self.dataset))
        if self.dataset.cached:
            yield from (self.dataset.images(indices[i : i + _BATCH]) for i in indices[::_BATCH])
        else:
            yield from load_batches(self.dataset, num_workers=self.dataset.workers, batch_size=_BATCH)

    def features(self, batches: Iterable[Tensor], count: int, reference: bool = False) -> tuple[Tensor, Tensor | None]:
        """Compute features [count, D] and, for samples, class probabilities [count, classes], on the network's device.

        Args:
            batches: batches of images, uint8 [B, C, H, W].
            count: total number of images.
            reference: whether the images are the reference, which does not need class probabilities.

        Raises:
            ValueError: if the number of images is not `count`.
        """
        from tqdm.auto import tqdm

        features = torch.empty(count, self.net.dim, device=self.net.device)
        probabilities = None
        if self.net.classes is not None and not reference:
            probabilities = torch.empty(count, self.net.classes, device=self.net.device)
        title = f"{self.net.name} of {self.dataset.name}" if reference else "samples"
        start = stop = 0
        with tqdm(total=count, desc=title, unit="img", delay=2.0, leave=False, disable=not self.progress) as bar:
            for images in batches:
                stop = start + len(images)
                if stop > count:
                    break
                some, classes = self.net(
                    images, resize=self.dataset.description["resize"], probabilities=probabilities is not None
                )
                features[start:stop] = some
                if probabilities is not None and classes is not None:
                    probabilities[start:stop] = classes
                start = stop
                bar.update(len(images))
        if stop != count:
            raise ValueError(f"expected {count} images, got {'more' if stop > count else stop}")
        return features, probabilities

    def _identity(self) -> dict[str, Any]:
        """Return everything that the reference's features depend on."""
        facts = {key: value for key, value in self.dataset.description.items() if key != "source"}
        # A fingerprint of files does not notice other images of the same names and sizes.
        if not self.dataset.cached:
            facts["sample"] = self.dataset.sample
        return facts | {
            "format": _FORMAT,
            "fingerprint": self.dataset.fingerprint,
            "network": self.net.sha256,
            "name": self.net.name,
            "network_resolution": self.net.resolution,
        }

    def _key(self) -> str:
        return hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()

    def _file(self, what: str = "") -> Path:
        title = f"{self.dataset.name}-{self.dataset.description['split']}-{self.dataset.resolution}-{self.net.name}"
        title = re.sub(r"[^\w.-]", "_", title)[:100]
        return self._folder / f"{title}-{self._key()[:16]}{what}.safetensors"
