"""The precision of runs that leave it to the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from spigan import preset
from spigan.config import TrainConfig
from spigan.runs import read_config
from spigan.training.precision import resolve_precision
from spigan.training.trainer import Trainer

SOURCE = {"data": {"source": "photos.zip"}}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[int, bool]:
    """Whether each GPU that torch believes to have computes in bfloat16."""
    have: dict[int, bool] = {}
    current = [0]

    class Selected:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index or 0

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or have[current[-1]]

    monkeypatch.setattr(torch.cuda, "device", Selected)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    return have


@pytest.mark.parametrize("name", ["cifar10", "celebahq256", "church256"])
def test_presets_leave_the_precision_to_the_device(name: str, gpus: dict[int, bool]) -> None:
    config = preset(name, **SOURCE)
    gpus |= {0: True, 1: False}
    found = [
        resolve_precision(config, torch.device(device)).precision for device in ("cpu", "cuda:0", "cuda", "cuda:1")
    ]
    assert found == ["fp32", "bf16", "bf16", "fp32"]
    assert config == resolve_precision(config, torch.device("cuda:0")).model_copy(update={"precision": "auto"})


def test_a_chosen_precision_stays(gpus: dict[int, bool]) -> None:
    gpus |= {0: True}
    assert preset("digits").precision == TrainConfig.model_fields["precision"].default == "fp32"
    for precision in ("fp32", "bf16"):
        config = preset("cifar10", precision=precision)
        assert resolve_precision(config, torch.device("cuda")) is config
        assert resolve_precision(config, torch.device("cpu")) is config


def test_the_run_records_what_was_chosen(
    tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps it, though the device would now choose otherwise."""
    trainer = Trainer(tiny_config(precision="auto"), tmp_path / "cpu", progress=False)
    assert trainer.config.precision == read_config(tmp_path / "cpu").precision == "fp32"

    def on_gpu(config: TrainConfig, device: torch.device) -> TrainConfig:
        return config.model_copy(update={"precision": "bf16"}) if config.precision == "auto" else config

    with monkeypatch.context() as patch:
        patch.setattr("spigan.training.trainer.resolve_precision", on_gpu)
        Trainer(tiny_config(precision="auto"), tmp_path / "gpu", progress=False)
    assert read_config(tmp_path / "gpu").precision == "bf16"
    resumed = Trainer.resume(tmp_path / "gpu", total_kimg=0.004, progress=False)
    assert read_config(tmp_path / "gpu").precision == "bf16"
    seen: list[torch.dtype] = []
    conv = next(m for m in resumed.discriminator.modules() if isinstance(m, nn.Module) and hasattr(m, "stride"))
    conv.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    resumed.train_iteration(resumed.dataset.__getitems__(range(4)))
    assert set(seen) == {torch.bfloat16}
