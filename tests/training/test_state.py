"""The state of a run: its optimisers, its checkpoint and how it is shown."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_helpers import (
    train,
)

from spigan.training.state import adam


def test_adam_is_corrected_for_lazy_regularisation(new_trainer):
    """A penalty with a step of its own makes interval + 1 steps of interval: lr and log(beta2) shrink in that ratio."""
    fields = {"lr_g": 1e-3, "lr_d": 2e-3, "beta2": 0.9, "r1_interval": 16, "pl_interval": 4}
    cases = [
        ({"r1_gamma": 0, "pl_weight": 0}, 1.0, 1.0),
        ({"r1_gamma": 1, "pl_weight": 0}, 1.0, 16 / 17),
        ({"r1_gamma": 0, "pl_weight": 1}, 4 / 5, 1.0),
    ]
    for changes, ratio_g, ratio_d in cases:
        trainer = new_trainer(**fields | changes)
        for optimizer, lr, ratio in (
            (trainer.state.optimizer_g, 1e-3, ratio_g),
            (trainer.state.optimizer_d, 2e-3, ratio_d),
        ):
            (group,) = optimizer.param_groups
            assert group["lr"] == pytest.approx(lr * ratio)
            assert group["betas"] == (0.0, pytest.approx(0.9**ratio))
            assert group["eps"] == 1e-8 and group["weight_decay"] == 0


def test_adam_step():
    """The first step of Adam with beta1 = 0 moves every weight by lr against its gradient's sign."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = adam(iter([weight]), 0.1, 0.99, None)
    weight.grad = torch.tensor([5.0, -0.01, 2.0])
    optimizer.step()
    torch.testing.assert_close(weight.data, torch.tensor([0.9, -1.9, 2.9]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, {"augment": "ada", "pl_weight": 1.0, "updates": "joint"}], ids=["plain", "ada"]
)
def test_load_restores_what_dump_returned(new_trainer, changes):
    """Every field, into a state of other weights."""
    trainer, other = new_trainer(**changes), new_trainer(**changes, seed=1)
    train(trainer, 3)
    trainer.state.elapsed, trainer.state.images_drawn = 1.5, 12
    tensors, counters = trainer.state.dump()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    torch.rand(3)
    other.state.load(tensors, counters)
    loaded, loaded_counters = other.state.dump()
    assert loaded_counters == counters and counters["iteration"] == 3
    assert loaded.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(loaded[name], tensors[name])] == []
    assert {"pl_mean", "rng.cpu", "statistics.loss_d", "model.mapping.weight"} - tensors.keys() <= {
        "model.mapping.weight"
    }
    assert ("ada_signs" in tensors) == ("augment" in changes)


def test_a_state_is_shown_in_one_line(new_trainer):
    shown = repr(new_trainer().state)
    assert "\n" not in shown and "iteration=0" in shown and "discriminator=" in shown


def test_a_run_begins_at_zero(new_trainer):
    state = new_trainer().state
    assert set(state.counters().values()) == {0} and state.elapsed == 0.0
