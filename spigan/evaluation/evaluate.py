"""Evaluation of a model: what `spigan evaluate` and a training run measure.

Reference images are a data set as `spigan.data` reads it, at the model's resolution. Samples are uint8, as they would
be saved. Everything that a metric depends on is recorded with it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spigan.data import DataConfig, ImageDataset, open_dataset
from spigan.data.dataset import _start_worker, _unchanged, start_workers
from spigan.evaluation import cache, metrics
from spigan.evaluation.features import FeatureNet, load_features
from spigan.models.pretrained import weights_sha256
from spigan.sampling import Sampler, count_evaluations, resolve_seeds

if TYPE_CHECKING:
    from spigan.models import SPIGAN
    from spigan.models.load import Model

_FORMAT = 1  # of cached features: raised when what is computed changes
_BATCH = 256  # reference images at a time
_LEAST = metrics.NEIGHBOURS_COVERAGE + 1


@dataclass
class Measured:
    """Metrics of a set of images against a reference.

    Attributes:
        values: by name: Frechet distance, KID, Inception Score (where there are class probabilities), precision,
            recall, density, coverage.
        spread: standard deviations of those that are means: over subsets (KID), over parts (Inception Score).
        settings: how many images, neighbours, subsets and parts they were computed from.
        warnings: what makes them doubtful.
    """

    values: dict[str, float]
    spread: dict[str, float]
    settings: dict[str, int]
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Statistics:
    """Features of the reference, on the feature network's device: float32 [N, D], float64 [D] and [D, D]."""

    features: Tensor
    mean: Tensor
    covariance: Tensor


class Evaluator:
    """Compares images with a reference data set. The reference's statistics are computed once, and kept in the cache.

    Args:
        dataset: the reference.
        net: features that they are compared by.
        cache_dir: where statistics are kept; default: see `spigan.evaluation.cache.cache_folder`.
        progress: show progress bars.

    Raises:
        ValueError: too few reference images.
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
                f"the reference has {len(dataset)} images; at least {_LEAST} are needed, since coverage looks at the "
                f"{metrics.NEIGHBOURS_COVERAGE} nearest of each"
            )
        self.dataset, self.net, self.progress = dataset, net, progress
        self._folder = cache.cache_folder(cache_dir) / "features"

    @property
    def distance(self) -> str:
        """Name of the Frechet distance, which says what is best: "FID" or "FD-<network>"."""
        return self.net.metric("FD")

    def check_count(self, count: int) -> None:
        """Raises ValueError where `count` images are too few to be compared."""
        if count < _LEAST:
            raise ValueError(
                f"samples is {count}; at least {_LEAST} are needed, and more than {self.net.dim} for a sound "
                f"{self.distance}"
            )

    def doubts(self, count: int) -> list[str]:
        """What makes metrics of `count` images doubtful."""
        few = [f"{n} {what}" for n, what in ((count, "samples"), (len(self.dataset), "reference images"))
               if n <= self.net.dim]  # fmt: skip
        if not few:
            return []
        return [
            f"{' and '.join(few)} are no more than the {self.net.dim} features: the covariance is singular and "
            f"{self.distance} far too high; compare it only with those of equal numbers"
        ]

    def measure(self, batches: Iterable[Tensor], count: int) -> Measured:
        """Metrics of images.

        Args:
            batches: uint8 [B, C, H, W] each.
            count: number of images in all of them.

        Raises:
            ValueError: too few images, or other than `count`; features that are not finite.
        """
        self.check_count(count)
        return self.compare(*self.features(batches, count))

    def compare(self, features: Tensor, probabilities: Tensor | None) -> Measured:
        """Metrics of images by what `features` found of them."""
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
        return Measured(values, spread, settings, self.doubts(count))

    @cached_property
    def reference(self) -> _Statistics:
        """The reference's statistics, from the cache where it has them."""
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
        """n rows of the reference's features, at random where it has more, and the distances to their neighbours."""
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
            yield from (self.dataset.__getitems__(indices[i : i + _BATCH]) for i in indices[::_BATCH])
        else:
            batches = torch.utils.data.DataLoader(
                self.dataset,
                batch_size=_BATCH,
                num_workers=min(4, torch.get_num_threads()),
                collate_fn=_unchanged,
                generator=torch.Generator(),
                worker_init_fn=_start_worker,
            )
            yield from start_workers(batches)

    def features(self, batches: Iterable[Tensor], count: int, reference: bool = False) -> tuple[Tensor, Tensor | None]:
        """Features [count, D] and, of samples, class probabilities, on the network's device.

        Args:
            batches, count: as of `measure`.
            reference: whether the images are the reference.
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
            raise ValueError(f"{count} images were announced, but {'more' if stop > count else stop} came")
        return features, probabilities

    def _identity(self) -> dict[str, Any]:
        """All that the reference's features depend on."""
        facts = {key: value for key, value in self.dataset.description.items() if key != "source"}
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


