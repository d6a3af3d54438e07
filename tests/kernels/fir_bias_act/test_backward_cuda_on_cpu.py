"""The CUDA kernel of fir_bias_act's derivative, executed on the CPU by csrc/testing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from cuda_on_cpu import HALVES, ODD_AND_VECTORS, number, pretend
from guarded_array import Array
from torch import Tensor

pytestmark = pytest.mark.slow


def check_bias_act_backward(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    wanted: Sequence[str] = ("grad_x", "sum_u", "sum_ux", "sum_c"),
    n: int = 2,
    pixels: int = 7,
    channels: int = 8,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    out: bool = True,
    factor: bool = True,
    slope: float = 0.2,
    gain: float = 1.3,
    clamp: float = 1.0,
    in_place: bool = False,
    shift: int = 0,
    shifted: str | None = None,
    threads: int = 32,
) -> None:
    """shifted: the one array that is `shift` elements off alignment; None: all of them."""
    pretend(kernels, processors=1, threads=threads)

    def shift_of(name: str) -> int:
        return shift if shifted in (None, name) else 0

    result = torch.randn(n, pixels, channels).clamp(-clamp, clamp).to(dtype)
    inputs = {
        "grad": torch.randn(n, pixels, channels).to(dtype),
        "out": result if out else None,
        "x": torch.randn(n, pixels, channels).to(dtype) if "sum_ux" in wanted else None,
        "factor": torch.randn(n, channels) if factor else None,
    }
    shapes = {
        "grad_x": (n, pixels, channels),
        "sum_u": (n, parts, channels),
        "sum_ux": (n, parts, channels),
        "sum_c": (n, pixels),
    }
    arrays = {name: Array.of(t, shift_of(name)) for name, t in inputs.items() if t is not None}
    address = {name: array.address for name, array in arrays.items()}
    results = {w: Array(shapes[w], dtype if w == "grad_x" else torch.float32, shift_of(w)) for w in wanted}
    if in_place:
        results["grad_x"] = arrays.pop("grad")
    kernels.bias_act_backward(
        **{name: results[name].address if name in wanted else 0 for name in shapes},
        dtype=number(kernels, dtype),
        **{name: address.get(name, 0) for name in inputs},
        slope=slope,
        gain=gain,
        clamp=clamp,
        size=(n, pixels, channels),
        parts=parts,
        stream=0,
    )

    def expected(compute: torch.dtype) -> dict[str, Tensor]:
        t = {name: None if v is None else v.to(compute) for name, v in inputs.items()}
        assert t["grad"] is not None
        u = t["grad"] * gain
        if out:
            u = u * torch.where(result > 0, 1.0, slope).to(compute) * (result.double().abs() < clamp)
        length = -(-pixels // parts)

        def sums(v: Tensor) -> Tensor:
            return torch.stack([v[:, k * length : (k + 1) * length].sum(1) for k in range(parts)], 1)

        found = {"grad_x": u if t["factor"] is None else u * t["factor"][:, None], "sum_u": sums(u), "sum_c": u.sum(2)}
        if t["x"] is not None:
            found["sum_ux"] = sums(u * t["x"])
        return found

    plain, exact = expected(torch.float32), expected(torch.float64)
    for name, array in results.items():
        actual = array.checked()
        assert_accurate(actual, plain[name].to(actual.dtype), exact[name])
    for name, array in arrays.items():
        assert array.checked().equal(cast("Tensor", inputs[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", ODD_AND_VECTORS, ids=str)
def test_bias_act_backward_shapes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    shape = {name: value for name, value in shape.items() if name != "x_size"}
    check_bias_act_backward(kernels, assert_accurate, dtype=dtype, **shape)
    wanted = ("grad_x", "sum_u", "sum_ux")
    check_bias_act_backward(kernels, assert_accurate, dtype=dtype, **shape, wanted=wanted, parts=3)


SUMS = ("grad_x", "sum_u", "sum_ux", "sum_c")


@pytest.mark.parametrize("wanted", [w for k in range(5) for w in itertools.combinations(SUMS, k)], ids=str)
def test_bias_act_backward_wanted(
    kernels: ModuleType, assert_accurate: Callable[..., None], wanted: tuple[str, ...]
) -> None:
    for options in ({"parts": 1}, {"parts": 3, "out": False}, {"parts": 9, "factor": False, "clamp": math.inf}):
        check_bias_act_backward(kernels, assert_accurate, wanted=wanted, channels=12, **options)


@pytest.mark.parametrize(
    "case",
    [
        {"n": 0},
        {"pixels": 0, "parts": 2},
        {"channels": 0},
        {"in_place": True},
        {"in_place": True, "channels": 3, "wanted": ("grad_x",)},
        {"parts": 200, "pixels": 199, "channels": 4, "wanted": ("grad_x", "sum_u", "sum_ux")},  # more tiles than blocks
        {"wanted": ("grad_x",), "pixels": 1500, "channels": 4},  # parts of its own
        {"threads": 64, "channels": 132, "pixels": 5},  # several loops over the channels
        {"threads": 64, "channels": 132, "pixels": 5, "parts": 2, "wanted": ("sum_u", "sum_ux")},
        {"threads": 64, "channels": 3, "pixels": 100},
    ],
    ids=str,
)
def test_bias_act_backward(kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]) -> None:
    check_bias_act_backward(kernels, assert_accurate, **case)


@pytest.mark.parametrize("shifted", ["grad_x", "sum_u", "sum_ux", "sum_c", "grad", "out", "x", "factor"])
def test_bias_act_backward_with_one_array_off_alignment(
    kernels: ModuleType, assert_accurate: Callable[..., None], shifted: str
) -> None:
    check_bias_act_backward(kernels, assert_accurate, shift=1, shifted=shifted, dtype=torch.bfloat16)
