"""Problems for the end of a layer, which the Triton kernels fir_bias_act and conv2d share, and plain PyTorch for it."""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from spigan.ops import philox_normal

PARTS = {
    "nothing": (set(), (1.0, 1.0, math.inf)),
    "generator": ({"factor", "drawn", "strength", "bias", "next_factor"}, (0.2, 2**0.5, 256.0)),
    "noise": ({"noise", "bias of images"}, (0.2, 1.5, 0.8)),
    "one noise": ({"factor", "noise of one", "strength", "rgb", "next_factor"}, (0.2, 1.5, 0.8)),
    "rgb alone": ({"drawn", "bias", "rgb", "no out"}, (1.0, 0.5, 0.7)),
}
SEED = 2**40 + 7


def end_problem(n, height, width, channels, parts):
    """Arguments of the kernels' host functions for an end with these parts."""

    def given_if(name, *shape):
        return torch.randn(shape) if name in parts else None

    noise = given_if("noise", n, height, width)
    bias = given_if("bias", channels)
    return {
        "factor": given_if("factor", n, channels),
        "noise": given_if("noise of one", 1, height, width) if noise is None else noise,
        "seed": torch.tensor([SEED]) if "drawn" in parts else None,
        "strength": given_if("strength", 1),
        "bias": given_if("bias of images", n, channels) if bias is None else bias,
        "next_factor": given_if("next_factor", n, channels),
        "rgb_weight": given_if("rgb", n, 3, channels),
    }


def end_of_layer(v, a, slope, gain, clamp, add=None):
    """(out, rgb) of v [N, H, W, C], computed in its dtype by plain PyTorch."""
    a = {name: None if t is None or name == "seed" else t.to(v.dtype) for name, t in a.items()} | {"seed": a["seed"]}
    n, height, width, _ = v.shape
    if a["factor"] is not None:
        v = v * a["factor"][:, None, None]
    noise = a["noise"]
    if a["seed"] is not None:
        noise = philox_normal((n, height, width), seed=SEED, backend="reference").to(v.dtype)
    if noise is not None:
        v = v + (noise if a["strength"] is None else noise * a["strength"])[..., None]
    if a["bias"] is not None:
        v = v + (a["bias"] if a["bias"].ndim == 1 else a["bias"][:, None, None])
    v = (F.leaky_relu(v, slope) * gain).clamp(-clamp, clamp)
    rgb = None if a["rgb_weight"] is None else torch.einsum("nhwc,nrc->nhwr", v, a["rgb_weight"])
    v = v if a["next_factor"] is None else v * a["next_factor"][:, None, None]
    return v if add is None else v + add.to(v.dtype), rgb


def doubled(arguments):
    return {name: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in arguments.items()}


def poisoned_results(n, height, width, channels, parts, dtype):
    out = None if "no out" in parts else torch.full((n, height, width, channels), torch.nan, dtype=dtype)
    return out, torch.full((n, height, width, 3), torch.nan) if "rgb" in parts else None


def assert_ends(assert_accurate, actual, plain, exact):
    """(out, rgb) each; sums over channels are float32, where the noise drawn here differs by 1e-5 from PyTorch's."""
    for a, p, e in zip(actual, plain, exact, strict=True):
        if a is not None:
            assert_accurate(a.to(p.dtype), p, e, slack=2.0 if p.dtype == torch.float16 else 64.0)


END_NAMES = ("factor", "noise", "seed", "strength", "bias", "next_factor", "rgb_weight")
