"""Evaluator: warnings, wrong numbers of images, and real images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spigan import SPIGAN, DataConfig
from spigan.data import open_dataset
from spigan.data import workers as workers_module
from spigan.evaluation import evaluator as evaluator_module
from spigan.evaluation import metrics
from spigan.evaluation.evaluate import describe_features, evaluate
from spigan.evaluation.evaluator import Evaluator
from spigan.evaluation.features import load_features

DIGITS = DataConfig(source="digits")


def measure(model: SPIGAN, scripts: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "data": DataConfig(source="digits"),
        "features": str(scripts / "pixels.pt"),
        "samples": 100,
        "progress": False,
    }
    return evaluate(model, **options | changes)


def test_few_images_cause_a_warning(model: SPIGAN, scripts: Path) -> None:
    with pytest.warns(UserWarning, match="48 samples are not more than the 48 features, so the covariance is singular"):
        result = measure(model, scripts, samples=48)
    assert len(result["warnings"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(model, scripts, samples=49)
    with pytest.raises(
        ValueError, match="samples is 5; at least 6 are needed, and more than 48 for a meaningful FD-pixels"
    ):
        measure(model, scripts, samples=5)


def test_wrong_number_of_images(scripts: Path) -> None:
    evaluator = Evaluator(
        open_dataset(DIGITS, progress=False), load_features(str(scripts / "pixels.pt")), progress=False
    )
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    for count, message in ((25, "expected 25 images, got 20"), (15, "expected 15 images, got more")):
        with pytest.raises(ValueError, match=message):
            evaluator.measure(images.split(8), count)
    with pytest.raises(ValueError, match="expected 10 images, got 0"):
        evaluator.measure([], 10)


def test_equal_samples(scripts: Path) -> None:
    """A collapsed generator gets numbers, not errors."""
    evaluator = Evaluator(
        open_dataset(DIGITS, progress=False), load_features(str(scripts / "pixels.pt")), progress=False
    )
    values = evaluator.measure([torch.zeros(100, 1, 8, 8, dtype=torch.uint8)], 100).values
    assert values["FD-pixels"] > 1 and values["recall"] == 0.0 and values["coverage"] == 0.0


def damaged(images: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    return (images.float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def test_distance_rises_with_damage(shared: Callable[[str], Path]) -> None:
    """400 test images against themselves, noised more and more."""
    net = load_features(f"cifar10-resnet56={shared('feature_nets/cifar10_resnet56.safetensors')}")
    config = DataConfig(source=str(shared("cifar10")), split="test", cache="none")
    images = open_dataset(config, progress=False).images(range(400))
    clean = metrics.mean_and_covariance(net(images)[0])
    slightly, badly = (
        metrics.frechet_distance(*clean, *metrics.mean_and_covariance(net(damaged(images, sigma))[0]))
        for sigma in (10, 20)
    )
    assert 1.0 < slightly < badly / 1.5


@pytest.mark.slow
def test_train_and_test_images_of_cifar10_are_alike(shared: Callable[[str], Path], tmp_path: Path) -> None:
    """2,000 training images against 500 test images are the floor; noise rises above it, step by step."""
    parquet = pytest.importorskip("pyarrow.parquet")
    parts = {}
    for split, count in (("train", 2000), ("test", 500)):
        table = parquet.read_table(next(shared("cifar10").glob(f"{split}-*"))).slice(0, count)
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
        config = DataConfig(source=str(tmp_path), split=split)
        parts[split] = open_dataset(config, progress=False)
    net = load_features(f"cifar10-resnet56={shared('feature_nets/cifar10_resnet56.safetensors')}")
    evaluator = Evaluator(parts["train"], net, progress=False)
    images = parts["test"].images(range(500))
    floor = evaluator.measure(images.split(100), len(images)).values
    assert floor["coverage"] > 0.9 and floor["recall"] > 0.8  # two samples of one distribution: 0.95 and 0.90
    assert floor["FD-ResNet56"] < 0.6  # 0.41, by the numbers of images; 0.04 of 50,000 and 10,000
    previous = floor["FD-ResNet56"]
    for sigma in (5, 10, 20):  # 1.9, 7.4, 25.6
        values = evaluator.measure([damaged(images, sigma)], len(images)).values
        assert values["FD-ResNet56"] > 2 * previous
        previous = values["FD-ResNet56"]


def test_images_are_resized_with_the_filter_of_the_reference(
    tmp_path: Path, random_resnet: Callable[[Path], Path]
) -> None:
    """Samples and reference images reach the network's resolution in the same way."""
    net = load_features(f"cifar10-resnet56={random_resnet(tmp_path / 'a.safetensors')}")
    dataset = open_dataset(DataConfig(source="digits", resize="box"), progress=False)
    images = dataset.__getitems__(range(4))
    found, _ = Evaluator(dataset, net, progress=False).features([images], 4)
    assert torch.equal(found, net(images, resize="box")[0])
    assert not torch.equal(found, net(images, resize="lanczos")[0])
    assert describe_features(net, dataset)["resizing"] == "8 to 32 by box (Pillow, antialiased)"


