"""The C++ passes over images on every instruction set: the raw functions on guarded memory, against float64 in PyTorch.

Expected values come in the layout of the kernels, [N, H, W, C].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spigan import _C
from spigan.ops import frozen_layer, layer_weights, modulated_conv2d
from spigan.ops.philox_normal import philox_normal_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GUARD = 64  # bytes before and after every array


class Array:
    """A tensor of NaN with guards around it, `shift` elements off alignment."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> None:
        self.start = GUARD + shift * dtype.itemsize
        self.end = self.start + math.prod(shape) * dtype.itemsize
        self.memory = torch.full((self.end + GUARD,), 0xA5, dtype=torch.uint8)
        self.memory[self.start : self.end] = 0xFF
        self.tensor = self.memory[self.start : self.end].view(dtype).view(tuple(shape))

    @classmethod
    def of(cls, value: Tensor, shift: int = 0) -> Array:
        array = cls(value.shape, value.dtype, shift)
        array.tensor.copy_(value)
        return array

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start

    def checked(self) -> Tensor:
        assert (self.memory[: self.start] == 0xA5).all(), "written before the array"
        assert (self.memory[self.end :] == 0xA5).all(), "written after the array"
        return self.tensor


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


# ---- The end of a layer ----


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


LRELU = {"slope": 0.2, "gain": 1.4, "clamp": 1.1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 5, 16, 83])
@pytest.mark.parametrize("each", [False, True])
def test_end_of_a_layer(isa: str, channels: int, dtype: torch.dtype, each: bool) -> None:
    shape = (3, 4, 5, channels)
    x = torch.randn(shape).to(dtype)
    rgb = 0 if dtype == torch.float64 else 3
    tensors = end_tensors(*shape, dtype, each, rgb)
    for left_out in ([], ["next_factor"], ["add", "strength"], ["next_factor", "add"], ["factor", "noise", "bias"]):
        for weights in ([], ["rgb_weight"]):
            some = {name: tensor for name, tensor in tensors.items() if name not in left_out + weights}
            exact, exact_rgb = ended(x.double(), some, **LRELU)
            for options in ({}, {"alias": True}, {"shift": 1}):
                out, sums = run_fir_bias_act(x, some, LRELU, **options)
                assert out is not None
                assert_rounded(out, exact, dtype)
                if sums is not None:
                    assert_rounded(sums, exact_rgb, torch.float32)
    if rgb:
        _, sums = run_fir_bias_act(x, tensors, LRELU, keep=False)
        assert sums is not None
        assert_rounded(sums, ended(x.double(), tensors, **LRELU)[1], torch.float32)


RANK_1 = torch.outer(torch.tensor([1.0, 3.0, -2.0, 1.0]), torch.tensor([1.0, 2.0, 0.0, 4.0])) / 16
# taps, up, down, pad, size of x, size of the result
FIR = [
    (1, 1, 1, 0, (4, 5), (4, 5)),
    (4, 1, 1, 2, (5, 6), (6, 7)),  # a blur
    (4, 2, 1, 2, (5, 3), (10, 6)),
    (4, 1, 2, 1, (8, 6), (4, 3)),
    (3, 2, 2, -1, (5, 6), (5, 5)),
    (8, 1, 2, 5, (9, 4), (5, 3)),
    (7, 2, 1, -3, (6, 7), (4, 6)),  # crops
    (5, 1, 1, -4, (12, 11), (3, 2)),
    (2, 1, 1, 9, (1, 2), (12, 11)),  # mostly outside of x
    (6, 2, 1, 40, (3, 3), (2, 3)),  # all outside
    (4, 1, 1, 2, (0, 3), (2, 3)),  # x has no pixels
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("channels", [3, 37])
def test_fir(isa: str, channels: int, separable: bool, dtype: torch.dtype) -> None:
    for taps, up, down, pad, x_size, size in FIR:
        filter = torch.randn(taps, taps)
        if separable:
            # float32 rounds the outer product; float64 results have to come from the taps as they are.
            filter = RANK_1 if taps == 4 else torch.outer(filter[0], filter[:, 0])
        x = torch.randn(2, *x_size, channels).to(dtype)
        tensors = end_tensors(2, *size, channels, dtype)
        options = {"filter": filter, "up": up, "down": down, "pad": pad, "size": size, "flip": taps % 3 > 0}
        exact = ended(3.0 * fir(x, filter, up, down, pad, size, options["flip"]), tensors, **LRELU)[0]
        out, _ = run_fir_bias_act(x, tensors, LRELU, **options, fir_gain=3.0, shift=1)
        assert out is not None
        assert_rounded(out, exact, dtype, scale=10.0)


def test_filters_of_zeros_and_of_nan(isa: str) -> None:
    x = torch.randn(1, 4, 4, 6)
    for value in (0.0, math.nan):
        out, _ = run_fir_bias_act(x, {}, {}, filter=torch.full((2, 2), value), size=(3, 3))
        assert out is not None
        assert torch.equal(out.isnan(), torch.full((1, 3, 3, 6), value != value)) and not out.nan_to_num().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 4), (9, 31), (1, 300)])  # more and fewer pixels than are drawn at a time
