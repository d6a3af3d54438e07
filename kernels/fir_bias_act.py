"""FIR resampling, a factor for each channel, noise, bias, activation, gain and clamp in one pass over memory, and the
derivatives of all but the resampling in another pass.

PyTorch twin: spigan/ops/fir_bias_act.py; C++ twin: csrc/common/arguments.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .layer_end import add_partial_sums, layer_end, of_images, partial_sums, store_rgb

NUM_WARPS = 4
THREAD_BYTES = 64
"""Bytes of one tensor's tile that a thread holds: 4 loads of 16 bytes."""

UNALIGNED_NUMBERS = 4
"""Numbers of a tile that a thread holds without such loads, when each number takes registers for its address."""

MAX_BLOCK_C = 1024
"""Most channels over which one program sums. For more channels, the sums of several programs are added."""


# ---- fir_bias_act ----


@triton.jit(do_not_specialize=["height", "width", "x_height", "x_width", "pad", "noise_stride"])
def fir_bias_act_kernel(
    out,  # [N, height, width, C], or None
    rgb,  # [channel tiles, N, height, width, R] float32, or None
    x,  # [N, x_height, x_width, C]
    filter,  # [TAPS, TAPS] float32, or None
    factor,  # [N, C] float32, or None
    noise,  # float32, or None
    seed,  # [1] int64, or None
    strength,  # [1] float32, or None
    bias,  # [C] or [N, C] float32, or None
    add,  # like out, or None
    next_factor,  # [N, C] float32, or None
    rgb_weight,  # [N, R, C] float32, or None
    height,
    width,
    x_height,
    x_width,
    C,
    pad,
    noise_stride,  # from one image's noise to the next one's
    rgb_stride: tl.int64,  # from one channel tile's sums to the next one's
    fir_gain,
    slope,
    gain,
    clamp,
    UP: tl.constexpr,
    DOWN: tl.constexpr,
    TAPS: tl.constexpr,
    FLIP: tl.constexpr,
    BIAS_OF_IMAGE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program computes BLOCK_H x BLOCK_W pixels of one image in BLOCK_C channels."""
    rows = tl.cdiv(height, BLOCK_H)
    columns = tl.cdiv(width, BLOCK_W)
    i_tile = tl.program_id(0)
    o_n = (i_tile // (rows * columns)).to(tl.int64)
    i_tile %= rows * columns
    o_pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    o_r = (i_tile // columns).to(tl.int64) * BLOCK_H + o_pixel // BLOCK_W
    o_w = (i_tile % columns).to(tl.int64) * BLOCK_W + o_pixel % BLOCK_W
    m_e = (o_r < height) & (o_w < width)
    o_p = o_r * width + o_w
    o_e = o_n * height * width + o_p
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m = m_e[:, None] & m_c[None, :]
    o = o_e[:, None] * C + o_c[None, :]

    if filter is None:
        b_v = tl.load(x + o, mask=m, other=0.0).to(tl.float32)
    else:
        b_v = tl.zeros([BLOCK_H * BLOCK_W, BLOCK_C], tl.float32)
        p_x = x + o_n * x_height * x_width * C + o_c[None, :]
        o_r = o_r * DOWN - pad
        o_w = o_w * DOWN - pad
        # Only the taps that meet a pixel, not an inserted zero, count: every UP-th, starting at the first one.
        o_first_j = -o_r & (UP - 1)
        o_first_i = -o_w & (UP - 1)
        # Not unrolled: all loads at once would need more registers than exist.
        for step_j in tl.range(0, (TAPS + UP - 1) // UP, loop_unroll_factor=1):
            o_j = o_first_j + UP * step_j
            o_y = (o_r + o_j) >> (UP - 1)
            m_y = m_e & (o_j < TAPS) & (o_y >= 0) & (o_y < x_height)
            for step_i in tl.static_range((TAPS + UP - 1) // UP):
                o_i = o_first_i + UP * step_i
                o_x = (o_w + o_i) >> (UP - 1)
                m_x = m_y & (o_i < TAPS) & (o_x >= 0) & (o_x < x_width)
                o_tap = o_j * TAPS + o_i
                if FLIP:
                    o_tap = TAPS * TAPS - 1 - o_tap
                b_tap = tl.load(filter + o_tap, mask=m_x, other=0.0)
                o_x = (o_y * x_width + o_x)[:, None] * C
                b_x = tl.load(p_x + o_x, mask=m_x[:, None] & m_c[None, :], other=0.0)
                b_v += b_tap[:, None] * b_x.to(tl.float32)
        b_v *= fir_gain

    o_noise = o_n * noise_stride + o_p
    b_v = layer_end(
        b_v, o_n, o_e, o_noise, m_e, o_c, m_c, C, factor, noise, seed, strength, bias, slope, gain, clamp, BIAS_OF_IMAGE
    )
    if rgb is not None:
        store_rgb(rgb + tl.program_id(1) * rgb_stride, rgb_weight, b_v, o_n, o_e, m_e, o_c, m_c, C, R)
    if out is not None:
        if next_factor is not None:
            b_v *= of_images(next_factor, o_n, o_c, m_c, C)
        if add is not None:
            b_v += tl.load(add + o, mask=m, other=0.0).to(tl.float32)
        tl.store(out + o, b_v.to(out.dtype.element_ty), mask=m)


def tile(channels: int, element_size: int, whole: bool) -> tuple[int, int]:
    """Return (pixels, channels) of a program's tile; with `whole`, all channels up to `MAX_BLOCK_C`."""
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_C if whole else 64)
    aligned = channels * element_size % 16 == 0
    numbers = 32 * NUM_WARPS * (THREAD_BYTES // element_size if aligned else UNALIGNED_NUMBERS)
    return max(1, numbers // block_c), block_c


def fir_bias_act(
    out: torch.Tensor | None,
    rgb: torch.Tensor | None,
    x: torch.Tensor,
    filter: torch.Tensor | None,
    factor: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    strength: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    next_factor: torch.Tensor | None,
    rgb_weight: torch.Tensor | None,
    *,
    up: int,
    down: int,
    pad: int,
    flip: bool,
    fir_gain: float,
    slope: float,
    gain: float,
    clamp: float,
) -> None:
    """Compute out = next_factor clamp(gain act(factor fir_gain FIR(x) + strength noise + bias)) + add, in float32.

    Args:
        out: [N, H', W', C] result, or None if only `rgb` is wanted. Without a filter it may be `x`. All tensors are
            contiguous, on one device, and float32 unless stated otherwise.
        rgb: [N, H', W', R] result, or None: sums over channels of rgb_weight times the value before `next_factor`.
        x: [N, H, W, C] float32, bfloat16 or float16.
        filter: [m, m], m <= 8, or None: FIR(x) = x and `fir_gain` is not used.
        factor: [N, C], or None: 1.
        noise: [N or 1, H', W'], or None.
        seed: [1] int64; pixel p of image n has element n H' W' + p of its stream as noise; or None: no such noise.
        strength: [1], or None: 1.
        bias: [C] or [N, C], or None.
        add: like `out` and of its dtype, or None.
        next_factor: [N, C], or None: 1.
        rgb_weight: [N, R, C], R <= 4, if `rgb` is given.
        up, down: 1 or 2; up - 1 zeros follow each pixel of x, every down-th pixel is kept.
        pad: zeros before the first row and column, on the upsampled grid; negative values crop.
        flip: convolve with the filter; False: correlate.
        fir_gain: factor of the filter.
        slope: of act's negative side.
        gain, clamp: see above; inf does not clamp.
    """
    size = out if out is not None else rgb
    if size is None or size.numel() == 0:
        return
    n, height, width, _ = size.shape
    channels = x.shape[3]
    noise_stride = 0 if noise is None or noise.shape[0] == 1 else height * width
    pixels, block_c = tile(channels, x.element_size(), whole=rgb is not None)
    if filter is None:
        height, width = 1, height * width  # any pixels make a tile
        block_h, block_w = 1, pixels
    else:
        # Square, so that neighbours' taps overlap within a program: its loads meet in the first-level cache.
        block_w = min(1 << (pixels.bit_length() // 2), triton.next_power_of_2(width))
        block_h = min(pixels // block_w, triton.next_power_of_2(height))
    tiles_c = triton.cdiv(channels, block_c)
    sums = partial_sums(rgb, tiles_c)
    fir_bias_act_kernel[(n * triton.cdiv(height, block_h) * triton.cdiv(width, block_w), tiles_c)](
        out, sums, x, filter, factor, noise, seed, strength, bias, add, next_factor, rgb_weight,
        height, width, *x.shape[1:3], channels, pad, noise_stride, 0 if rgb is None else rgb.numel(),
        float(fir_gain), float(slope), float(gain), float(clamp),
        UP=up,
        DOWN=down,
        TAPS=0 if filter is None else filter.shape[0],
        FLIP=flip,
        BIAS_OF_IMAGE=bias is not None and bias.ndim == 2,
        R=0 if rgb is None else rgb.shape[3],
        BLOCK_H=block_h,
        BLOCK_W=block_w,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )  # fmt: skip
    add_partial_sums(rgb, sums)


# ---- bias_act_backward ----


@triton.jit(do_not_specialize=["pixels", "parts"])
def bias_act_backward_kernel(
    grad_x,  # [N, pixels, C], or None
    sum_u,  # [N, parts, C] float32, or None
    sum_ux,  # [N, parts, C] float32, or None
    sum_c,  # [channel tiles, N, pixels] float32, or None
    grad,  # [N, pixels, C]
    out,  # [N, pixels, C], or None
    x,  # [N, pixels, C], or None
    factor,  # [N, C] float32, or None
    pixels,
    parts,
    C,
    sum_c_stride: tl.int64,  # from one channel tile's sums to the next one's
    slope,
    gain,
    clamp,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes one part of the pixels of one image in BLOCK_C channels, BLOCK_P pixels at a time."""
    i_part = tl.program_id(0) % parts
    o_n = (tl.program_id(0) // parts).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    part = tl.cdiv(pixels, parts)
    first = i_part.to(tl.int64) * part
    end = tl.minimum(first + part, pixels)

    b_sum_u = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_sum_ux = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, part, BLOCK_P):
        o_p = first + start + tl.arange(0, BLOCK_P)
        m_p = o_p < end
        o_e = o_n * pixels + o_p
        m = m_p[:, None] & m_c[None, :]
        o = o_e[:, None] * C + o_c[None, :]
        b_u = tl.load(grad + o, mask=m, other=0.0).to(tl.float32)
        if out is not None:
            # gain > 0: the result has the sign of what was activated.
            b_out = tl.load(out + o, mask=m, other=0.0).to(tl.float32)
            b_slope = tl.where(b_out > 0.0, gain, slope * gain)
            b_u *= tl.where(tl.abs(b_out) >= clamp, 0.0, b_slope)
        else:
            b_u *= gain
        if sum_u is not None:
            b_sum_u += b_u
        if sum_ux is not None:
            b_sum_ux += b_u * tl.load(x + o, mask=m, other=0.0).to(tl.float32)
        if sum_c is not None:
            tl.store(sum_c + tl.program_id(1) * sum_c_stride + o_e, tl.sum(b_u, 1), mask=m_p)
        if grad_x is not None:
            if factor is not None:
                b_u *= tl.load(factor + o_n * C + o_c, mask=m_c, other=0.0)[None, :]
            tl.store(grad_x + o, b_u.to(grad_x.dtype.element_ty), mask=m)

    o_sum = (o_n * parts + i_part) * C + o_c
    if sum_u is not None:
        tl.store(sum_u + o_sum, tl.sum(b_sum_u, 0), mask=m_c)
    if sum_ux is not None:
        tl.store(sum_ux + o_sum, tl.sum(b_sum_ux, 0), mask=m_c)


def bias_act_backward(
    grad_x: torch.Tensor | None,
    sum_u: torch.Tensor | None,
    sum_ux: torch.Tensor | None,
    sum_c: torch.Tensor | None,
    grad: torch.Tensor,
    out: torch.Tensor | None,
    x: torch.Tensor | None,
    factor: torch.Tensor | None,
    *,
    slope: float,
    gain: float,
    clamp: float,
) -> None:
    """Compute the derivatives of `fir_bias_act` without filter, next_factor, add and rgb.

    u is grad times the derivative of clamp(gain act()).

    Args:
        grad_x: [N, P, C] result factor u, or None if it is not wanted; it may be `grad`. All tensors are contiguous and
            on one device. Images are float32, bfloat16 or float16, the others float32.
        sum_u: [N, parts, C] result, sums of u over pixels; part k has those from k ceil(P / parts) on; or None.
        sum_ux: the same of u x, or None.
        sum_c: [N, P] result, sums of u over channels, or None.
        grad: [N, P, C].
        out: result of the forward pass, like `grad`, or None: the derivative is `gain` everywhere.
        x: like `grad`; may be None if `sum_ux` is.
        factor: [N, C], or None: 1.
        slope, gain, clamp: as of `fir_bias_act`; gain > 0.
    """
    n, pixels, channels = grad.shape
    if grad.numel() == 0:
        return
    block_p, block_c = tile(channels, grad.element_size(), whole=sum_c is not None)
    of_parts = sum_u if sum_u is not None else sum_ux
    parts = triton.cdiv(pixels, block_p) if of_parts is None else of_parts.shape[1]
    tiles_c = triton.cdiv(channels, block_c)
    sums = partial_sums(sum_c, tiles_c)
    bias_act_backward_kernel[(n * parts, tiles_c)](
        grad_x,
        sum_u,
        sum_ux,
        sums,
        grad,
        out,
        x,
        factor,
        pixels,
        parts,
        channels,
        n * pixels,
        float(slope),
        float(gain),
        float(clamp),
        BLOCK_P=block_p,
        BLOCK_C=block_c,
        num_warps=NUM_WARPS,
        # The most a thread can have: without a bound, ptxas spills some to fit more programs on a multiprocessor.
        maxnreg=255,
        enable_fp_fusion=True,
    )
    add_partial_sums(sum_c, sums)
