"""A tiny model and its images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan import SPIGAN, ModelConfig

sys.path.insert(0, str(Path(__file__).parent))  # for fake_cuda

TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}


@pytest.fixture(scope="session")
def make() -> Callable[..., SPIGAN]:
    """make(**changes): a tiny model whose images vary within [-1, 1] and whose stored noise matters."""

    def make_model(**changes: Any) -> SPIGAN:
        torch.manual_seed(0)
        model = SPIGAN(ModelConfig.model_validate(TINY | changes)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("noise_strength"):
                    parameter.fill_(0.1)
                if name.endswith("torgb.weight"):
                    parameter.mul_(0.3)
        return model

    return make_model


@pytest.fixture(scope="module")
def model(make: Callable[..., SPIGAN]) -> SPIGAN:
    return make()


@pytest.fixture(scope="module")
def images(model: SPIGAN) -> Tensor:
    """Images of seeds 0 to 8, one batch."""
    return spigan.sample(9, model=model)  # type: ignore[return-value]
