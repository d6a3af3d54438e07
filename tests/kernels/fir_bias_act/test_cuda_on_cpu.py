"""The CUDA kernel of fir_bias_act, executed on the CPU by csrc/testing."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
import torch
from cuda_on_cpu import HALVES, NORMAL_ERROR, ODD_AND_VECTORS, exact_normals, number, pretend
from guarded_array import Array
from torch import Tensor
from torch.nn import functional as F

from spigan.ops.philox_normal import philox_normal_reference

pytestmark = pytest.mark.slow


class Fir(NamedTuple):
    taps: int
    up: int = 1
    down: int = 1
    pad: int = 0
    flip: bool = False
    gain: float = 1.5


def resample(x: Tensor, filter: Tensor, fir: Fir, size: tuple[int, int]) -> Tensor:
    """FIR(x), channels last, by zeros, padding and a convolution."""
    n, height, width, channels = x.shape
    stuffed = x.new_zeros(n, channels, height * fir.up, width * fir.up)
    stuffed[:, :, :: fir.up, :: fir.up] = x.permute(0, 3, 1, 2)
    needed = [(s - 1) * fir.down + fir.taps for s in size]
    before, crop = max(fir.pad, 0), max(-fir.pad, 0)
    padded = F.pad(stuffed, (before, needed[1], before, needed[0]))[:, :, crop:, crop:][:, :, : needed[0], : needed[1]]
    weight = filter.flip(0, 1) if fir.flip else filter
    y = F.conv2d(padded.flatten(0, 1)[:, None], fir.gain * weight.to(x)[None, None], stride=fir.down)
    return y.view(n, channels, *size).permute(0, 2, 3, 1)


def check_fir_bias_act(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    n: int = 2,
    x_size: tuple[int, int] = (3, 6),
    channels: int = 8,
    dtype: torch.dtype = torch.float32,
    fir: Fir | None = None,
    size: tuple[int, int] | None = None,
    factor: bool = True,
    noise: str | None = None,
    strength: bool = False,
    bias: str | None = "channel",
    slope: float = 0.2,
    gain: float = math.sqrt(2.0),
    clamp: float = math.inf,
    next_factor: bool = False,
    add: bool = False,
    rgb: int = 0,
    out: bool = True,
    in_place: bool = False,
    shift: int = 0,
    shifted: str | None = None,
    threads: int = 32,
) -> None:
    """shifted: the one array that is `shift` elements off alignment; None: all of them."""
    pretend(kernels, processors=1, threads=threads)

    def shift_of(name: str) -> int:
        return shift if name != "seed" and shifted in (None, name) else 0

    size = x_size if size is None else size
    pixels, seed = size[0] * size[1], 2**40 + 9
    rows = {"given": n, "shared": 1}.get(noise or "", 0)
    tensors = {
        "x": torch.randn(n, *x_size, channels).to(dtype),
        "filter": None if fir is None else torch.randn(fir.taps, fir.taps) / fir.taps,
        "factor": torch.randn(n, channels) if factor else None,
        "noise": torch.randn(rows, pixels) if rows else None,
        "seed": torch.tensor([seed]) if noise == "drawn" else None,
        "strength": torch.tensor([-0.7]) if strength else None,
        "bias": None if bias is None else torch.randn(n if bias == "image" else 1, channels),
        "next_factor": torch.randn(n, channels) if next_factor else None,
        "add": torch.randn(n, *size, channels).to(dtype) if add else None,
        "rgb_weight": torch.randn(n, rgb, channels) if rgb else None,
    }
    arrays = {name: Array.of(t, shift_of(name)) for name, t in tensors.items() if t is not None}
    address = {name: array.address for name, array in arrays.items()}
    results = {"rgb": Array((n, *size, rgb), torch.float32, shift_of("rgb"))} if rgb else {}
    if out:
        results["out"] = arrays.pop("x") if in_place else Array((n, *size, channels), dtype, shift_of("out"))
    kernels.fir_bias_act(
        out=results["out"].address if out else 0,
        dtype=number(kernels, dtype),
        size=(n, *size, channels),
        x=address["x"],
        x_size=x_size,
        filter=address.get("filter", 0),
        fir=(1, 1, 1, 0) if fir is None else fir[:4],
        flip=fir is not None and fir.flip,
        fir_gain=1.0 if fir is None else fir.gain,
        factor=address.get("factor", 0),
        noise=address.get("noise", 0),
        noise_stride=pixels if noise == "given" else 0,
        seed=address.get("seed", 0),
        strength=address.get("strength", 0),
        bias=address.get("bias", 0),
        bias_stride=channels if bias == "image" else 0,
        slope=slope,
        gain=gain,
        clamp=clamp,
        next_factor=address.get("next_factor", 0),
        add=address.get("add", 0),
        rgb=results["rgb"].address if rgb else 0,
        rgb_weight=address.get("rgb_weight", 0),
        rgb_channels=rgb,
        stream=0,
    )

    def expected(compute: torch.dtype) -> dict[str, Tensor]:
        t = {name: None if v is None else v.to(compute) for name, v in tensors.items()}
        v = t["x"]
        assert v is not None
        if fir is not None:
            v = resample(v, cast("Tensor", tensors["filter"]), fir, size)
        if t["factor"] is not None:
            v = v * t["factor"][:, None, None]
        normals = t["noise"]
        if noise == "drawn":
            count = n * pixels
            exact = compute == torch.float64
            seeds = torch.tensor([seed])
            normals = exact_normals(seed, 0, count) if exact else philox_normal_reference(seeds, count, 0)
        if normals is not None:
            v = v + (1.0 if t["strength"] is None else t["strength"]) * normals.view(-1, *size, 1)
        if t["bias"] is not None:
            v = v + t["bias"][:, None, None]
        v = (torch.where(v < 0, slope * v, v) * gain).clamp(-clamp, clamp)
        end = v if t["next_factor"] is None else v * t["next_factor"][:, None, None]
        found = {"out": end if t["add"] is None else end + t["add"]}
        if t["rgb_weight"] is not None:
            found["rgb"] = torch.einsum("nhwc,nrc->nhwr", v, t["rgb_weight"])
        return found

    plain, exact = expected(torch.float32), expected(torch.float64)
    for name, array in results.items():
        actual = array.checked()
        error = 2.0 * NORMAL_ERROR if noise == "drawn" else 0.0  # times strength, gain and factors
        assert_accurate(actual, plain[name].to(actual.dtype), exact[name], absolute=error)
    for name, array in arrays.items():
        assert array.checked().equal(cast("Tensor", tensors[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", ODD_AND_VECTORS, ids=str)
def test_fir_bias_act_shapes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"noise": "drawn", "strength": True, "clamp": 1.5, "next_factor": True, "add": True}
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **options, **shape)
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **options, **shape, fir=Fir(4, pad=2))


@pytest.mark.parametrize(
    "case",
    [
        {"factor": False, "bias": None, "slope": 1.0, "gain": 1.0},  # copies
        {"factor": False, "noise": "given"},
        {"noise": "given", "strength": True, "bias": "image"},
        {"noise": "shared", "strength": True},
        {"noise": "drawn"},
        {"noise": "drawn", "n": 3, "x_size": (1, 1)},
        {"noise": "drawn", "n": 5, "x_size": (3, 3)},  # images begin at every place of a block of normals
        {"clamp": 0.5, "next_factor": True},
        {"gain": 0.3, "slope": 0.0, "add": True},
        {"in_place": True, "noise": "drawn"},
        {"in_place": True, "channels": 5},
        {"in_place": True, "channels": 5, "rgb": 3},
        {"n": 0},
        {"channels": 0},
        {"channels": 0, "rgb": 3},
        {"x_size": (0, 4)},
        {"n": 3, "x_size": (11, 40), "channels": 32, "bias": "image"},  # more than all blocks handle at once
        {"threads": 64, "x_size": (9, 5)},
    ],
    ids=str,
)
def test_fir_bias_act_without_filter(
    kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]
) -> None:
    check_fir_bias_act(kernels, assert_accurate, **case)


FILTERS = [
    ({"fir": Fir(4, pad=1)}, (4, 7)),  # after a transposed convolution
    ({"fir": Fir(4, pad=2, flip=True)}, (7, 8)),
    ({"fir": Fir(4, pad=-1)}, (2, 3)),
    ({"fir": Fir(4, up=2, pad=2)}, (9, 12)),
    ({"fir": Fir(4, up=2, pad=1, flip=True)}, (8, 11)),  # strips begin left of the image
    ({"fir": Fir(4, up=2, pad=-3)}, (4, 7)),
    ({"fir": Fir(4, down=2, pad=1)}, (3, 4)),
    ({"fir": Fir(4, down=2, pad=2, flip=True)}, (3, 4)),
    ({"fir": Fir(4, up=2, down=2, pad=3)}, (5, 7)),
    ({"fir": Fir(1)}, (5, 7)),
    ({"fir": Fir(1, up=2)}, (9, 12)),
    ({"fir": Fir(1, down=2, pad=-1)}, (2, 3)),
    ({"fir": Fir(3, pad=1)}, (5, 7)),
    ({"fir": Fir(3, up=2, pad=2, flip=True)}, (9, 13)),
    ({"fir": Fir(3, up=2, down=2, pad=1)}, (4, 6)),
    ({"fir": Fir(8, pad=3)}, (4, 6)),
    ({"fir": Fir(8, up=2, pad=4, flip=True)}, (9, 13)),
    ({"fir": Fir(8, up=2, pad=5)}, (10, 14)),
    ({"fir": Fir(8, down=2, pad=4)}, (3, 4)),
    ({"fir": Fir(4, pad=20)}, (3, 4)),  # nothing of x
    ({"fir": Fir(4, pad=3), "x_size": (0, 0)}, (3, 3)),
    ({"fir": Fir(4, pad=1), "n": 0}, (4, 7)),
]


@pytest.mark.parametrize(("case", "size"), FILTERS, ids=str)
@pytest.mark.parametrize("channels", [8, 3])
def test_fir_bias_act_with_filter(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    case: dict[str, Any],
    size: tuple[int, int],
    channels: int,
) -> None:
    options = {"x_size": (5, 7), "n": 1, "channels": channels, **case}
    check_fir_bias_act(kernels, assert_accurate, size=size, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fir_bias_act_filters_halves(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype
) -> None:
    """A filter for each kernel; blocks of several rows, more channels than a block's lanes, more tiles than blocks."""
    options: dict[str, Any] = {"dtype": dtype, "n": 1, "x_size": (6, 9), "noise": "drawn", "threads": 64}
    for case, size in (FILTERS[0], FILTERS[4], FILTERS[6], FILTERS[13]):
        check_fir_bias_act(kernels, assert_accurate, **options, size=size, channels=72, fir=case["fir"])
    options |= {"n": 11, "x_size": (20, 18), "threads": 32}
    check_fir_bias_act(kernels, assert_accurate, **options, size=(19, 17), channels=8, fir=Fir(4, pad=1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"rgb": 1},
        {"rgb": 3, "out": False, "noise": "drawn"},
        {"rgb": 4, "next_factor": True, "clamp": 1.0},
        {"rgb": 3, "channels": 5, "add": True},
        {"rgb": 3, "channels": 40, "shift": 1, "out": False},  # several loops over the lanes
        {"rgb": 2, "channels": 264, "x_size": (1, 3), "next_factor": True},
        {"rgb": 3, "fir": Fir(4, pad=1), "size": (2, 5)},
        {"rgb": 3, "channels": 3, "fir": Fir(3, up=2, pad=2), "size": (5, 11), "out": False},
        {"rgb": 1, "n": 0},
    ],
    ids=str,
)
def test_fir_bias_act_rgb(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, case: dict[str, Any]
) -> None:
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **case)


