"""The CUDA kernel of path_interpolate, executed on the CPU by csrc/testing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from cuda_on_cpu import HALVES, NORMAL_ERROR, exact_normals, number, pretend
from guarded_array import Array
from torch import Tensor

from spigan.ops.philox_normal import philox_normal_reference
from spigan.sde import VPSDE

pytestmark = pytest.mark.slow


def check_path_interpolate(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    images: int = 2,
    rows: int = 3,
    width: int = 8,
    times: Sequence[float] = (0.5, 1.0),
    dtype: torch.dtype = torch.float32,
    x0_dtype: torch.dtype = torch.uint8,
    offset: int = 0,
    flips: bool = False,
    noise: bool = False,
    shift: int = 0,
) -> None:
    pretend(kernels, processors=1)
    seed, shape = 2**40 + 7, (images, rows, width)
    if x0_dtype == torch.uint8:
        x0 = torch.randint(0, 256, shape, dtype=torch.uint8)
    else:
        x0 = (2.0 * torch.rand(shape) - 1.0).to(x0_dtype)
    given, mirrored = torch.randn(shape), torch.arange(images) % 2 == 0
    x_T, i = Array(shape, dtype, shift), Array((len(times), *shape), dtype, shift)
    inputs = Array.of(x0, shift), Array.of(given, shift), Array.of(mirrored.to(torch.uint8))
    mean_coef, std = VPSDE().marginal(1.0)
    kernels.path_interpolate(
        x_T.address,
        i.address,
        number(kernels, dtype),
        inputs[0].address,
        number(kernels, x0_dtype),
        inputs[1].address if noise else 0,
        inputs[2].address if flips else 0,
        *shape,
        times,
        mean_coef,
        std,
        seed,
        offset,
        0,
    )
    if flips:
        x0 = torch.where(mirrored[:, None, None], x0.flip(-1), x0)

    def path(compute: torch.dtype, e: Tensor) -> tuple[Tensor, Tensor]:
        clean = x0.to(compute) / 127.5 - 1.0 if x0_dtype == torch.uint8 else x0.to(compute)
        end = mean_coef * clean + std * e.view(shape)
        return end, torch.stack([t * clean + (1.0 - t) * end for t in times])

    exact = path(torch.float64, given.double() if noise else exact_normals(seed, offset, x0.numel()))
    plain = path(torch.float32, given if noise else philox_normal_reference(torch.tensor([seed]), x0.numel(), offset))
    for k, array in enumerate((x_T, i)):
        assert_accurate(array.checked(), plain[k].to(dtype), exact[k], absolute=0.0 if noise else NORMAL_ERROR)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, torch.float32, *HALVES], ids=str)
def test_path_interpolate_dtypes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, x0_dtype: torch.dtype
) -> None:
    for flips, width in itertools.product((False, True), (8, 5)):
        check_path_interpolate(
            kernels, assert_accurate, dtype=dtype, x0_dtype=x0_dtype, flips=flips, width=width, noise=width == 5
        )


@pytest.mark.parametrize("count", range(1, 9))
def test_path_interpolate_times(kernels: ModuleType, assert_accurate: Callable[..., None], count: int) -> None:
    times = [(k + 1) / count for k in range(count)]
    check_path_interpolate(kernels, assert_accurate, times=times)
    check_path_interpolate(kernels, assert_accurate, times=times, images=1, rows=1, width=7)


@pytest.mark.parametrize(
    "case",
    [
        {"images": 1, "rows": 1, "width": 1},
        {"images": 1, "rows": 1, "width": 6, "times": [0.25]},
        {"offset": 1},
        {"offset": 2, "flips": True},
        {"offset": 3, "shift": 3, "times": [0.25]},  # the head makes up for the addresses
        {"offset": 3, "shift": 3, "times": [0.25], "flips": True},
        {"offset": 2**32 - 2},
        {"offset": 2**35 + 5, "width": 3},
        {"shift": 1, "flips": True},
        {"noise": True},
        {"noise": True, "flips": True, "offset": 1},  # the offset is that of the drawn noise
        {"noise": True, "shift": 1},
        {"images": 5, "rows": 41, "width": 44, "flips": True},  # more than all threads handle at once
    ],
    ids=str,
)
def test_path_interpolate(kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]) -> None:
    check_path_interpolate(kernels, assert_accurate, **case)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_path_interpolate_of_nothing(kernels: ModuleType, shape: tuple[int, int, int]) -> None:
    pretend(kernels)
    out = Array((1,), torch.float32)
    kernels.path_interpolate(out.address, out.address, 0, 0, 4, 0, 0, *shape, [1.0], 0.1, 0.9, 1, 0, 0)
    assert out.checked().isnan().all()
