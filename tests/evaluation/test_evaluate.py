"""Evaluation of a model: what a result records, the cache, early errors, and real images."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import spigan
from spigan import SPIGAN, DataConfig, ModelConfig
from spigan.cli import app
from spigan.cli.evaluate import reference_config
from spigan.data import open_dataset
from spigan.evaluation import evaluate as module
from spigan.evaluation import metrics
from spigan.evaluation.cache import cache_folder
from spigan.evaluation.evaluate import Evaluator, draw, evaluate
from spigan.evaluation.features import load_features
from spigan.sampling import Sampler

DIGITS = DataConfig(source="digits")


def measure(model: SPIGAN, scripts: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "data": DIGITS,
        "features": str(scripts / "pixels.pt"),
        "samples": 100,
        "progress": False,
    }
    return evaluate(model, **options | changes)


def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that features are computed of, as they are."""
    counts = []
    plain = Evaluator.features

    def counted(self: Evaluator, batches: Any, count: int, reference: bool = False) -> Any:
        if reference:
            counts.append(count)
        return plain(self, batches, count, reference)

    monkeypatch.setattr(Evaluator, "features", counted)
    return counts


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
    (x, _), (y, p) = net(dataset.__getitems__(range(1797))), net(images, probabilities=True)
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


# ---- Cache ----


def test_cache(model: SPIGAN, scripts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = computations(monkeypatch)
    first = measure(model, scripts)
    files = sorted((cache / "features").iterdir())
    assert [file.name.split("-")[:4] for file in files] == [["digits", "train", "8", "pixels"]] * 2
    assert counts == [1797]
    assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797]
    # Other numbers of neighbours, the same features.
    measure(model, scripts, samples=120)
    assert counts == [1797] and len(list((cache / "features").iterdir())) == 3
    # Another filter, another network and another folder are other statistics.
    measure(model, scripts, data=DataConfig(source="digits", resize="box"))
    measure(model, scripts, features=str(scripts / "classifier.pt"))
    measure(model, scripts, cache_dir=cache / "own")
    assert counts == [1797] * 4


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: data[: len(data) // 2]])
def test_damaged_cache_is_computed_again(
    model: SPIGAN, scripts: Path, cache: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = computations(monkeypatch)
    first = measure(model, scripts)
    files = sorted((cache / "features").iterdir())
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged .*: it is computed again"):
        assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797, 1797]
    assert [file.read_bytes() for file in files] == whole
    # One of other contents under this name is not taken either.
    files[1].write_bytes(whole[0])  # the neighbours' instead of the features
    assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797, 1797, 1797]