@pytest.mark.parametrize(
    "shifted", ["x", "out", "rgb", "filter", "factor", "noise", "strength", "bias", "next_factor", "add", "rgb_weight"]
)
def test_fir_bias_act_with_one_array_off_alignment(
    kernels: ModuleType, assert_accurate: Callable[..., None], shifted: str
) -> None:
    options: dict[str, Any] = {"noise": "given", "strength": True, "next_factor": True, "add": True, "rgb": 3}
    options |= {"shift": 1, "shifted": shifted, "x_size": (2, 3)}
    check_fir_bias_act(kernels, assert_accurate, **options)
    check_fir_bias_act(kernels, assert_accurate, **options, fir=Fir(4, pad=2), dtype=torch.bfloat16)


def test_fir_bias_act_keeps_what_is_not_finite(kernels: ModuleType) -> None:
    pretend(kernels, processors=1)
    x = Array.of(torch.tensor([math.nan, math.inf, -math.inf, 1.0]).view(1, 1, 1, 4))
    arguments = {"dtype": 0, "size": (1, 1, 1, 4), "x_size": (1, 1), "filter": 0, "fir": (1, 1, 1, 0), "flip": False}
    arguments |= {"fir_gain": 1.0, "noise_stride": 0, "bias_stride": 0, "slope": 0.2, "gain": 1.0, "rgb_channels": 0}
    none = ("factor", "noise", "seed", "strength", "bias", "next_factor", "add", "rgb", "rgb_weight", "stream")
    for clamp, largest in ((math.inf, math.inf), (2.0, 2.0)):
        out = Array((1, 1, 1, 4), torch.float32)
        kernels.fir_bias_act(out=out.address, x=x.address, clamp=clamp, **arguments, **dict.fromkeys(none, 0))
        assert out.checked().flatten()[0].isnan()
        assert out.checked().flatten()[1:].tolist() == [largest, -largest, 1.0]
    with pytest.raises(RuntimeError, match="InvalidValue"):
        kernels.fir_bias_act(
            out=out.address, x=x.address, clamp=1.0, **{**arguments, "dtype": 3}, **dict.fromkeys(none, 0)
        )
