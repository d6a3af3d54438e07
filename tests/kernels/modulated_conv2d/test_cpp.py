"""The C++ passes around the matrix products of a layer, whole and by windows, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from guarded_array import Array
from layer_ends import (
    DTYPES,
    LRELU,
    assert_rounded,
    end_arguments,
    end_tensors,
    ended,
    fir,
    number,
)
from torch import Tensor
from torch.nn import functional as F

from spigan import _C
from spigan.ops import frozen_layer, layer_weights, modulated_conv2d


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
