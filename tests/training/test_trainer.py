"""The trainer: the length of a run, its images, progress, and that it learns."""

from __future__ import annotations

import math
import re
import time

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import (
    counting,
    spy,
    train,
    unchanged,
    weights,
)

from spigan.models.load import resolve_device
from spigan.runs import read_config, read_metrics, read_stats
from spigan.training.trainer import Trainer


@pytest.mark.parametrize(("total_kimg", "seen"), [(0.008, 8), (0.009, 12), (0.0001, 4)])
def test_fit_ends_after_total_kimg_with_a_generator_iteration(new_trainer, total_kimg, seen):
    trainer = new_trainer(total_kimg=total_kimg)
    ema = trainer.fit()
    assert ema is trainer.ema and not trainer.interrupted
    assert trainer.images_seen == seen and trainer.state.images_drawn == 2 * seen and trainer.iteration == seen // 2


def test_fit_ends_after_total_seconds_of_cpu_time(new_trainer):
    trainer = new_trainer(total_kimg=1000, total_seconds=0.5, tick_kimg=0.004)
    began = time.process_time()
    trainer.fit()
    assert time.process_time() - began >= 0.5 <= trainer.state.elapsed
    assert not trainer.interrupted and trainer.iteration % 2 == 0 and trainer.iteration > 0
    assert read_stats(trainer.run_dir)[-1]["seconds"] <= trainer.state.elapsed
    resumed = Trainer.resume(trainer.run_dir, progress=False)
    resumed.fit()
    assert resumed.iteration == trainer.iteration  # its time is up
    longer = Trainer.resume(trainer.run_dir, total_seconds=0.8, progress=False)
    longer.fit()
    assert longer.iteration > trainer.iteration and longer.state.elapsed >= 0.8
    assert read_config(trainer.run_dir).total_seconds == 0.8


def test_a_run_that_time_ends_is_measured_at_its_end(new_trainer):
    trainer = new_trainer(
        total_kimg=1000, total_seconds=0.3, metric_features="pixels", metric_samples=16, metric_ticks=10**6
    )
    trainer.fit()
    (row,) = read_metrics(trainer.run_dir)
    assert row["iteration"] == trainer.iteration and row["FD-pixels"] > 0


def test_every_iteration_draws_new_images(new_trainer, monkeypatch):
    """D and G iterations take turns in one shuffled stream: no image comes again before the epoch ends."""
    trainer = new_trainer(total_kimg=0.08)
    taken = spy(monkeypatch, trainer, "train_iteration", lambda images: images)
    monkeypatch.setattr(trainer, "train_iteration", counting(trainer, taken))
    trainer.fit()
    images = torch.cat(taken).flatten(1)
    assert len(images) == 160
    assert len(images.unique(dim=0)) == len(images)


def test_same_seed_same_run_other_seed_other_run(new_trainer):
    first, same, other = (new_trainer(seed=seed) for seed in (0, 0, 1))
    for trainer in (first, same, other):
        torch.manual_seed(trainer.config.seed)
        train(trainer, 2)
    assert unchanged(first.model, weights(same.model)) == set(weights(first.model))
    assert "generator.b8.conv1.weight" not in unchanged(first.model, weights(other.model))


def test_errors_of_construction(tiny_config, tmp_path):
    with pytest.raises(ValueError, match=r"1 channel\(s\), but the model makes 3"):
        Trainer(tiny_config(model={"img_channels": 3}), tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA device"):
            resolve_device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")


# ---- Progress, and that it learns ----


def test_progress_bar(tiny_config, tmp_path, capsys):
    trainer = Trainer(tiny_config(), tmp_path / "run", progress=True)
    trainer.fit()
    last = capsys.readouterr().err.split("\r")[-1]
    rows = read_stats(trainer.run_dir)
    assert "24/24" in last and "100%" in last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last), "elapsed < remaining"
    assert re.search(r"[\d.]+ ?img/s|s/img", last)
    assert f"D={rows[-1]['loss_d']:.3f}" in last and f"G={rows[-1]['loss_g']:.3f}" in last


def test_no_progress_bar(new_trainer, capsys):
    new_trainer(total_kimg=0.004).fit()
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out == ""


def test_learns_the_mean_of_the_data(tiny_config, tmp_path):
    """Images of one bright grey each: the generator's go from dark to as bright within 100 updates."""
    folder = tmp_path / "data"
    folder.mkdir()
    for value in range(32):
        Image.fromarray(np.full((8, 8), 180 + value, dtype=np.uint8)).save(folder / f"{value:02d}.png")
    config = tiny_config(
        data={"source": str(folder)}, batch=8, intervals=1, total_kimg=0.48, tick_kimg=0.12, lr_g=5e-3, lr_d=5e-3,
        r1_gamma=0.1, r1_interval=4, ema_kimg=0.04, ema_rampup=None,
    )  # fmt: skip
    trainer = Trainer(config, tmp_path / "run", progress=False)
    z = torch.randn(32, 1, 8, 8)

    @torch.no_grad()
    def error() -> float:
        return abs(trainer.ema(z).mean().item() - (195.5 / 127.5 - 1))

    before = error()
    trainer.fit()
    after = error()
    assert before > 0.3, "nothing to learn"
    assert after < 0.4 * before
    rows = read_stats(trainer.run_dir)
    assert len(rows) == 4 and all(math.isfinite(value) for row in rows for value in row.values())
