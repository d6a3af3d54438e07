"""The clock, and divergence: found before it spoils a checkpoint, explained, and kept for a diagnosis."""

from __future__ import annotations

import math
import re
import signal

import pytest
from torch import Tensor
from training_helpers import (
    keep_gradients,
    poison,
    train,
    unchanged,
    weights,
)

from spigan.runs import read_stats
from spigan.training.checkpoint import checkpoints, load_checkpoint
from spigan.training.statistics import Clock
from spigan.training.trainer import Trainer


@pytest.mark.parametrize(
    ("loss", "named", "changes", "iteration", "good", "network"),
    [
        ("fake_loss", "loss_d", {}, 6, 4, "discriminator"),
        ("real_loss", "loss_d", {"augment": "ada"}, 6, 4, "discriminator"),
        ("generator_loss", "loss_g", {}, 7, 4, "model"),
        ("r1_penalty", "r1", {"r1_interval": 4}, 8, 8, "discriminator"),
        ("path_lengths", "path_length", {"pl_weight": 1.0}, 9, 8, "model"),
    ],
)
def test_a_loss_that_is_not_a_number_ends_the_run(
    new_trainer, monkeypatch, loss, named, changes, iteration, good, network
):
    """On the CPU before the step that it would have spoilt the weights by."""
    trainer = new_trainer(snapshot_ticks=1, **changes)
    poison(monkeypatch, trainer, loss, iteration=6)
    with pytest.raises(
        FloatingPointError, match=rf"\b{named} \(nan\) is not finite at iteration {iteration} "
    ) as caught:
        trainer.fit()
    newest = checkpoints(trainer.run_dir)[-1]
    assert int(re.findall(r"\d+", newest.name)[0]) == good
    for text in (
        str(newest),
        f"spigan train --resume {trainer.run_dir}",
        "Advice: lower ",
        str(trainer.run_dir / "failed"),
    ):
        assert text in str(caught.value)
    # What is kept for a diagnosis has the weights of before the step, and the gradients that it did not take.
    failed, counters = load_checkpoint(trainer.run_dir / "failed" / f"state-{iteration:08d}.safetensors")
    assert counters["iteration"] == iteration
    assert all(tensor.isfinite().all() for name, tensor in failed.items() if name.startswith(("model.", "discrim")))
    assert any(tensor.isnan().any() for name, tensor in failed.items() if name.startswith(f"grad.{network}."))
    assert named in (trainer.run_dir / "failed" / "error.txt").read_text()
    tensors, _ = load_checkpoint(newest)
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
    assert all(math.isfinite(value) for row in read_stats(trainer.run_dir) for value in row.values())
    assert Trainer.resume(trainer.run_dir, progress=False).iteration == good


def test_exploding_gradients_end_the_run(tiny_config, tmp_path):
    """Of a learning rate of 100, long before a number overflows."""
    trainer = Trainer(tiny_config(lr_g=100.0, precision="bf16"), tmp_path / "run", progress=False)
    with pytest.raises(FloatingPointError, match=r"grad_norm_\w+ \(\S+\) is above grad_norm_limit = 1e\+06") as caught:
        trainer.fit()
    assert "set precision to fp32" in str(caught.value)
    assert all(p.isfinite().all() for module in trainer.state.modules().values() for p in module.parameters())
    assert [path.name for path in checkpoints(trainer.run_dir)] == ["checkpoint-00000000.safetensors"]
    # As the message says: another learning rate in config.json, and it goes on from the last good checkpoint.
    config = tiny_config(lr_g=1e-3).model_dump_json()
    (trainer.run_dir / "config.json").write_text(config)
    again = Trainer.resume(trainer.run_dir, progress=False)
    again.fit()
    assert again.iteration == 12


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_limit_of_gradient_norms_is_the_configured_one(new_trainer, share):
    first = new_trainer(intervals=1, r1_gamma=0)
    train(first, 1)
    norm = first.state.statistics.take_means()["grad_norm_d"]
    trainer = new_trainer(intervals=1, r1_gamma=0, grad_norm_limit=share * norm)
    if share > 1:
        train(trainer, 1)
        return
    before = weights(trainer.discriminator)
    with pytest.raises(FloatingPointError, match=r"grad_norm_d \(\S+\) is above grad_norm_limit"):
        train(trainer, 1)
    assert unchanged(trainer.discriminator, before) == set(before)


def test_where_a_step_may_not_be_waited_for_a_tick_finds_it(new_trainer, monkeypatch):
    """As on a GPU: the iteration is that of the step all the same."""
    trainer = new_trainer(snapshot_ticks=1)
    poison(monkeypatch, trainer, "fake_loss", iteration=6)
    trainer.algorithm.updates.check_every_step = False
    with pytest.raises(FloatingPointError, match=r"loss_d \(nan\) is not finite at iteration 6 \(0.012 kimg\)"):
        trainer.fit()
    assert trainer.iteration == 8 and read_stats(trainer.run_dir)[-1]["iteration"] == 4
    assert [path.name for path in checkpoints(trainer.run_dir)][-1] == "checkpoint-00000004.safetensors"


def test_norms_are_of_the_gradients(new_trainer, monkeypatch):
    trainer = new_trainer(pl_weight=1.0)
    gradients = keep_gradients(monkeypatch, trainer)
    train(trainer, 2)
    series = trainer.state.statistics.tensors(joint=False)
    recorded = [value for name in ("d", "r1", "g", "pl") for value in series[f"grad_norm_{name}"].tolist()]
    expected = [math.sqrt(sum(g.double().square().sum().item() for g in step.values())) for step in gradients]
    assert len(expected) == 8
    assert sorted(recorded) == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize("end", ["total", "signal"])
def test_divergence_between_ticks_is_not_passed_over(new_trainer, monkeypatch, end):
    """Neither the end of a run nor Ctrl-C hides it, although no tick has found it yet."""
    trainer = new_trainer(tick_kimg=1, total_kimg=0.012)
    poison(monkeypatch, trainer, "generator_loss", iteration=3)
    if end == "signal":
        original = trainer.train_iteration

        def iteration(images: Tensor) -> None:
            original(images)
            if trainer.iteration == 4:
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(trainer, "train_iteration", iteration)
    with pytest.raises(FloatingPointError, match="loss_g"):
        trainer.fit()
    assert [path.name for path in checkpoints(trainer.run_dir)] == ["checkpoint-00000000.safetensors"]


def test_weights_that_are_not_finite_are_never_saved(new_trainer, monkeypatch):
    """The losses of the last iteration cannot tell what its step did to the weights."""
    trainer = new_trainer(tick_kimg=1, total_kimg=0.008)
    original = trainer.train_iteration

    def iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == 4:
            trainer.discriminator.fromrgb.weight.data[0] = math.inf

    monkeypatch.setattr(trainer, "train_iteration", iteration)
    with pytest.raises(FloatingPointError, match="weights of discriminator"):
        trainer.fit()
    assert len(checkpoints(trainer.run_dir)) == 1


# ---- The clock ----


def test_the_clock_leaves_out_pauses():
    """And counts the seconds of earlier sessions."""
    now = 100.0
    clock = Clock(10.0, images=50, now=lambda: now)
    now += 2
    with clock.paused():
        now += 1000
    now += 1
    assert clock.seconds() == 13.0
    assert clock.tick(80) == 10.0  # 30 images in 3 s
    now += 4
    assert clock.tick(100) == 5.0
    assert clock.seconds() == 17.0
