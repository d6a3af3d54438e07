"""What the tests on a CUDA device share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spigan.ops import BACKENDS
from spigan.ops.backends import why_unavailable

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
OPERATIONS = ("philox_normal", "path_interpolate", "rk4_mlp", "fir_bias_act", "modulated_conv2d")


def over_backends(op: str) -> pytest.MarkDecorator:
    """Run the test on each backend that can run `op` on a CUDA device."""
    return pytest.mark.parametrize("backend", [b for b in BACKENDS if why_unavailable(op, b, CUDA) is None])


def images(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape).to(dtype)


def problem(n: int, dim: int, layers: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    h0, weight = torch.randn(n, dim), scale * torch.randn(layers, dim, dim) / dim**0.5
    return [x.to(dtype) for x in (h0, weight, scale * torch.randn(layers, dim), scale * torch.randn(layers, dim))]


def place(arguments: dict[str, object], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, object]:
    """Arguments with their tensors on a device, floating ones also in `dtype`."""
    return {
        name: v.to(device, dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
        for name, v in arguments.items()
    }


def check_accuracy(
    assert_accurate: Callable[..., None],
    function: Callable[..., Tensor],
    arguments: dict[str, object],
    backend: str,
    slack: float = 2.0,
) -> None:
    """A function of keyword arguments on the GPU against its reference there and in float64 on the CPU."""
    actual = function(**place(arguments, CUDA), backend=backend)
    plain = function(**place(arguments, CUDA), backend="reference")
    exact = function(**place(arguments, torch.device("cpu"), torch.float64), backend="reference")
    assert actual.is_cuda
    if "noise_seed" in arguments:
        slack += 1e-5 / torch.finfo(actual.dtype).eps  # the noise of two backends may differ by so much
    assert_accurate(actual.cpu(), plain.cpu(), exact, slack)
