"""`evaluate`: measure a model against a data set, as `spigan evaluate` and training runs do.

The reference images are a data set read by `spigan.data`, at the model's resolution. Samples are uint8, just as they
would be saved. The result records everything that the metrics depend on.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from spigan._version import __version__
from spigan.data import DataConfig, ImageDataset
from spigan.data.dataset import open_for_model
from spigan.evaluation.evaluator import Evaluator
from spigan.evaluation.features import FeatureNet, load_features
from spigan.evaluation.reference import reference_of
from spigan.models.pretrained import weights_sha256
from spigan.sampling import Sampler, count_evaluations, resolve_seeds

if TYPE_CHECKING:
    from spigan.models import SPIGAN
    from spigan.models.load import Model


def draw(sampler: Sampler, count: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield the sampler's images for the seeds seed, seed + 1, ..., batch by batch, without a progress bar."""
    seeds = resolve_seeds(count, seed)
    for start in range(0, count, sampler.batch_size):
        yield sampler(seeds[start : start + sampler.batch_size])


def evaluate(
    model: Model,
    *,
    data: DataConfig | None = None,
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
    """Measure a model against reference images.

    Args:
        model: the model, as for `spigan.sample`.
        data: the reference images, which are resized to the model's resolution. None: the images that a run or a
            bundled model was trained on. If `data` names them for a run, they must still be the same images.
        features: the feature network used to compare images; see `spigan.evaluation.features.load_features`.
        samples: number of images to sample.
        seed: seed of the first image. Image i has the seed `seed + i`.
        batch_size: as for `spigan.Sampler`.
        dtype: as for `spigan.Sampler`.
        device: as for `spigan.Sampler`.
        backend: as for `spigan.Sampler`.
        cache_dir: folder for the statistics of the reference. Default: see `spigan.files.cache_folder`.
        progress: whether to show progress bars.

    Returns:
        The metrics and everything that they depend on, as plain JSON values; see docs/evaluation.md. "metrics" maps
        names to floats: "FID", "KID" and "IS" with the Inception of 2015-12-05, otherwise "FD-<network>" and so on; and
        "precision", "recall", "density" and "coverage". Next to "metrics" are "nfe" and "seconds_per_100_images" (a
        median).

    Raises:
        FileNotFoundError: if the model, the data or the weights of the feature network do not exist.
        ValueError: if the channels or resolution of the images differ from the model's, there are too few images, or
            the feature network cannot be used.
    """
    sampler = Sampler(model, batch_size=batch_size, dtype=dtype, backend=backend, device=device, output="uint8")
    resolve_seeds(samples, seed)
    net = load_features(features, device=sampler.device, cache_dir=cache_dir) if isinstance(features, str) else features
    data, record = reference_of(model, data)
    shape = sampler.model.config
    with _collected() as noted:
        dataset = open_for_model(data, shape.resolution, shape.img_channels, progress=progress, record=record)
        evaluator = Evaluator(dataset, net, cache_dir=cache_dir, progress=progress)
        evaluator.check_count(samples)
        for doubt in evaluator.doubts(samples):
            warnings.warn(doubt, stacklevel=2)
        nfe, seconds = time_100_images(sampler)
        began = time.perf_counter()
        measured = evaluator.measure(draw(sampler, samples, seed), samples)
        for doubt in measured.warnings:
            if doubt not in noted:
                warnings.warn(doubt, stacklevel=2)
    return {
        "metrics": measured.values,
        "spread": measured.spread,
        "nfe": nfe,
        "seconds_per_100_images": seconds,
        "settings": measured.settings,
        "samples": _describe_samples(sampler, samples, seed),
        "model": _describe_model(model, sampler.model),
        "reference": {**dataset.description, "fingerprint": dataset.fingerprint},
        "features": describe_features(net, dataset),
        "warnings": noted,
        "seconds": round(time.perf_counter() - began, 3),
        "device": _device_name(sampler.device),
        "versions": _versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


@contextmanager
def _collected() -> Iterator[list[str]]:
    """Collect the texts of the warnings that are shown in the block."""
    texts: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning) and str(message) not in texts:
                texts.append(str(message))
            show(message, category, *where, **more)

        warnings.showwarning = note
        yield texts


def table(result: dict[str, Any]) -> str:
    """Format a result of `evaluate` as text: one line per metric, followed by what was compared."""
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


def time_100_images(sampler: Sampler, repeats: int = 5, limit: float = 10.0) -> tuple[float, float]:
    """Count function evaluations per image, and time 100 images from noise to the CPU (the paper's Table 2).

    Args:
        sampler: sampler whose model, dtype and backend are timed.
        repeats: largest number of calls to time, after a warm-up call.
        limit: time in seconds after which no further call begins.

    Returns:
        The NFE and the median time in seconds.
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
    """Return the facts that a result records about its feature network."""
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


def _describe_model(model: Model, loaded: SPIGAN) -> dict[str, Any]:
    return {
        "source": str(model) if isinstance(model, (str, Path)) else "bundled" if model is None else "SPIGAN",
        "sha256": weights_sha256(loaded),
        "config": loaded.config.model_dump(),
    }


def _describe_samples(sampler: Sampler, count: int, seed: int) -> dict[str, Any]:
    return {
        "count": count,
        "seed": seed,
        "seeds": [seed, seed + count - 1],
        "format": "uint8",
        "resolution": sampler.model.config.resolution,
        "channels": sampler.model.config.img_channels,
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "batch_size": sampler.batch_size,
        "backend": sampler.backend,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type} ({platform.machine()}, {capability}, {torch.get_num_threads()} threads)"


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}
    return {"spigan": __version__, "python": platform.python_version(), **packages}