def test_drawn_noise_is_that_of_the_stream(isa: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    n, seed, strength = 3, -(2**40) + 7, torch.tensor(0.7, dtype=wide_of(dtype))
    x = torch.zeros(n, *size, 9, dtype=dtype)
    drawn, _ = run_fir_bias_act(x, {"seed": torch.tensor(seed), "strength": strength}, {})
    normals = philox_normal_reference(torch.tensor([seed]), n * math.prod(size), 0).view(n, *size, 1)
    assert drawn is not None
    # float32 numbers of two implementations, for float64 results too
    assert_rounded(drawn, 0.7 * normals.double().expand(x.shape), torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(drawn, drawn[..., :1].expand(x.shape))
    given = torch.randn(1, *size, dtype=wide_of(dtype))
    out, _ = run_fir_bias_act(x, {"seed": torch.tensor(seed), "noise": given}, {})
    assert out is not None
    assert_rounded(out, given[..., None].double().expand(x.shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(isa: str, dtype: torch.dtype) -> None:
    x = torch.randn(5, 24, 20, 70).to(dtype)  # enough for several threads
    noise = {"seed": torch.tensor(3)}
    for options in (
        {},
        {"filter": RANK_1, "up": 2, "pad": 2, "size": (48, 40)},
        {"filter": torch.randn(4, 4), "down": 2, "pad": 1, "size": (12, 10)},
    ):
        tensors = end_tensors(5, *options.get("size", (24, 20)), 70, dtype, rgb=0 if dtype == torch.float64 else 2)
        del tensors["noise"]
        one, *others = (run_fir_bias_act(x, tensors | noise, LRELU, **options, threads=k) for k in (1, 2, 5))
        for other in others:
            for a, b in zip(one, other, strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_nothing_to_do(isa: str, shape: tuple[int, int, int, int]) -> None:
    x = torch.zeros(shape)
    weight = {"rgb_weight": torch.ones(shape[0], 2, shape[3])}
    for options in ({}, {"filter": RANK_1, "pad": 2}):
        _, rgb = run_fir_bias_act(x, weight, LRELU, **options, size=shape[1:3])
        assert rgb is not None and torch.equal(rgb, torch.zeros(*shape[:3], 2))
    arrays = [Array(s, torch.float32) for s in ((shape[0], 3, shape[3]), (shape[0], shape[1] * shape[2]))]
    size = [shape[0], shape[1] * shape[2], shape[3]]
    _C.bias_act_backward(0, arrays[0].address, 0, arrays[1].address, 0, 0, 0, 0, 0, 1.0, 1.0, 1.0, size, 3, 2)
    assert all(torch.equal(array.checked(), torch.zeros_like(array.tensor)) for array in arrays)


# ---- Derivative ----


def run_backward(
    given: dict[str, Tensor], wanted: Sequence[str], parts: int, alias: bool, threads: int, shift: int = 0
) -> dict[str, Tensor]:
    n, pixels, channels = given["grad"].shape
    dtype = given["grad"].dtype
    inputs = {name: Array.of(tensor, shift if name != "factor" else 0) for name, tensor in given.items()}
    results = {
        "grad_x": inputs["grad"] if alias else Array((n, pixels, channels), dtype, shift),
        "sum_u": Array((n, parts, channels), wide_of(dtype)),
        "sum_ux": Array((n, parts, channels), wide_of(dtype)),
        "sum_c": Array((n, pixels), wide_of(dtype)),
    }
    addresses = dict.fromkeys(("grad_x", "sum_u", "sum_ux", "sum_c", "grad", "out", "x", "factor"), 0)
    addresses |= {name: array.address for name, array in inputs.items()}
    addresses |= {name: results[name].address for name in wanted}
    size = [n, pixels, channels]
    _C.bias_act_backward(**addresses, dtype=number(dtype), **LRELU, size=size, parts=parts, threads=threads)
    for array in inputs.values():
        array.checked()
    return {name: results[name].checked() for name in wanted}


def exact_backward(given: dict[str, Tensor], parts: int) -> dict[str, Tensor]:
    """In float64, by autograd: `out` tells v."""
    t = {name: tensor.double() for name, tensor in given.items()}
    u = t["grad"] * LRELU["gain"]
    if "out" in t:
        v = torch.where(t["out"] < 0, t["out"] / LRELU["slope"], t["out"]) / LRELU["gain"]
        v.requires_grad_()
        # Beyond the clamp by more than half types round it
        y = (torch.where(v < 0, LRELU["slope"] * v, v) * LRELU["gain"]).clamp(-1.09, 1.09)
        (u,) = torch.autograd.grad(y, v, t["grad"])
    length = -(-u.shape[1] // parts)

    def sums(terms: Tensor) -> Tensor:
        return torch.stack([terms[:, k * length : (k + 1) * length].sum(1) for k in range(parts)], 1)

    ux = u * t["x"] if "x" in t else u
    return {
        "grad_x": u * t["factor"][:, None] if "factor" in t else u,
        "sum_u": sums(u),
        "sum_ux": sums(ux),
        "sum_c": u.sum(2),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("pixels", "parts"), [(7, 3), (5, 4), (700, 1)])  # (5, 4): the last part is empty
@pytest.mark.parametrize("channels", [1, 64, 131])
def test_bias_act_backward(isa: str, channels: int, pixels: int, parts: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, pixels, channels)
    magnitude = torch.rand(2, pixels, channels) * 0.9 + 0.1
    out = torch.where(x > 0.7, 1.1, torch.where(x < -0.7, -1.1, magnitude * x.sign()))
    given = {name: tensor.to(dtype) for name, tensor in (("grad", torch.randn_like(x)), ("out", out), ("x", x))}
    given["factor"] = torch.randn(2, channels, dtype=wide_of(dtype))
    everything = ["grad_x", "sum_u", "sum_ux", "sum_c"]
    for left_out, wanted in itertools.product(([], ["out"], ["factor"]), (everything, everything[:1], everything[1:3])):
        some = {name: tensor for name, tensor in given.items() if name not in left_out}
        exact = exact_backward(some, parts)
        for alias, threads, shift in ((False, 1, 1), (True, 3, 0)):
            results = run_backward(some, wanted, parts, alias, threads, shift)
            for name, actual in results.items():
                assert_rounded(actual, exact[name], dtype if name == "grad_x" else wide_of(dtype), scale=10.0)
    del given["x"]
    assert_rounded(run_backward(given, ["sum_u"], parts, False, 2)["sum_u"], exact_backward(given, parts)["sum_u"],
                   wide_of(dtype), scale=10.0)  # fmt: skip


def test_long_sums_stay_exact(isa: str) -> None:
    """2^20 equal terms: each addition to a single running sum would round the same way, an error of 0.4 %."""
    pixels = 2**20
    grad = torch.full((1, pixels, 1), 0.1)
    sums = run_backward({"grad": grad, "x": grad}, ["sum_u", "sum_ux"], 1, False, 1)
    exact = exact_backward({"grad": grad, "x": grad}, 1)
    for name, actual in sums.items():
        torch.testing.assert_close(actual.double(), exact[name], rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit_of_a_derivative(isa: str, dtype: torch.dtype) -> None:
    given = {name: torch.randn(3, 1000, 70).to(dtype) for name in ("grad", "out", "x")}
    one, *others = (run_backward(given, ["grad_x", "sum_u", "sum_ux", "sum_c"], 5, False, k) for k in (1, 2, 7))
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


# ---- Passes around matrix products, whole and by windows ----


def address_of(value: Any) -> Any:
    if isinstance(value, Array):
        return value.address
    return [*map(address_of, value)] if isinstance(value, list) else value


def run_window(
    function: Callable[..., None],
    shape: Sequence[int],
    tensors: dict[str, Tensor],
    calls: Sequence[dict[str, Any]],
    dtype: torch.dtype,
    keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """What `calls` write of one result together, with the end of a layer of `tensors`."""
    out = Array(shape, dtype)
    arrays = {name: Array.of(tensor) for name, tensor in tensors.items()}
    if "rgb_weight" in tensors:
        arrays["rgb"] = Array((*shape[:3], tensors["rgb_weight"].shape[1]), torch.float32)
    arguments = end_arguments(shape, arrays, LRELU)
    for name in ("seed", "add", "bias_stride"):
        del arguments[name]
    for call in calls:
        call = {name: address_of(value) for name, value in call.items()}
        function(out=out.address if keep else 0, dtype=number(dtype), **arguments, **call)
    for array in arrays.values():
        array.checked()
    return out.checked() if keep else None, arrays["rgb"].tensor if "rgb" in arrays else None


def check_windows(
    function: Callable[..., None],
    exact: Tensor,
    calls: Callable[[int, int], list[dict[str, Any]]],
    rows: int,
    dtype: torch.dtype,
) -> None:
    """`calls(step, threads)`: what writes the result by windows of `step` of the `rows` rows."""
    tensors = end_tensors(*exact.shape, dtype, rgb=3)  # type: ignore[misc]
    del tensors["add"]
    plain = {name: tensor for name, tensor in tensors.items() if name in ("factor", "noise", "bias")}
    for some, keep in ((tensors, True), (plain, True), (tensors, False)):
        expected, expected_rgb = ended(exact, some, **LRELU)
        whole, whole_rgb = run_window(function, exact.shape, some, calls(rows, 1), dtype, keep)
        if whole is not None:
            assert_rounded(whole, expected, dtype, scale=30.0)
        if whole_rgb is not None:
            assert_rounded(whole_rgb, expected_rgb, torch.float32, scale=30.0)
        for step, threads in ((rows, 2), (1, 1), (3, 2)):
            out, rgb = run_window(function, exact.shape, some, calls(step, threads), dtype, keep)
            assert whole is None or torch.equal(out, whole)  # type: ignore[arg-type]
            assert whole_rgb is None or torch.equal(rgb, whole_rgb)  # type: ignore[arg-type]


def products_of(x: Tensor, weight: Tensor) -> Tensor:
    """[N, H, W, k, k, O] of x [N, H, W, I] and weight [O, I, k, k]."""
    return torch.einsum("nhwi,oiuv->nhwuvo", x, weight)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize(
    ("kernel", "taps", "pad", "size", "x_size"),
    [
        (3, 4, 1, (10, 12), (5, 6)),
        (1, 4, 2, (8, 6), (4, 3)),
        (5, 3, -1, (9, 7), (6, 4)),
        (3, 8, 9, (25, 6), (4, 5)),  # rows that no input reaches
        (8, 8, 0, (12, 11), (6, 5)),
        (3, 1, 0, (5, 7), (2, 3)),
    ],
)
def test_finish_products(
    isa: str,
    kernel: int,
    taps: int,
    pad: int,
    size: tuple[int, int],
    x_size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    n, channels, (height, width) = 2, 19, x_size
    y = products_of(torch.randn(n, *x_size, 4), torch.randn(channels, 4, kernel, kernel)).to(dtype)
    filter_y, filter_x = torch.randn(taps), torch.randn(taps)
    transposed = torch.zeros(n, 2 * height + kernel - 2, 2 * width + kernel - 2, channels, dtype=torch.float64)
    for u, v in itertools.product(range(kernel), repeat=2):
        transposed[:, u : u + 2 * height - 1 : 2, v : v + 2 * width - 1 : 2] += y[:, :, :, u, v].double()
    exact = fir(transposed, torch.outer(filter_y.double(), filter_x.double()), 1, 1, pad, size, False)

    def calls(step: int, threads: int) -> list[dict[str, Any]]:
        result = []
        for row in range(0, size[0], step):
            rows = min(step, size[0] - row)
            # Input rows i with 2 i + u = r + t - pad for a row r, a tap t and a tap u of the convolution.
            needed = [
                i
                for i, r in itertools.product(range(height), range(row, row + rows))
                if any(0 <= r + t - pad - 2 * i < kernel for t in range(taps))
            ]
            begin, end = (min(needed), max(needed) + 1) if needed else (height, height)
            if not needed and (row - pad) < 0:
                begin = end = 0
            result.append(
                {
                    "y": Array.of(y[:, begin:end]),
                    "y_size": [height, width, kernel],
                    "y_rows": [begin, end - begin],
                    "pad": pad,
                    "filter_y": filter_y.tolist(),
                    "filter_x": filter_x.tolist(),
                    "rows": [row, rows],
                    "threads": threads,
                }
            )
        return result

    check_windows(_C.finish_products, exact, calls, size[0], dtype)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(("size", "channels"), [((6, 8), (5, 7)), ((5, 3), (64, 65)), ((1, 1), (3, 130))])
def test_winograd(isa: str, size: tuple[int, int], channels: tuple[int, int], scaled: bool) -> None:
    n, (height, width), (channels_in, channels_out) = 2, size, channels
    x, weight = torch.randn(n, *size, channels_in), torch.randn(channels_out, channels_in, 3, 3) * channels_in**-0.5
    style = torch.randn(n, channels_in) if scaled else None
    given, taps = Array.of(x), Array.of(weight)
    styles = None if style is None else Array.of(style)
    right = Array((16, channels_out, channels_in), torch.float32)
    _C.winograd_weight(right.address, taps.address, channels_out, channels_in, 2)
    image = (x if style is None else x * style[:, None, None]).double().permute(0, 3, 1, 2)
    exact = F.conv2d(image, weight.double(), padding=1).permute(0, 2, 3, 1)
    tile_rows, columns = -(-height // 2), -(-width // 2)

    def calls(step: int, threads: int) -> list[dict[str, Any]]:
        result = []
        for row in range(0, tile_rows, step):
            rows = min(step, tile_rows - row)
            left = Array((16, n * rows * columns, channels_in), torch.float32)
            address = 0 if styles is None else styles.address
            _C.winograd_input(left.address, given.address, address, list(x.shape), [row, rows], threads)
            # In float64, which rounds to the same float32 however many tiles there are.
            products = torch.bmm(left.checked().double(), right.checked().double().mT).float()
            result.append({"products": [*map(Array.of, products)], "tile_rows": [row, rows], "threads": threads})
        return result

    check_windows(_C.winograd_output, exact, calls, tile_rows, torch.float32)


@pytest.mark.parametrize("padding", [0, 1, 9])
@pytest.mark.parametrize("kernel", [1, 3])
def test_layers_by_windows(kernel: int, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's own windows, of a few rows."""
    if padding < kernel // 2:
        padding = kernel // 2
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_TILES", 1)
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_CHANNELS", 1)
    x, weight, style = torch.randn(2, 6, 7, 5), torch.randn(4, 6, kernel, kernel), torch.randn(2, 6)
    for up in (1, 2):
        exact = modulated_conv2d(*(t.double() for t in (x, weight, style)), up=up, padding=padding, backend="reference")
        for products, tiles in ((1, 1), (4 * kernel**2 * 5 * 3, 7)):
            monkeypatch.setattr(frozen_layer, "PRODUCTS_CHUNK", products)
            monkeypatch.setattr(frozen_layer, "WINOGRAD_CHUNK", tiles * 6)
            actual = modulated_conv2d(x, weight, style, up=up, padding=padding, backend="cpp")
            torch.testing.assert_close(actual.double(), exact, rtol=0, atol=2e-5)


# ---- Refusals ----

END_ZEROS: dict[str, Any] = {
    **dict.fromkeys(("out", "factor", "noise", "noise_stride", "strength", "bias", "next_factor", "rgb"), 0),
    **{"rgb_weight": 0, "rgb_channels": 0, "dtype": 0, "slope": 1.0, "gain": 1.0, "clamp": 1.0, "threads": 1},
}
MORE_ZEROS = {"seed": 0, "bias_stride": 0, "add": 0}
VALID: dict[str, dict[str, Any]] = {
    "fir_bias_act": {
        **END_ZEROS, **MORE_ZEROS, "size": [0, 2, 3, 4], "x": 0, "x_size": [2, 3], "filter": 0, "fir": [4, 1, 1, 0],
        "flip": False, "fir_gain": 1.0,
    },
    "bias_act_backward": {
        **dict.fromkeys(("grad_x", "sum_u", "sum_ux", "sum_c", "grad", "out", "x", "factor", "dtype"), 0),
        "slope": 1.0, "gain": 1.0, "clamp": 1.0, "size": [0, 3, 4], "parts": 1, "threads": 1,
    },
    "finish_products": {
        **END_ZEROS, "size": [0, 12, 8, 4], "y": 0, "y_size": [6, 4, 3], "y_rows": [0, 6], "pad": 1,
        "filter_y": [1.0] * 4, "filter_x": [1.0] * 4, "rows": [0, 12],
    },
    "winograd_input": {"out": 0, "x": 0, "style": 0, "size": [0, 5, 4, 3], "tile_rows": [0, 3], "threads": 1},
    "winograd_weight": {"out": 0, "weight": 0, "out_channels": 0, "in_channels": 3, "threads": 1},
    "winograd_output": {**END_ZEROS, "products": [0] * 16, "size": [0, 5, 4, 3], "tile_rows": [1, 2]},
}  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("fir_bias_act", {"size": [0, 2, 3, -4]}, "sizes >= 0, got -4"),
    ("fir_bias_act", {"x_size": [2, 4]}, "x of the result's size"),
    ("fir_bias_act", {"filter": 1, "fir": [9, 1, 1, 0]}, "1 to 8 taps, got 9"),
    ("fir_bias_act", {"filter": 1, "x": 1, "fir": [4, 3, 1, 0]}, "up 1 or 2, got 3"),
    ("fir_bias_act", {"filter": 1, "x": 1, "fir": [4, 1, 0, 0]}, "down 1 or 2, got 0"),
    ("fir_bias_act", {"filter": 1}, "a result beside x"),
    ("fir_bias_act", {"noise_stride": 5}, "noise_stride 0 or height"),
    ("fir_bias_act", {"bias_stride": 5}, "bias_stride 0 or channels"),
    ("fir_bias_act", {"clamp": math.nan}, "clamp > 0"),
    ("fir_bias_act", {"rgb": 1, "rgb_weight": 1, "rgb_channels": 5}, "1 to 4 rgb_channels"),
    ("fir_bias_act", {"rgb": 1, "rgb_channels": 1}, "rgb_weight where rgb is wanted"),
    ("fir_bias_act", {"rgb": 1, "rgb_weight": 1, "rgb_channels": 1, "dtype": 3}, "another dtype than float64"),
    ("fir_bias_act", {"dtype": 4}, "a dtype of DTYPES"),
    ("bias_act_backward", {"parts": 0}, "parts >= 1, got 0"),
    ("bias_act_backward", {"gain": 0.0}, "gain > 0"),
    ("bias_act_backward", {"size": [0, -1, 4]}, "sizes >= 0, got -1"),
    ("bias_act_backward", {"sum_ux": 1}, "x where sum_ux is wanted"),
    ("bias_act_backward", {"dtype": 4}, "a dtype of DTYPES"),
    ("finish_products", {"y_size": [-6, 4, 3]}, "y_size >= 0, got -6"),
    ("finish_products", {"y_size": [6, 4, 0]}, "a kernel >= 1, got 0"),
    ("finish_products", {"y_size": [6, 4, 17]}, "1 to 64 / kernel taps, got 4"),
    ("finish_products", {"filter_y": [], "filter_x": []}, "1 to 64 / kernel taps, got 0"),
    ("finish_products", {"filter_x": [1.0]}, "filters of one length, got 1"),
    ("finish_products", {"rows": [1, 12]}, "rows of out, got 12"),
    ("finish_products", {"rows": [-1, 2]}, "rows of out, got -1"),
    ("finish_products", {"y_rows": [5, 2]}, "y_rows of the input, got 2"),
    ("finish_products", {"y_rows": [2**63 - 1, 2**63 - 1]}, "y_rows of the input"),
    ("finish_products", {"rows": [6, 4], "y_rows": [3, 3]}, "y_rows with all that the rows need, got 3"),
    ("finish_products", {"rows": [6, 2], "y_rows": [2, 2]}, "y_rows with all that the rows need, got 4"),
    ("finish_products", {"pad": 2**62}, "pad"),
    ("finish_products", {"dtype": 3}, "a dtype of DTYPES"),
    ("winograd_input", {"tile_rows": [1, 3]}, "tile_rows of the image, got 3"),
    ("winograd_input", {"tile_rows": [0, -1]}, "tile_rows of the image, got -1"),
    ("winograd_input", {"size": [-1, 5, 4, 3]}, "sizes >= 0, got -1"),
    ("winograd_weight", {"in_channels": -1}, "channels >= 0, got -1"),
    ("winograd_output", {"tile_rows": [3, 1]}, "tile_rows of the image, got 1"),
    ("winograd_output", {"dtype": 1}, "float32, got 1"),
    *((name, {"threads": 0}, "threads >= 1, got 0") for name in VALID),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_arguments_out_of_range_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    function = getattr(_C, name)
    function(**VALID[name])
    with pytest.raises(ValueError, match=message):
        function(**{**VALID[name], **change})
