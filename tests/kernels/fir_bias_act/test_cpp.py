"""The C++ passes of fir_bias_act on every instruction set: the raw functions on guarded memory, against float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from guarded_array import Array
from layer_ends import (
    DTYPES,
    LRELU,
    assert_rounded,
    end_tensors,
    ended,
    fir,
    number,
    run_fir_bias_act,
    wide_of,
)
from torch import Tensor

from spigan import _C
from spigan.ops.philox_normal import philox_normal_reference


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
