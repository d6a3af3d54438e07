"""Check how times, rates and memory are measured, with a GPU that is faked where there is none.

pytest benchmarks/test_measuring.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import measuring
from .measuring import matrix_rate, peak_memory, precision_of


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "DEVICE", torch.device("cuda"))


@pytest.fixture
def precisions() -> Any:
    """The settings of convolutions and matrix products; restored after the test."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    yield settings
    for setting, precision in zip(settings, before, strict=True):
        setting.fp32_precision = precision


@pytest.mark.usefixtures("gpu")
def test_the_precision_of_a_row(precisions: Any) -> None:
    convolution, matrix = precisions
    convolution.fp32_precision, matrix.fp32_precision = "tf32", "ieee"
    assert precision_of(torch.float32, "convolution") == "TF32"
    assert precision_of(torch.float32, "matrix") == "float32"
    assert precision_of(torch.bfloat16, "convolution") == "bfloat16"
    convolution.fp32_precision, matrix.fp32_precision = "ieee", "tf32"
    assert precision_of(torch.float32, "convolution") == "float32"
    assert precision_of(torch.float32, "matrix") == "TF32"


def test_a_cpu_has_no_tf32(precisions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "DEVICE", torch.device("cpu"))
    precisions[0].fp32_precision = "tf32"
    assert precision_of(torch.float32, "convolution") == "float32"


@pytest.mark.parametrize(("precision", "setting"), [("float32", "ieee"), ("TF32", "tf32")])
@pytest.mark.parametrize("before", ["ieee", "tf32"])
def test_a_rate_is_measured_at_its_precision(
    precision: str, setting: str, before: str, precisions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def median_seconds(function: Any) -> float:
        seen.append([kind.fp32_precision for kind in precisions])
        return 2.0

    for kind in precisions:
        kind.fp32_precision = before
    monkeypatch.setattr(measuring, "_median_seconds", median_seconds)
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.empty(shape))
    size = 8192 if measuring.DEVICE.type == "cuda" else 2048
    assert matrix_rate.__wrapped__(precision) == size**3
    assert seen == [[setting] * 2] * 2
    assert [kind.fp32_precision for kind in precisions] == [before] * 2


@pytest.mark.usefixtures("gpu")
def test_peak_memory_includes_that_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay allocates only its result; what the graph computes in has been taken at its capture."""
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 10_000},
        {"segment_pool_id": (0, 1), "total_size": 700},
        {"segment_pool_id": [0, 2], "total_size": 50},
    ]
    changes = {
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 1003,
        "memory_snapshot": lambda: segments,
    }
    for name, change in changes.items():
        monkeypatch.setattr(torch.cuda, name, change)
    called: list[None] = []
    assert peak_memory(lambda: called.append(None)) == 753
    assert len(called) == 1
