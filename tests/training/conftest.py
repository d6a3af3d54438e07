"""Runs so small that a hundred of them take seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spigan.config import TrainConfig
from spigan.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))  # for training_helpers

TINY_MODEL = {
    "resolution": 8,
    "img_channels": 1,
    "dim_h": 16,
    "embed_channels": 8,
    "channel_base": 64,
    "channel_max": 8,
}
TINY = {
    "data": {"source": "digits"},
    "batch": 4,
    "total_kimg": 0.024,  # 6 discriminator and 6 generator iterations
    "tick_kimg": 0.008,  # 2 of each
    "device": "cpu",
}


@pytest.fixture(autouse=True, scope="module")  # not "session", which would last for all other tests
def _one_thread() -> Iterator[None]:
    """Networks of 8 channels are fastest on one thread, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., TrainConfig]:
    """A function of fields to change: a configuration of digits at 8x8. `model` changes single fields of the model."""

    def build(*, model: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        return TrainConfig.model_validate({"model": TINY_MODEL | (model or {})} | TINY | changes)

    return build


@pytest.fixture
def new_trainer(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> Callable[..., Trainer]:
    """A function of fields to change: a `Trainer` of `tiny_config` in a folder of its own."""
    count = 0

    def build(**changes: Any) -> Trainer:
        nonlocal count
        count += 1
        return Trainer(tiny_config(**changes), tmp_path / f"run{count}", progress=False)

    return build
