"""spigan.ops.convolution: in which precision float32 is convolved."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spigan.ops import convolution, frozen_layer, modulated_conv2d
from spigan.ops.backends import Implementation, always_available, implementations

PRECISION = torch.backends


@pytest.fixture(autouse=True)
def _precisions_are_restored() -> Iterator[None]:
    yield
    PRECISION.fp32_precision = "none"
    PRECISION.cudnn.fp32_precision = "none"
    PRECISION.cudnn.allow_tf32 = True
    PRECISION.cuda.matmul.allow_tf32 = False


def image(dtype: torch.dtype = torch.float32, is_cuda: bool = True) -> Any:
    return SimpleNamespace(dtype=dtype, is_cuda=is_cuda)


def set_old(allowed: bool) -> None:
    PRECISION.cudnn.allow_tf32 = allowed


def set_convolutions(precision: str) -> None:
    PRECISION.cudnn.conv.fp32_precision = precision


def set_everything(precision: str) -> None:
    PRECISION.cudnn.allow_tf32 = False
    PRECISION.fp32_precision = precision


@pytest.mark.parametrize(
    ("change", "value", "allowed"),
    [
        (set_old, True, True),
        (set_old, False, False),
        (set_convolutions, "tf32", True),
        (set_convolutions, "ieee", False),
        (set_everything, "tf32", True),
        (set_everything, "ieee", False),
    ],
)
def test_tf32_is_allowed_where_cudnn_allows_it(change: Any, value: Any, allowed: bool) -> None:
    assert convolution.allows_tf32(image()), "PyTorch's default"
    change(value)
    assert convolution.allows_tf32(image()) is allowed
    PRECISION.cuda.matmul.allow_tf32 = not allowed  # of matrix products, not of convolutions
    assert convolution.allows_tf32(image()) is allowed


def test_tf32_is_for_float32_on_a_gpu() -> None:
    assert not convolution.allows_tf32(image(torch.bfloat16))
    assert not convolution.allows_tf32(image(torch.float64))
    assert not convolution.allows_tf32(image(is_cuda=False))


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(("up", "kernel"), [(1, "conv2d"), (2, "transposed_conv2d")])
def test_triton_convolves_in_that_precision(
    up: int, kernel: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("spigan.kernels.modulated_conv2d", reason="needs triton")

    class Launched(Exception):
        pass

    def launch(*args: object, tf32: bool, **options: object) -> None:
        raise Launched(tf32)

    monkeypatch.setattr(frozen_layer, "allows_tf32", lambda x: allowed)
    monkeypatch.setattr(frozen_layer, "_scaled", lambda backend, x, style: x)
    monkeypatch.setattr(kernels, kernel, launch)
    monkeypatch.setitem(implementations["modulated_conv2d"], "triton", Implementation(always_available))
    x = torch.ones(2, 8, 4, 4)
    with pytest.raises(Launched, match=f"^{allowed}$"):
        modulated_conv2d(x, torch.ones(16, 8, 3, 3), torch.ones(2, 8), up=up, backend="triton")
