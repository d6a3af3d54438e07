"""The end of a layer, shared by the kernels of `fir_bias_act` and `modulated_conv2d`.

PyTorch twin: spigan/ops/layer_end.py; C++ twin: csrc/common/activate_and_clamp.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox_normal import philox_normals_at


@triton.jit
def of_images(pointer, o_n, o_c, m_c, C):
    """Load channels o_c [B] of a float32 tensor [N, C]: [1, B] for one image o_n, [rows, B] for o_n [rows, 1]."""
    return tl.load(pointer + o_n * C + o_c[None, :], mask=m_c[None, :], other=0.0)


@triton.jit
def layer_end(
    b_v,  # [rows, B] float32
    o_n,  # int64 image, or [rows, 1] images
    o_e,  # [rows] int64 pixels, counted through all images
    o_noise,  # [rows] int64 pixels in the noise
    m_e,  # [rows]
    o_c,  # [B]
    m_c,  # [B]
    C,
    factor,
    noise,
    seed,
    strength,
    bias,
    slope,
    gain,
    clamp,
    BIAS_OF_IMAGE: tl.constexpr,
):
    """Compute clamp(gain act(factor v + strength noise + bias)); NaN stays NaN."""
    if factor is not None:
        b_v *= of_images(factor, o_n, o_c, m_c, C)
    if noise is not None or seed is not None:
        if noise is not None:
            b_noise = tl.load(noise + o_noise, mask=m_e, other=0.0)
        else:
            b_noise = philox_normals_at(tl.load(seed), o_e)
        if strength is not None:
            b_noise *= tl.load(strength)
        b_v += b_noise[:, None]
    if bias is not None:
        if BIAS_OF_IMAGE:
            b_v += of_images(bias, o_n, o_c, m_c, C)
        else:
            b_v += tl.load(bias + o_c, mask=m_c, other=0.0)[None, :]
    b_v *= tl.where(b_v < 0.0, slope * gain, gain)
    b_v = tl.where(b_v > clamp, clamp, b_v)
    return tl.where(b_v < -clamp, -clamp, b_v)


@triton.jit
def store_rgb(rgb, rgb_weight, b_v, o_n, o_e, m_e, o_c, m_c, C, R: tl.constexpr):
    """Store rgb[e, r] = sum over these channels of rgb_weight[n, r, c] v[e, c]."""
    for r in tl.static_range(R):
        b_weight = of_images(rgb_weight + r * tl.cast(C, tl.int64), o_n * R, o_c, m_c, C)
        tl.store(rgb + o_e * R + r, tl.sum(b_v * b_weight, 1), mask=m_e)


def partial_sums(result: torch.Tensor | None, tiles: int) -> torch.Tensor | None:
    """Return memory [tiles, *result.shape] for the tiles' sums, or `result` itself for one tile."""
    return result if result is None or tiles == 1 else result.new_empty((tiles, *result.shape))


def add_partial_sums(result: torch.Tensor | None, sums: torch.Tensor | None) -> None:
    """Add the sums that the tiles wrote to `partial_sums`, always in the same order."""
    if result is not None and sums is not None and sums is not result:
        torch.sum(sums, 0, out=result)