def test_cache_that_cannot_be_written(model: SPIGAN, scripts: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept for later .*set SPIGAN_CACHE"):
        result = measure(model, scripts)
    assert result["metrics"]["FD-pixels"] > 0


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == Path(os.environ["SPIGAN_CACHE"])
    assert cache_folder("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("SPIGAN_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "spigan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spigan"


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


# ---- Mistakes ----


def test_few_images_are_told(model: SPIGAN, scripts: Path) -> None:
    with pytest.warns(UserWarning, match="48 samples are no more than the 48 features: the covariance is singular"):
        result = measure(model, scripts, samples=48)
    assert len(result["warnings"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measure(model, scripts, samples=49)
    with pytest.raises(ValueError, match="samples is 5; at least 6 are needed, and more than 48 for a sound FD-pixels"):
        measure(model, scripts, samples=5)


def test_few_reference_images(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    for i in range(5):
        Image.fromarray(np.full((8, 8), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="the reference has 5 images; at least 6 are needed"):
        measure(model, scripts, data=DataConfig(source=str(tmp_path)))


def test_unfitting_reference(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match=r"images of 3 channel\(s\), the model makes 1: set channels to 1"):
        measure(model, scripts, data=DataConfig(source=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data.resolution is 16, but the model makes images of 8 x 8: leave it out"):
        measure(model, scripts, data=DataConfig(source="digits", resolution=16))
    with pytest.raises(ValueError, match="seeds must be in"):
        measure(model, scripts, seed=-1)


def test_wrong_number_of_images(scripts: Path) -> None:
    evaluator = Evaluator(
        open_dataset(DIGITS, progress=False), load_features(str(scripts / "pixels.pt")), progress=False
    )
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    for count, message in ((25, "25 images were announced, but 20 came"), (15, "15 .* but more came")):
        with pytest.raises(ValueError, match=message):
            evaluator.measure(images.split(8), count)
    with pytest.raises(ValueError, match="10 images were announced, but 0 came"):
        evaluator.measure([], 10)


def test_equal_samples(scripts: Path) -> None:
    """A collapsed generator gets numbers, not errors."""
    evaluator = Evaluator(
        open_dataset(DIGITS, progress=False), load_features(str(scripts / "pixels.pt")), progress=False
    )
    values = evaluator.measure([torch.zeros(100, 1, 8, 8, dtype=torch.uint8)], 100).values
    assert values["FD-pixels"] > 1 and values["recall"] == 0.0 and values["coverage"] == 0.0


# ---- Command line ----


def cli(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


def test_command_line(model: SPIGAN, scripts: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "new" / "result.json"
    result = cli(
        *("evaluate", tmp_path / "model", "--data", "digits", "--features", f"means={scripts / 'classifier.pt'}"),
        *("--samples", 60, "--seed", 3, "--out", out, "--device", "cpu", "--resize", "box", "--quiet"),
    )
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["reference"]["resize"] == "box" and written["samples"]["seeds"] == [3, 62]
    for name, value in written["metrics"].items():
        assert any(line.split()[:2] == [name, f"{value:.5g}"] for line in result.stdout.splitlines()), result.stdout
    assert "NFE" in result.stdout and "seconds per 100 images" in result.stdout
    assert "60 samples (seeds 3 to 62, uint8, float32) against 1797 images of digits, train; features: means" in (
        result.stdout
    )


def test_command_line_of_a_run(scripts: Path, tmp_path: Path) -> None:
    """What it was trained on is the reference of a run, of its last model and of its best one."""
    run = tmp_path / "run"
    fields = ("dim_h=8", "embed_channels=2", "channel_base=32", "channel_max=4", "resolution=8")
    result = cli(
        *("train", "--preset", "digits", "--out", run, "--kimg", 0.04, "--batch", 8, "--device", "cpu", "--quiet"),
        *(f"--set=model.{field}" for field in fields),
        *("--set=tick_kimg=0.02", "--set=metric_ticks=1", "--set=metric_samples=50", "--set=data.resize=box"),
        f"--set=metric_features={scripts / 'classifier.pt'}",
    )
    assert result.exit_code == 0, result.output
    for folder in (run, run / "model", run / "best"):
        result = cli(
            *("evaluate", folder, "--features", scripts / "classifier.pt", "--samples", 50, "--device", "cpu"),
            *("--out", tmp_path / "result.json", "--quiet"),
        )
        assert result.exit_code == 0, result.output
        written = json.loads((tmp_path / "result.json").read_text())
        assert written["reference"]["source"] == "digits" and written["reference"]["resize"] == "box"
    best = json.loads((run / "best" / "metrics.json").read_text())
    assert written["metrics"]["FD-classifier"] == pytest.approx(best["value"], rel=1e-6)


def test_command_line_warns(scripts: Path) -> None:
    result = cli("evaluate", "--features", scripts / "pixels.pt", "--samples", 20, "--device", "cpu", "--quiet")
    assert result.exit_code == 0, result.output  # the bundled model, against what it was trained on
    assert "warning: 20 samples are no more than the 48 features" in result.stderr
    assert "FD-pixels" in result.stdout


def test_reference_of_a_bundled_model() -> None:
    """What it was trained on, unless --data says others."""
    none = {"split": None, "channels": None, "resize": None}
    assert [reference_config(name, None, none).source for name in (None, "digits", "cifar10-small")] == [
        "digits", "digits", "cifar10"
    ]  # fmt: skip
    assert reference_config("cifar10-small", "elsewhere", none | {"split": "test"}).source == "elsewhere"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FID needs the Inception network of 2015-12-05"),
        (["--features", "cifar10-resnet56"], "give cifar10-resnet56=PATH of its safetensors"),
        (["--features", "PIXELS", "--samples", "3"], "samples is 3; at least 6 are needed"),
        (["--features", "PIXELS", "--split", "test"], "digits has no split 'test'"),
        (["--features", "PIXELS", "--resize", "cubic"], "resize: Input should be 'lanczos'"),
        (["--features", "PIXELS", "--dtype", "int8"], "--dtype must be float32, bfloat16 or float16"),
        (["--features", "PIXELS", "--data", "nowhere/at/all"], "does not exist"),
        (
            ["nowhere", "--features", "PIXELS"],
            "nowhere is not a training run, so its training images are unknown: pass --data",
        ),
        (["nowhere", "--data", "digits", "--features", "PIXELS"], "neither an existing folder nor a hub id"),
        (["--features", "PIXELS", "--out", "."], "--out . is a folder"),
    ],
)
def test_command_line_refuses(scripts: Path, arguments: list[str], message: str) -> None:
    given = [str(scripts / "pixels.pt") if argument == "PIXELS" else argument for argument in arguments]
    result = cli("evaluate", *given, "--device", "cpu")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert message in result.stderr and result.stderr.startswith("error: ")


# ---- Real images ----


def damaged(images: Tensor, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    return (images.float() + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def test_distance_rises_with_damage(shared: Callable[[str], Path]) -> None:
    """400 test images against themselves, noised more and more."""
    net = load_features(f"cifar10-resnet56={shared('feature_nets/cifar10_resnet56.safetensors')}")
    config = DataConfig(source=str(shared("cifar10")), split="test", cache="none")
    images = open_dataset(config, progress=False).__getitems__(range(400))
    clean = metrics.mean_and_covariance(net(images)[0])
    slightly, badly = (
        metrics.frechet_distance(*clean, *metrics.mean_and_covariance(net(damaged(images, sigma))[0]))
        for sigma in (10, 20)
    )
    assert 1.0 < slightly < badly / 1.5


@pytest.mark.slow
def test_the_whole_of_cifar10(shared: Callable[[str], Path]) -> None:
    """Train against test is the floor; noise rises above it, step by step; neighbours of both are the same."""
    net = load_features(f"cifar10-resnet56={shared('feature_nets/cifar10_resnet56.safetensors')}")
    source = str(shared("cifar10"))
    train, test = (open_dataset(DataConfig(source=source, split=split), progress=False) for split in ("train", "test"))
    evaluator = Evaluator(train, net, progress=False)
    images = test.__getitems__(range(len(test)))
    floor = evaluator.measure(images.split(500), len(images)).values
    assert floor["coverage"] > 0.93 and floor["recall"] > 0.82  # two samples of one distribution: 0.97 and 0.86
    previous = floor["FD-ResNet56"]
    assert previous < 0.1
    for sigma in (5, 10, 20):
        some = damaged(images[:2500], sigma)
        values = evaluator.measure(some.split(500), len(some)).values
        assert values["FD-ResNet56"] > previous
        previous = values["FD-ResNet56"]


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
    nfe, seconds = module.time_100_images(Sampler(model), repeats=3, limit=0.0)
    assert nfe == 1.0 and seconds > 0
