"""The kernels' limits.

The compiled extension states its own. Without it only Triton's kernels are left, which share them: hence the values for
that case. A loaded extension that lacks one is of another version: then importing spigan.ops fails.
"""

from __future__ import annotations

from typing import Any

from spigan.ops import backends


def _from_extension(name: str, without: Any) -> Any:
    try:
        extension = backends.extension()
    except backends.BackendUnavailable:
        return without
    return getattr(extension, name)


MAX_TAPS: int = _from_extension("MAX_TAPS", 8)
"""Most taps of a FIR filter in each direction."""

MAX_RGB_CHANNELS: int = _from_extension("MAX_RGB_CHANNELS", 4)
"""Most channels of a ToRGB layer that runs within the layer before it."""

MAX_PATH_TIMES: int = _from_extension("MAX_PATH_TIMES", 8)
"""Most times of `path_interpolate`."""

MAX_ODE_DIM: int = _from_extension("RK4_MLP_MAX_DIM", 1024)
"""Largest width D of `rk4_mlp` on a GPU."""

ODE_DIM_MULTIPLE: int = _from_extension("RK4_MLP_DIM_MULTIPLE", 16)
"""D of `rk4_mlp` on a GPU is a multiple of this."""

MAX_ODE_LAYERS: int = _from_extension("RK4_MLP_MAX_LAYERS", 8)
"""Most layers of `rk4_mlp` on a GPU."""

MAX_ODE_TIMES: int = _from_extension("RK4_MLP_MAX_INTERVALS", 64)
"""Most times of `rk4_mlp` on a GPU."""

MAX_PRODUCT_TERMS: int = _from_extension("MAX_PRODUCT_TERMS", 64)
"""Most kernel rows times filter taps of an upsampling layer made of matrix products on the CPU."""
