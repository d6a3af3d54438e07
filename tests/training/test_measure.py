"""Metrics during training: rows, the best model, and that they change nothing about the run."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from spigan import SPIGAN, DataConfig
from spigan.config import TrainConfig
from spigan.evaluation.evaluate import evaluate
from spigan.runs import read_best, read_metrics, read_stats
from spigan.training.checkpoint import checkpoints, load_checkpoint, remove_scratch
from spigan.training.measure import keep_best
from spigan.training.trainer import Trainer

TIMES = {"seconds", "images_per_sec"}


class Means(nn.Module):
    """2 x 2 means, and random numbers that it draws from the global generator."""

    def forward(self, images: Tensor) -> Tensor:
        noise = torch.rand(len(images), 1)
        means = nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1) / 255
        return torch.cat([means, 0 * noise], 1)


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function of fields to change: `tiny_config` with metrics every tick (3 of them, 12 iterations)."""
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(path))

    def build(**changes: Any) -> TrainConfig:
        return tiny_config(**{"metric_features": str(path), "metric_samples": 40, "metric_ticks": 1} | changes)

    return build


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))


def fit(config: TrainConfig, folder: Path) -> Trainer:
    trainer = Trainer(config, folder, progress=False)
    trainer.fit()
    return trainer


def rows(run_dir: Path, read: Callable[[Path], list[dict[str, Any]]] = read_metrics) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read(run_dir)]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Same statistics, metrics, last checkpoint and best model, to the bit."""
    assert rows(run_dir) == rows(expected) and rows(run_dir, read_stats) == rows(expected, read_stats)
    assert read_best(run_dir) == read_best(expected)
    weights = [folder / "best" / "model.safetensors" for folder in (run_dir, expected)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    tensors, expected_tensors = (load_checkpoint(checkpoints(folder)[-1])[0] for folder in (run_dir, expected))
    assert [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])] == []


def test_rows(config, tmp_path):
    run = fit(config(), tmp_path / "run").run_dir
    found = read_metrics(run)
    assert [(row["iteration"], row["kimg"]) for row in found] == [(4, 0.008), (8, 0.016), (12, 0.024)]
    names = ["FD-means", "KID-means", "precision", "recall", "density", "coverage"]
    assert all(list(row) == ["iteration", "kimg", "seconds", *names] for row in found)
    assert all(np.isfinite(list(row.values())).all() for row in found)
    events = EventAccumulator(str(run))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("metrics/FD-means")]
    assert logged == [(row["iteration"], pytest.approx(row["FD-means"], rel=1e-6)) for row in found]


def test_every_so_many_ticks(config, tmp_path):
    run = fit(config(metric_ticks=2), tmp_path / "run").run_dir
    assert [row["iteration"] for row in read_metrics(run)] == [8]


def test_a_run_without_metrics_has_no_trace_of_them(config, tmp_path):
    run = fit(config(metric_features=None), tmp_path / "run").run_dir
    assert not (run / "metrics.jsonl").exists() and not (run / "best").exists()


@pytest.mark.parametrize("changes", [{}, {"augment": "ada", "xflip": True}], ids=["plain", "ada"])
def test_metrics_change_nothing_about_the_run(config, tmp_path, changes):
    """Not a weight, nor a random number, though the feature network draws some."""
    measured = fit(config(**changes), tmp_path / "measured").run_dir
    plain = fit(config(metric_features=None, **changes), tmp_path / "plain").run_dir
    assert rows(measured, read_stats) == rows(plain, read_stats)
    tensors, expected = (load_checkpoint(checkpoints(folder)[-1])[0] for folder in (measured, plain))
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []


def test_best_is_the_model_of_the_lowest_distance(config, tmp_path):
    settings = config(snapshot_ticks=1, keep_checkpoints=10)
    run = fit(settings, tmp_path / "run").run_dir
    best = min(read_metrics(run), key=lambda row: row["FD-means"])
    record = json.loads((run / "best" / "metrics.json").read_text())
    assert record == {
        "metric": "FD-means",
        "value": best["FD-means"],
        **{k: v for k, v in best.items() if k != "seconds"},
    }
    (kept,) = [path for path in checkpoints(run) if f"{best['iteration']:08d}" in path.name]
    tensors = load_checkpoint(kept)[0]
    for name, tensor in SPIGAN.from_pretrained(run / "best").state_dict().items():
        assert torch.equal(tensor, tensors[f"ema.{name}"])
    # The record is what an evaluation of that folder finds.
    again = evaluate(
        run / "best", data=DataConfig(source="digits"), features=settings.metric_features, samples=40, device="cpu",
        progress=False,
    )  # fmt: skip
    assert again["metrics"]["FD-means"] == pytest.approx(best["FD-means"], rel=1e-6)


def test_best_is_replaced_by_better_ones_alone(tmp_path, config):
    trainer = Trainer(config(), tmp_path / "run", progress=False)
    assert read_best(trainer.run_dir) is None
    for value, expected in ((3.0, True), (4.0, False), (3.0, False), (2.0, True)):
        row = {"iteration": 4, "kimg": 1.0, "seconds": 1.0, "FD": value}
        assert keep_best(trainer.run_dir, trainer.ema, row, "FD") is expected
    assert read_best(trainer.run_dir) == {"metric": "FD", "value": 2.0, "iteration": 4, "kimg": 1.0, "FD": 2.0}
    for text in ("", "[]", "{", '{"value": null}', '{"value": "low"}'):
        (trainer.run_dir / "best" / "metrics.json").write_text(text)
        assert read_best(trainer.run_dir) is None
        assert keep_best(trainer.run_dir, trainer.ema, row | {"FD": 9.0}, "FD")


# ---- Resume ----


@pytest.mark.parametrize("stop", [3, 8])
def test_a_stopped_run_equals_one_that_never_stopped(config, tmp_path, stop):
    straight = fit(config(), tmp_path / "straight").run_dir
    trainer = Trainer(config(), tmp_path / "stopped", progress=False)
    original = trainer.train_iteration

    def train_iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == stop:
            signal.raise_signal(signal.SIGINT)

    trainer.train_iteration = train_iteration  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.interrupted and trainer.iteration == stop
    Trainer.resume(tmp_path / "stopped", progress=False).fit()
    assert_same_run(tmp_path / "stopped", straight)


def test_rows_beyond_the_checkpoint_are_measured_again(config, tmp_path):
    """As after a kill between a measurement and the next checkpoint."""
    run = fit(config(snapshot_ticks=1, keep_checkpoints=10), tmp_path / "run").run_dir
    killed = shutil.copytree(run, tmp_path / "killed")
    for path in checkpoints(killed)[2:]:  # 0 and 4 are left
        path.unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 16, "ki')
    trainer = Trainer.resume(killed, progress=False)
    assert trainer.iteration == 4
    trainer.fit()
    assert_same_run(killed, run)


def test_a_longer_resume_equals_one_long_run(config, tmp_path):
    straight = fit(config(), tmp_path / "straight").run_dir
    fit(config(total_kimg=0.012), tmp_path / "run")
    Trainer.resume(tmp_path / "run", total_kimg=0.024, progress=False).fit()
    assert_same_run(tmp_path / "run", straight)


def test_scratch_of_a_kill_is_removed(config, tmp_path):
    run = fit(config(), tmp_path / "run").run_dir
    before = {path for path in run.rglob("*")}
    (run / "best" / ".saving-abc").mkdir()
    (run / "best" / ".saving-abc" / "model.safetensors").touch()
    (run / "best" / ".metrics.json-abc.json").touch()
    (run / ".metrics.jsonl-abc.jsonl").touch()
    remove_scratch(run)
    assert set(run.rglob("*")) == before


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"metric_features": "nowhere.pt"}, FileNotFoundError, "the file 'nowhere.pt' does not exist"),
        ({"metric_features": "inception"}, FileNotFoundError, "FID needs the Inception network of 2015-12-05"),
        ({"metric_samples": 5}, ValueError, "samples is 5; at least 6 are needed"),
    ],
)
def test_errors_come_before_anything_is_written(config, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        Trainer(config(**changes), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
