"""Runs the C++ passes over images, the raw functions on guarded memory, and their results by plain PyTorch in float64.

Expected values come in the layout of the kernels, [N, H, W, C].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from guarded_array import Array
from torch import Tensor

from spigan import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

LRELU = {"slope": 0.2, "gain": 1.4, "clamp": 1.1}


def number(dtype: torch.dtype) -> int:
    return int(_C.DTYPES.index(str(dtype).removeprefix("torch.")))


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_rounded(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """`actual`, computed in float32 or float64, is the float64 `exact` but for rounding, once of it to `dtype`."""
    assert exact.dtype == torch.float64
    atol = (1e-12 if dtype == torch.float64 else 2e-5) * scale
    rtol = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0
    torch.testing.assert_close(actual.double(), exact, rtol=rtol, atol=atol)


def end_tensors(
    n: int, height: int, width: int, channels: int, dtype: torch.dtype, each: bool = False, rgb: int = 0
) -> dict[str, Tensor]:
    """Every tensor that LayerEnd takes; `each`: noise and bias of each image."""
    rows, wide = n if each else 1, wide_of(dtype)
    tensors = {
        "factor": torch.randn(n, channels, dtype=wide),
        "noise": torch.randn(rows, height, width, dtype=wide),
        "strength": torch.randn((), dtype=wide),
        "bias": torch.randn(rows, channels, dtype=wide),
        "next_factor": torch.randn(n, channels, dtype=wide),
        "add": torch.randn(n, height, width, channels).to(dtype),
    }
    if rgb > 0:
        tensors["rgb_weight"] = torch.randn(n, rgb, channels)
    return tensors


def end_arguments(shape: Sequence[int], arrays: dict[str, Array], values: dict[str, float]) -> dict[str, Any]:
    """Arguments of a kernel from the arrays that there are."""
    _, height, width, channels = shape
    arguments: dict[str, Any] = dict.fromkeys(
        ("factor", "noise", "seed", "strength", "bias", "next_factor", "add", "rgb", "rgb_weight"), 0
    )
    arguments |= {name: array.address for name, array in arrays.items()}

    def stride(name: str, numel: int) -> int:
        return numel if name in arrays and arrays[name].tensor.numel() > numel else 0

    return {
        **arguments,
        "size": list(shape),
        "noise_stride": stride("noise", height * width),
        "bias_stride": stride("bias", channels),
        "rgb_channels": arrays["rgb_weight"].tensor.shape[1] if "rgb_weight" in arrays else 0,
        **{"slope": 1.0, "gain": 1.0, "clamp": math.inf, **values},
    }


def ended(v: Tensor, t: dict[str, Tensor], slope: float = 1.0, gain: float = 1.0, clamp: float = math.inf) -> Any:
    """(result, rgb or None) in float64 of v [N, H, W, C]."""
    t = {name: tensor.double() for name, tensor in t.items()}
    if "factor" in t:
        v = v * t["factor"][:, None, None]
    if "noise" in t:
        v = v + t.get("strength", torch.ones(())) * t["noise"][..., None]
    if "bias" in t:
        v = v + t["bias"][:, None, None]
    v = (torch.where(v < 0, slope * v, v) * gain).clamp(-clamp, clamp)
    rgb = torch.einsum("nhwc,nrc->nhwr", v, t["rgb_weight"]) if "rgb_weight" in t else None
    if "next_factor" in t:
        v = v * t["next_factor"][:, None, None]
    return v + t.get("add", torch.zeros(())), rgb


def fir(x: Tensor, filter: Tensor, up: int, down: int, pad: int, size: tuple[int, int], flip: bool) -> Tensor:
    """FIR(x) [N, *size, C] in float64 of x [N, H, W, C]."""

    def taken(out: int, length: int) -> Tensor:
        """[taps, out, length]: 1 where a tap of an index of the result takes an index of x."""
        at = down * torch.arange(out)[:, None] + torch.arange(len(filter))[:, None, None] - pad
        return (at == up * torch.arange(length)).double()

    filter = (filter.flip(0, 1) if flip else filter).double()
    rows, columns = (taken(*lengths) for lengths in zip(size, x.shape[1:3], strict=True))
    return torch.einsum("ji,jrh,isw,nhwc->nrsc", filter, rows, columns, x.double())


def run_fir_bias_act(
    x: Tensor,
    tensors: dict[str, Tensor],
    values: dict[str, float],
    *,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    pad: int = 0,
    size: tuple[int, int] | None = None,
    flip: bool = False,
    fir_gain: float = 1.0,
    keep: bool = True,
    alias: bool = False,
    shift: int = 0,
    threads: int = 2,
) -> tuple[Tensor | None, Tensor | None]:
    n, *x_size, channels = x.shape
    shape = (n, *(x_size if size is None else size), channels)
    given = Array.of(x, shift)
    out = given if alias else Array(shape, x.dtype, shift)
    arrays = {name: Array.of(tensor) for name, tensor in tensors.items()}
    if "rgb_weight" in tensors:
        arrays["rgb"] = Array((*shape[:3], tensors["rgb_weight"].shape[1]), torch.float32)
    taps = None if filter is None else Array.of(filter)
    _C.fir_bias_act(
        out=out.address if keep else 0,
        dtype=number(x.dtype),
        x=given.address,
        x_size=x_size,
        filter=0 if taps is None else taps.address,
        fir=[0 if filter is None else len(filter), up, down, pad],
        flip=flip,
        fir_gain=fir_gain,
        **end_arguments(shape, arrays, values),
        threads=threads,
    )
    for array in (given, *arrays.values()):
        array.checked()
    return out.checked() if keep else None, arrays["rgb"].tensor if "rgb" in arrays else None
