"""`spigan evaluate`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spigan import SPIGAN, DataConfig
from spigan.cli import app
from spigan.evaluation import evaluate as module


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
    assert "warning: 20 samples are not more than the 48 features" in result.stderr
    assert "FD-pixels" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "source"),
    [([], "digits"), (["digits"], "digits"), (["cifar10-small"], "cifar10"), (["digits", "--data", "x/y"], "x/y")],
)
def test_reference_of_a_bundled_model(monkeypatch: pytest.MonkeyPatch, arguments: list[str], source: str) -> None:
    """What it was trained on, unless --data names other images."""
    asked = []

    def evaluate(model: Any, *, data: DataConfig, **options: Any) -> None:
        asked.append(data.source)
        raise ValueError("measured enough")

    monkeypatch.setattr(module, "evaluate", evaluate)
    assert "measured enough" in cli("evaluate", *arguments, "--quiet").stderr
    assert asked == [source]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FID needs the Inception network of 2015-12-05"),
        (["--features", "cifar10-resnet56"], "use cifar10-resnet56=PATH with its safetensors file"),
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
    lines = result.stderr.splitlines()  # a slow machine shows progress bars first
    assert message in result.stderr and any(line.startswith("error: ") for line in lines)


TINY = [f"model.{field}" for field in ("dim_h=8", "embed_channels=2", "channel_base=32", "channel_max=4")]


def write_images(folder: Path, first: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(20):
        pixels = np.random.default_rng(first + i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.bmp")


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_the_images_of_a_run_from_another_folder(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    """A relative path means the folder where training began; other images there are refused."""
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "result.json"
    write_images(first / "photos", 0)
    write_images(second / "photos", 100)
    monkeypatch.chdir(first)
    fields = [*TINY, "model.resolution=8", f"data.cache={cache}", "data.workers=0"]
    options = ("--preset", "digits", "--data", "photos", "--kimg", 0.008, "--batch", 8, "--device", "cpu", "--quiet")
    result = cli("train", *options, "--out", tmp_path / "run", *(f"--set={field}" for field in fields))
    assert result.exit_code == 0, result.output
    monkeypatch.chdir(second)
    measure = ("evaluate", tmp_path / "run", "--features", scripts / "pixels.pt", "--samples", 20, "--device", "cpu")
    result = cli(*measure, "--out", out, "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["reference"]["source"] == str((first / "photos").resolve())
    assert cli(*measure, "--data", "photos", "--quiet").exit_code == 0  # others may be asked for

    result = cli("train", "--resume", tmp_path / "run", "--kimg", 0.016, "--quiet")
    assert result.exit_code == 0, result.output

    (first / "photos").rename(tmp_path / "moved")
    (second / "photos").rename(tmp_path / "away")
    result = cli("train", "--resume", tmp_path / "run", "--quiet")
    assert result.exit_code == 1 and "data.source in" in result.stderr and "add --data PATH" in result.stderr
    result = cli("train", "--resume", tmp_path / "run", "--data", tmp_path / "away", "--quiet")
    assert result.exit_code == 1 and "are not those that the run was trained on" in result.stderr
    result = cli("train", "--resume", tmp_path / "run", "--data", tmp_path / "moved", "--kimg", 0.024, "--quiet")
    assert result.exit_code == 0, result.output
    assert cli("train", "--resume", tmp_path / "run", "--kimg", 0.032, "--quiet").exit_code == 0  # it is recorded

    write_images(tmp_path / "moved", 200)
    result = cli(*measure, "--quiet")
    assert result.exit_code == 1 and "are not those that the run was trained on" in result.stderr
