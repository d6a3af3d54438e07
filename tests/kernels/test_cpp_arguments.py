"""The C++ functions refuse arguments that would make a kernel read or write out of bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from spigan import _C

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
    ("fir_bias_act", {"size": [0, 2, 3, -4]}, "every size to be >= 0, got -4"),
    ("fir_bias_act", {"x_size": [2, 4]}, "without a filter x must have the result's size"),
    (
        "fir_bias_act",
        {"filter": 1, "fir": [_C.MAX_TAPS + 1, 1, 1, 0]},
        f"taps from 1 to {_C.MAX_TAPS}, got",
    ),
    ("fir_bias_act", {"filter": 1, "x": 1, "fir": [4, 3, 1, 0]}, "up from 1 to 2, got 3"),
    ("fir_bias_act", {"filter": 1, "x": 1, "fir": [4, 1, 0, 0]}, "down from 1 to 2, got 0"),
    ("fir_bias_act", {"filter": 1}, "out must not be x"),
    ("fir_bias_act", {"noise_stride": 5}, r"noise_stride to be 0 or height \* width, got 5"),
    ("fir_bias_act", {"bias_stride": 5}, "bias_stride to be 0 or channels, got 5"),
    ("fir_bias_act", {"clamp": math.nan}, "clamp > 0"),
    (
        "fir_bias_act",
        {"rgb": 1, "rgb_weight": 1, "rgb_channels": _C.MAX_RGB_CHANNELS + 1},
        f"rgb_channels from 1 to {_C.MAX_RGB_CHANNELS}, got {_C.MAX_RGB_CHANNELS + 1}",
    ),
    ("fir_bias_act", {"rgb": 1, "rgb_channels": 1}, "rgb needs rgb_weight"),
    ("fir_bias_act", {"rgb": 1, "rgb_weight": 1, "rgb_channels": 1, "dtype": 3}, "rgb is not available for float64"),
    ("fir_bias_act", {"dtype": 4}, "an index in DTYPES of a dtype that this function supports"),
    ("bias_act_backward", {"parts": 0}, "parts >= 1, got 0"),
    ("bias_act_backward", {"gain": 0.0}, "gain > 0"),
    ("bias_act_backward", {"size": [0, -1, 4]}, "every size to be >= 0, got -1"),
    ("bias_act_backward", {"sum_ux": 1}, "sum_ux needs x"),
    ("bias_act_backward", {"dtype": 4}, "an index in DTYPES of a dtype that this function supports"),
    ("finish_products", {"y_size": [-6, 4, 3]}, "y_size >= 0, got -6"),
    ("finish_products", {"y_size": [6, 4, 0]}, f"kernel from 1 to {_C.MAX_PRODUCT_TERMS}, got 0"),
    ("finish_products", {"y_size": [6, 4, _C.MAX_PRODUCT_TERMS + 1]}, f"got {_C.MAX_PRODUCT_TERMS + 1}"),
    ("finish_products", {"y_size": [6, 4, _C.MAX_PRODUCT_TERMS // 4 + 1]}, r"len\(filter_y\) from 1 to 3, got 4"),
    ("finish_products", {"filter_y": [], "filter_x": []}, r"len\(filter_y\) from 1 to \d+, got 0"),
    ("finish_products", {"filter_x": [1.0]}, "filter_y and filter_x must have the same length"),
    ("finish_products", {"rows": [1, 12]}, r"of rows within 12 rows, got \(1, 12\)"),
    ("finish_products", {"rows": [-1, 2]}, r"of rows within 12 rows, got \(-1, 2\)"),
    ("finish_products", {"y_rows": [5, 2]}, r"of y_rows within 6 rows, got \(5, 2\)"),
    ("finish_products", {"y_rows": [2**63 - 1, 2**63 - 1]}, "of y_rows within 6 rows"),
    (
        "finish_products",
        {"rows": [6, 4], "y_rows": [3, 3]},
        "to begin before the first input row .*, got 3",
    ),
    (
        "finish_products",
        {"rows": [6, 2], "y_rows": [2, 2]},
        "to end after the last input row .*, got 4",
    ),
    ("finish_products", {"pad": 2**62}, r"\|pad\| < 2\^40"),
    ("finish_products", {"dtype": 3}, "an index in DTYPES of a dtype that this function supports"),
    ("winograd_input", {"tile_rows": [1, 3]}, r"of tile_rows within 3 rows, got \(1, 3\)"),
    ("winograd_input", {"tile_rows": [0, -1]}, r"of tile_rows within 3 rows, got \(0, -1\)"),
    ("winograd_input", {"size": [-1, 5, 4, 3]}, "every size to be >= 0, got -1"),
    ("winograd_weight", {"out_channels": -1}, "out_channels >= 0, got -1"),
    ("winograd_weight", {"in_channels": -1}, "in_channels >= 0, got -1"),
    ("winograd_output", {"tile_rows": [3, 1]}, r"of tile_rows within 3 rows, got \(3, 1\)"),
    ("winograd_output", {"dtype": 1}, "the index of float32 in DTYPES, got 1"),
    *((name, {"threads": 0}, "threads from 1 to") for name in VALID),
    ("winograd_input", {"threads": 2**32 + 1}, "threads from 1 to"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_arguments_out_of_range_are_refused(name: str, change: dict[str, Any], message: str) -> None:
    function = getattr(_C, name)
    function(**VALID[name])
    with pytest.raises(ValueError, match=message):
        function(**{**VALID[name], **change})
