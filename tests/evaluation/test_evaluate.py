"""Evaluation of a model: what a result records, and early errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import spigan
from spigan import SPIGAN, DataConfig, ModelConfig
from spigan.data import open_dataset
from spigan.evaluation import metrics
from spigan.evaluation.evaluate import draw, evaluate, time_100_images
from spigan.evaluation.features import load_features
from spigan.sampling import Sampler

DIGITS = DataConfig(source="digits")


def measure(model: SPIGAN, scripts: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "data": DataConfig(source="digits"),
        "features": str(scripts / "pixels.pt"),
        "samples": 100,
        "progress": False,
    }
    return evaluate(model, **options | changes)


def test_result(model: SPIGAN, scripts: Path) -> None:
    result = measure(model, scripts, seed=7, batch_size=32, dtype=torch.bfloat16, backend="reference")
    assert json.loads(json.dumps(result)) == result
    names = ["FD-pixels", "KID-pixels", "precision", "recall", "density", "coverage"]
    assert list(result["metrics"]) == names
    assert all(np.isfinite(value) for value in result["metrics"].values())
    assert list(result["spread"]) == ["KID-pixels"]
    assert result["nfe"] == 1.0 and result["seconds_per_100_images"] > 0
    assert result["samples"] == {
        "count": 100, "seed": 7, "seeds": [7, 106], "format": "uint8", "resolution": 8, "channels": 1,
        "dtype": "bfloat16", "batch_size": 32, "backend": "reference",
    }  # fmt: skip
    assert result["settings"] == {
        "samples": 100, "reference": 1797, "kid_subsets": 100, "kid_subset_size": 100, "neighbours_of": 100,
        "precision_recall_k": 3, "density_coverage_k": 5,
    }  # fmt: skip
    assert result["reference"]["split"] == "train" and result["reference"]["resize"] == "lanczos"
    assert result["reference"]["count"] == 1797 and len(result["reference"]["fingerprint"]) == 64
    assert result["features"] | {"sha256": ""} == {
        "name": "pixels", "spec": str(scripts / "pixels.pt"), "sha256": "", "dim": 48, "classes": None,
        "input": "uint8 RGB", "resizing": "the network's own",
    }  # fmt: skip
    assert result["model"]["source"] == "SPIGAN" and result["model"]["config"]["resolution"] == 8
    assert set(result["versions"]) == {"spigan", "python", "torch", "numpy", "pillow"}
    assert result["warnings"] == [] and result["date"].startswith("20")
    assert "cpu" in result["device"] or torch.cuda.is_available()


def test_values_are_those_of_the_formulas(model: SPIGAN, scripts: Path) -> None:
    """Nothing is lost between the images and the formulas: other batches, the reference in its order, grey to RGB."""
    result = measure(model, scripts, features=str(scripts / "classifier.pt"), samples=300, batch_size=70)
    net = load_features(str(scripts / "classifier.pt"))
    images = Sampler(model, output="uint8")(range(300))
    dataset = open_dataset(DataConfig(source="digits", resolution=8), progress=False)
    (x, _), (y, p) = net(dataset.images(range(1797))), net(images, probabilities=True)
    fd = metrics.frechet_distance(*metrics.mean_and_covariance(x), *metrics.mean_and_covariance(y))
    assert result["metrics"]["FD-classifier"] == pytest.approx(fd, rel=1e-6)
    assert result["metrics"]["KID-classifier"] == pytest.approx(metrics.kernel_distance(x, y).mean, rel=1e-6)
    assert p is not None
    assert result["metrics"]["IS-classifier"] == pytest.approx(metrics.inception_score(p).mean, rel=1e-6)
    assert result["settings"]["inception_score_splits"] == 10
    # Of equal numbers: 300 of the reference, drawn at random.
    some = x[torch.randperm(1797, generator=torch.Generator().manual_seed(0))[:300]]
    centre = x.double().mean(0)
    near = metrics.neighbour_metrics(some, y, metrics.neighbour_distances(some, centre), centre)
    assert [result["metrics"][name] for name in near._fields] == pytest.approx(near, abs=0.01)


def test_a_model_by_folder_and_in_memory_is_the_same(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    saved, kept = measure(tmp_path / "model", scripts), measure(model, scripts)  # type: ignore[arg-type]
    assert saved["metrics"] == kept["metrics"] and saved["model"]["sha256"] == kept["model"]["sha256"]
    assert saved["model"]["source"] == str(tmp_path / "model")
    assert spigan.evaluate is evaluate


def test_seeds(model: SPIGAN, scripts: Path) -> None:
    assert measure(model, scripts, seed=1)["metrics"] != measure(model, scripts)["metrics"]
    batches = list(draw(Sampler(model, output="uint8", batch_size=4), 10, 5))
    assert [len(images) for images in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), Sampler(model, output="uint8", batch_size=4)(range(5, 15)))


def test_the_random_state_is_left_alone(model: SPIGAN, scripts: Path) -> None:
    state = torch.get_rng_state()
    measure(model, scripts)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_decoded_on_demand(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (12, 10), dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    kept, decoded = (
        measure(model, scripts, data=DataConfig(source=str(tmp_path), cache=how), samples=60)
        for how in ("memory", "none")
    )
    assert kept["metrics"] == decoded["metrics"]
    assert kept["reference"]["native_width"] == [10, 10] and kept["reference"]["resolution"] == 8


def test_few_reference_images(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="the reference has 5 images; at least 6 are needed"):
        measure(model, scripts, data=DataConfig(source=str(tmp_path)))


def test_unfitting_reference(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"images of 3 channel\(s\), but the model makes 1: set data.channels to 1"):
        measure(model, scripts, data=DataConfig(source=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data.resolution is 16, but the model makes images of 8 x 8: leave it out"):
        measure(model, scripts, data=DataConfig(source="digits", resolution=16))
    with pytest.raises(ValueError, match="seeds must be in"):
        measure(model, scripts, seed=-1)


def test_models_of_random_weights_are_far(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """The way from weights to a result on real images: 128 samples of a random model are far from 300 photographs."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(next(shared("cifar10").glob("test-*"))).slice(0, 300)
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    torch.manual_seed(0)
    small = SPIGAN(ModelConfig(resolution=32, dim_h=16, embed_channels=4, channel_base=256, channel_max=8))
    spec = f"cifar10-resnet56={shared('feature_nets/cifar10_resnet56.safetensors')}"
    data = DataConfig(source=str(tmp_path))
    result = evaluate(small.eval(), data=data, features=spec, samples=128, progress=False)
    assert result["metrics"]["FD-ResNet56"] > 3
    assert result["metrics"]["coverage"] < 0.2 and 1 <= result["metrics"]["IS-ResNet56"] < 5
    assert result["features"]["resizing"] == "none"


def test_time_is_limited(model: SPIGAN) -> None:
    nfe, seconds = time_100_images(Sampler(model), repeats=3, limit=0.0)
    assert nfe == 1.0 and seconds > 0
