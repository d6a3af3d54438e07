"""The question whether the CUDA kernels can run, executed on the CPU by csrc/testing."""

from __future__ import annotations

from types import ModuleType

import pytest
from cuda_on_cpu import pretend

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("device", "error"),
    [
        ({}, None),
        ({"driver": 12040}, "cudaErrorInsufficientDriver: "),
        ({"major": 7}, "cudaErrorNoKernelImageForDevice: "),
    ],
    ids=["runs", "old driver", "no machine code"],
)
def test_probe(kernels: ModuleType, device: dict[str, int], error: str | None) -> None:
    pretend(kernels, **device)
    found = kernels.probe()
    assert (found["driver"], found["runtime"]) == (device.get("driver", 13000), 13000)
    assert found["error"] is None if error is None else found["error"].startswith(error)
    pretend(kernels)
