"""Three iterations of training on the kernels of a device, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from spigan.ops import use_backend
from spigan.training.trainer import Trainer


def devices() -> list[object]:
    return ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", devices())
def test_three_iterations(device: str, precision: str, new_trainer: Callable[..., Trainer]) -> None:
    losses = []
    for backend in ("reference", "auto"):
        trainer = new_trainer(device=device, precision=precision)
        images = torch.stack(list(trainer.dataset)[:4])
        with use_backend(backend):
            for _ in range(3):
                trainer.train_iteration(images)
        means = trainer.state.statistics.take_means()
        losses.append(torch.tensor([means["loss_d"], means["loss_g"]]))
    assert losses[0].isfinite().all() and (losses[0] != 0).all()
    # bfloat16 keeps 8 bits, and Adam magnifies what gradients near 0 differ by.
    torch.testing.assert_close(*losses, rtol=0, atol=1e-3 if precision == "fp32" else 5e-2)
