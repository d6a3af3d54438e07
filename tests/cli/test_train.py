"""`spigan train`: configurations, runs, resuming, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spigan


def test_show_config_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "cifar10", "--show-config", "--kimg", 5, "-k", 3, "--batch", 48, "--seed", 2]
    changes = ["augment=none", "model.ode_steps=8", "model.conv_clamp=256", "ema_rampup=null", "xflip=false"]
    changes += ["data.source=elsewhere", "data.column=img", "device=cpu"]
    shown = json.loads(run("train", *arguments, *(f"--set={change}" for change in changes)))
    config = spigan.TrainConfig.model_validate(shown)
    assert (config.total_kimg, config.intervals, config.batch, config.seed) == (5, 3, 48, 2)
    assert (config.augment, config.model.ode_steps, config.model.conv_clamp) == ("none", 8, 256)
    assert (config.ema_rampup, config.xflip, config.device) == (None, False, "cpu")
    assert (config.data.source, config.data.column) == ("elsewhere", "img")
    expected = spigan.preset("cifar10")
    assert (config.model.dim_h, config.lr_g, config.mbstd_group) == (
        expected.model.dim_h,
        expected.lr_g,
        expected.mbstd_group,
    )
    assert not list(tmp_path.iterdir())


def test_show_config_of_a_file(tmp_path: Path, run: Any) -> None:
    before = json.loads(run("train", "--preset", "cifar10-small", "--show-config"))
    (tmp_path / "config.json").write_text(json.dumps(before))
    after = json.loads(run("train", "--config", tmp_path / "config.json", "--show-config", "--set", "batch=8"))
    assert after == before | {"batch": 8}


def test_data_keeps_the_other_fields_of_a_file(tmp_path: Path, run: Any) -> None:
    fields = {"data": {"source": "digits", "channels": 1, "split": "test"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shown = json.loads(run("train", "--config", tmp_path / "config.json", "--data", "elsewhere", "--show-config"))
    assert [shown["data"][name] for name in ("source", "channels", "split")] == ["elsewhere", 1, "test"]


def test_data_is_for_presets_without(tmp_path: Path, run: Any) -> None:
    shown = json.loads(run("train", "--preset", "celebahq256", "--data", tmp_path, "--show-config"))
    assert shown["data"]["source"] == str(tmp_path)
    assert shown["model"]["resolution"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnist"], "there is no preset 'mnist'"),
        (["--preset", "celebahq256"], "the preset 'celebahq256' needs images"),
        (["--batch", "0"], "batch: Input should be greater than or equal to 1, got 0"),
        (["--kimg", "-1"], "total_kimg: Input should be greater than 0, got -1"),
        (["--set", "colour=red"], "colour: there is no such field, got 'red'"),
        (["--set", "model.colour=red"], "model.colour: there is no such field, got 'red'"),
        (["--set", "model=5"], "model: Input should be a valid dictionary or instance of ModelConfig, got 5"),
        (["--set", "batch.size=5"], "'batch' has no fields"),
        (["--set", "batch"], "--set takes FIELD=VALUE, got 'batch'"),
        (["--set", "model.mapping=mlp"], 'mapping="mlp" has no time and needs intervals=1'),
        (["--preset", "digits", "--config", "{tmp}/none.json"], "--preset and --config cannot be combined"),
        (["--config", "{tmp}/none.json"], "none.json"),
        (["--config", "{tmp}/half.json"], "half.json"),
        (["--config", "{tmp}/list.json"], "list.json"),
        (["--data", "{tmp}/images"], "images"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:99"], "cuda"),
        (["--out", "{tmp}"], "exists and is not empty"),
        (["--resume", "{tmp}"], "{tmp} is not a run folder: it has no config.json"),
        (["--resume", "{tmp}", "--batch", "8"], "--resume uses the run's own configuration: leave out --batch"),
    ],
)
def test_train_refuses(tmp_path: Path, arguments: list[str], message: str, refused: Any) -> None:
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "list.json").write_text("[1, 2]")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    defaults = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    assert message.replace("{tmp}", str(tmp_path)) in refused("train", *defaults, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.json", "list.json"]


def test_train(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "data.json", "stats.jsonl", "reals.png", "checkpoints", "model"}
    assert any(name.startswith("samples-") for name in names)
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = spigan.TrainConfig.model_validate_json((trained / "config.json").read_text())
    assert (config.total_kimg, config.batch, config.model.dim_h) == (0.1, 8, 8)
    images = spigan.sample(2, model=trained, device="cpu")
    assert isinstance(images, torch.Tensor) and images.shape == (2, 1, 16, 16)


def test_train_then_resume_with_more_images(trained: Path, run: Any) -> None:
    rows = (trained / "stats.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["kimg"] == pytest.approx(0.104)
    output = run("train", "--resume", trained, "--kimg", 0.2, "--quiet")
    assert f"{trained}: 0.2 kimg on cpu, K = 2" in output
    assert f"Done. The model is in {trained / 'model'}" in output
    after = (trained / "stats.jsonl").read_text().splitlines()
    assert after[: len(rows)] == rows and len(after) > len(rows)
    assert json.loads(after[-1])["kimg"] == pytest.approx(0.2)
    assert json.loads((trained / "config.json").read_text())["total_kimg"] == 0.2


def test_resume_names_the_options_it_cannot_take(tmp_path: Path, refused: Any) -> None:
    message = refused("train", "--resume", tmp_path, "--preset", "digits", "--batch", 4)
    assert message.endswith("leave out --preset, --batch")
    options = ["--preset", "digits", "--column", "image", "--out", "run", "--config", "config.json", "--set", "batch=4"]
    options += ["--batch", 4, "--seed", 0, "--intervals", 2, "--device", "cpu", "--show-config"]
    message = refused("train", "--resume", tmp_path, *options)
    assert message.endswith(f"leave out {', '.join(str(option) for option in options if str(option).startswith('--'))}")
