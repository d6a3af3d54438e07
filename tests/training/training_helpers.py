"""What several tests of training use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spigan.ops import path_interpolate
from spigan.training import updates
from spigan.training.trainer import Trainer


def digits(trainer: Trainer, n: int | None = None, start: int = 0) -> Tensor:
    return trainer.dataset.__getitems__(range(start, start + (n or trainer.config.batch)))


def train(trainer: Trainer, iterations: int) -> None:
    for number in range(iterations):
        trainer.train_iteration(digits(trainer, start=number * trainer.config.batch))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.named_parameters() if torch.equal(tensor, before[name])}


def spy(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, note: Callable[..., Any]) -> list[Any]:
    """Let `target.name` append note(*args, **kwargs) to the returned list at each call, before it does its work."""
    calls: list[Any] = []
    original = getattr(target, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(note(*args, **kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapper)
    return calls


def keep_gradients(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> list[dict[str, Tensor]]:
    """Replace optimiser steps by notes of the gradients: weights stay as they are."""
    gradients: list[dict[str, Tensor]] = []
    for optimizer, module in (
        (trainer.state.optimizer_d, trainer.discriminator),
        (trainer.state.optimizer_g, trainer.model),
    ):

        def note(module: nn.Module = module) -> None:
            gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

        monkeypatch.setattr(optimizer, "step", note)
    return gradients


def assert_gradients_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert max(g.abs().max() for g in expected.values()) > 1e-3, "nothing to compare"
    for name, gradient in expected.items():
        close = torch.allclose(actual[name], gradient, rtol=1e-4, atol=1e-6)
        assert close, f"{name} differs by {(actual[name] - gradient).abs().max():.2e}"


def case(trainer: Trainer, n: int, times: list[float]) -> tuple[Tensor, Tensor]:
    """x_T [N, C, H, W] and i [K, N, C, H, W] of digits."""
    return path_interpolate(digits(trainer, n), times, seed=1)


def without_noise(trainer: Trainer) -> Trainer:
    trainer.model.eval()  # the generator's noise is then a constant; nothing else depends on the mode
    return trainer


def counting(trainer: Trainer, taken: list[Tensor]) -> Callable[[Tensor], None]:
    """In place of training: count only."""

    def iteration(images: Tensor) -> None:
        taken.append(images)
        trainer.state.images_seen += len(images) * (trainer.iteration % 2 == 0)
        trainer.state.record(loss_d=torch.zeros(()), loss_g=torch.zeros(()))
        trainer.state.iteration += 1

    return iteration


def poison(monkeypatch: pytest.MonkeyPatch, trainer: Trainer, name: str, iteration: int) -> None:
    """From an iteration on the loss is not a number."""
    original = getattr(updates, name)

    def loss(*args: Tensor) -> Tensor:
        value = original(*args)
        return value * math.nan if trainer.iteration >= iteration else value

    monkeypatch.setattr(updates, name, loss)