def test_more_samples_than_reference_images(scripts: Path, tmp_path: Path) -> None:
    """Neighbours are looked for among equal numbers: those of the first samples."""
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    net = load_features(str(scripts / "pixels.pt"))
    dataset = open_dataset(DataConfig(source=str(tmp_path)), progress=False)
    images = torch.from_numpy(rng.integers(0, 256, (30, 1, 8, 8), dtype=np.uint8))
    result = Evaluator(dataset, net, progress=False).measure([images], 30)
    x, y = net(dataset.images(range(10)))[0], net(images)[0]
    centre = x.double().mean(0)
    near = metrics.neighbour_metrics(x, y[:10], metrics.neighbour_distances(x, centre), centre)
    assert [result.values[name] for name in near._fields] == pytest.approx(list(near))
    assert result.settings["neighbours_of"] == 10


def write_images(folder: Path, first: int, count: int) -> Path:
    """Random grey pictures of one file size."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(first + i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.bmp")
    return folder


def test_numbers_that_mean_nothing_say_so(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    data = DataConfig(source=str(write_images(tmp_path / "set", 0, 20)))
    with pytest.warns(UserWarning, match="parts of IS-classifier has about 2 samples, fewer than the 3 classes"):
        result = measure(model, scripts, data=data, samples=20, features=str(scripts / "classifier.pt"))
    assert result["spread"]["KID-classifier"] == pytest.approx(0.0, abs=1e-9)
    assert any("every subset of KID-classifier is all 20 images" in text for text in result["warnings"])
    assert len(result["warnings"]) == 2
    result = measure(model, scripts, data=data, samples=30, features=str(scripts / "classifier.pt"))
    assert result["warnings"] == []


def test_repeated_images_cause_a_warning(scripts: Path, tmp_path: Path) -> None:
    """Six copies: the fifth neighbour is at distance 0, and nothing is nearer."""
    folder = write_images(tmp_path / "set", 0, 30)
    for i in range(1, 6):
        (folder / f"{i:02}.bmp").write_bytes((folder / "00.bmp").read_bytes())
    dataset = open_dataset(DataConfig(source=str(folder)), progress=False)
    result = Evaluator(dataset, load_features(str(scripts / "pixels.pt")), progress=False).measure(
        [dataset.images(range(30))], 30
    )
    assert result.values["coverage"] == pytest.approx(24 / 30)
    assert any("6 of 30 reference images have 5 or more copies" in text for text in result.warnings)


def test_exchanged_images_are_noticed(scripts: Path, tmp_path: Path) -> None:
    """Their names and sizes are the same, so the fingerprint of images that are not kept in memory is, too."""
    net = load_features(str(scripts / "pixels.pt"))
    for first in (0, 100):
        config = DataConfig(source=str(write_images(tmp_path / "set", first, 20)), cache="none", workers=0)
        dataset = open_dataset(config, progress=False)
        found = Evaluator(dataset, net, progress=False).reference.features
        assert torch.equal(found, net(dataset.images(range(20)))[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_number_of_workers_is_heeded(
    scripts: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_batches(dataset: Any, *, num_workers: int, **options: Any) -> Any:
        asked.append(num_workers)
        return workers_module.load_batches(dataset, num_workers=0, **options)

    monkeypatch.setattr(evaluator_module, "load_batches", load_batches)
    config = DataConfig(source=str(write_images(tmp_path / "set", 0, 20)), cache="none", workers=workers)
    net = load_features(str(scripts / "pixels.pt"))
    assert Evaluator(open_dataset(config, progress=False), net, progress=False).reference.features.shape == (20, 48)
    assert asked == [workers]