def draw(sampler: Sampler, count: int, seed: int = 0) -> Iterator[Tensor]:
    """The sampler's images of seeds seed, seed + 1, ..., batch by batch, without a progress bar of its own."""
    seeds = resolve_seeds(count, seed)
    for start in range(0, count, sampler.batch_size):
        yield sampler(seeds[start : start + sampler.batch_size])


def evaluate(
    model: Model,
    *,
    data: DataConfig,
    features: str | FeatureNet = "inception",
    samples: int = 50_000,
    seed: int = 0,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Metrics of a model, and all that they depend on, as a dictionary that JSON can hold; see docs/evaluation.md.

    Args:
        model: as in `spigan.sample`.
        data: reference images; they are brought to the model's resolution.
        features: what images are compared by: see `spigan.evaluation.features.load_features`.
        samples: number of images drawn.
        seed: image i has the seed seed + i.
        batch_size: as in `spigan.Sampler`.
        dtype: as there.
        device: as there.
        backend: as there.
        cache_dir: where the reference's statistics are kept; default: see `spigan.evaluation.cache.cache_folder`.
        progress: show progress bars.

    Returns:
        "metrics" maps names to floats: "FID", "KID", "IS" of the Inception of 2015-12-05, else "FD-<network>" and so
        on; "precision", "recall", "density", "coverage". "nfe" and "seconds_per_100_images" (a median) are beside it.

    Raises:
        FileNotFoundError: no such model, data or weights.
        ValueError: images of other channels than the model's, another resolution, too few of them, a wrong network.
    """
    sampler = Sampler(model, batch_size=batch_size, dtype=dtype, backend=backend, device=device, output="uint8")
    resolve_seeds(samples, seed)
    net = load_features(features, device=sampler.device, cache_dir=cache_dir) if isinstance(features, str) else features
    dataset = open_reference(data, sampler.model, progress=progress)
    evaluator = Evaluator(dataset, net, cache_dir=cache_dir, progress=progress)
    evaluator.check_count(samples)
    for doubt in evaluator.doubts(samples):
        warnings.warn(doubt, stacklevel=2)
    nfe, seconds = time_100_images(sampler)
    began = time.perf_counter()
    measured = evaluator.measure(draw(sampler, samples, seed), samples)
    return {
        "metrics": measured.values,
        "spread": measured.spread,
        "nfe": nfe,
        "seconds_per_100_images": seconds,
        "settings": measured.settings,
        "samples": {
            "count": samples,
            "seed": seed,
            "seeds": [seed, seed + samples - 1],
            "format": "uint8",
            "resolution": sampler.model.config.resolution,
            "channels": sampler.model.config.img_channels,
            "dtype": str(sampler.dtype).removeprefix("torch."),
            "batch_size": sampler.batch_size,
            "backend": sampler.backend,
        },
        "model": {
            "source": str(model) if isinstance(model, (str, Path)) else "bundled" if model is None else "SPIGAN",
            "sha256": weights_sha256(sampler.model),
            "config": sampler.model.config.model_dump(),
        },
        "reference": {**dataset.description, "fingerprint": dataset.fingerprint},
        "features": describe_features(net, dataset),
        "warnings": measured.warnings,
        "seconds": round(time.perf_counter() - began, 3),
        "device": _device_name(sampler.device),
        "versions": _versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def table(result: dict[str, Any]) -> str:
    """A result of `evaluate` for people: a line for each metric, then what they were measured from."""
    reference, settings = result["reference"], result["settings"]
    rows = [
        (name, f"{value:.5g}", f"+- {result['spread'][name]:.2g}" if name in result["spread"] else "")
        for name, value in result["metrics"].items()
    ]
    rows.append(("NFE", f"{result['nfe']:g}", ""))
    rows.append(("seconds per 100 images", f"{result['seconds_per_100_images']:.4g}", result["device"]))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{name:{width}}  {value:>10}  {note}".rstrip() for name, value, note in rows]
    compared = f"{settings['samples']} samples (seeds {result['samples']['seeds'][0]} to "
    compared += (
        f"{result['samples']['seeds'][1]}, uint8, {result['samples']['dtype']}) against {reference['count']} images"
    )
    lines.append(f"{compared} of {reference['source']}, {reference['split']}; features: {result['features']['name']}")
    lines.append(f"precision, recall, density, coverage: {settings['neighbours_of']} of each")
    return "\n".join(lines)


def open_reference(data: DataConfig, model: SPIGAN, *, progress: bool = True) -> ImageDataset:
    """The data set that a model is compared with, at its resolution.

    Raises:
        ValueError: another resolution was asked for, or its images have other channels.
    """
    config = model.config
    if data.resolution not in (None, config.resolution):
        raise ValueError(
            f"data.resolution is {data.resolution}, but the model makes images of {config.resolution} x "
            f"{config.resolution}: leave it out; images of another size are resized by the filter data.resize"
        )
    dataset = open_dataset(data.model_copy(update={"resolution": config.resolution}), progress=progress)
    if dataset.channels != config.img_channels:
        raise ValueError(
            f"{data.source!r} has images of {dataset.channels} channel(s), the model makes {config.img_channels}: set "
            f"channels to {config.img_channels} to convert them, or give the data that the model was trained on"
        )
    return dataset


def time_100_images(sampler: Sampler, repeats: int = 5, limit: float = 10.0) -> tuple[float, float]:
    """NFE, and the median seconds of 100 images at a time on their way to the CPU (the paper's Table 2).

    Args:
        sampler: whose model, dtype and backend are timed.
        repeats: calls at most, after one that prepares.
        limit: seconds after which no further call begins.
    """
    timed = Sampler(sampler.model, batch_size=100, dtype=sampler.dtype, backend=sampler.backend, output="uint8")
    with count_evaluations(timed.model) as evaluations:
        timed(range(2))
    timed(range(100), to="cpu")
    seconds: list[float] = []
    while not seconds or (len(seconds) < repeats and sum(seconds) < limit):
        began = time.perf_counter()
        timed(range(100), to="cpu")
        seconds.append(time.perf_counter() - began)
    return evaluations[0] / 2, statistics.median(seconds)


def describe_features(net: FeatureNet, dataset: ImageDataset) -> dict[str, Any]:
    """What a result records of its feature network."""
    if net.resolution is None:
        resizing = "the network's own"
    elif net.resolution == dataset.resolution:
        resizing = "none"
    else:
        resizing = f"{dataset.resolution} to {net.resolution} by {dataset.description['resize']} (Pillow, antialiased)"
    return {
        "name": net.name,
        "spec": net.source,
        "sha256": net.sha256,
        "dim": net.dim,
        "classes": net.classes,
        "input": "uint8 RGB",
        "resizing": resizing,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} ({platform.machine()}, {capability}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    from spigan._version import __version__

    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}
    return {"spigan": __version__, "python": platform.python_version(), **packages}
