"""The mapping network's ODE, integrated by the classical Runge-Kutta method through all requested times in one launch.

No row of the batch influences another. So each program integrates a block of rows alone, from the first time to the
last, and only its own threads wait for each other. PyTorch twin: spigan/ops/rk4_mlp.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .philox_normal import log_positive

SLOTS = (8, 64)
"""Numbers of intervals for which a kernel is compiled. Intervals are arguments of the kernel, not a tensor, so that
a call neither copies to the device nor waits for it, and a captured CUDA graph owns what it replays."""


@triton.jit
def log1p_exp(x):
    """Compute ln(1 + e^x) of float32 x <= 0."""
    u = tl.exp(x)
    w = 1.0 + u
    # Second term: what rounding 1 + u lost, divided by w to sufficient accuracy. It also propagates NaN.
    return log_positive(w) + (u - (w - 1.0)) * (1.0 - 0.5 * u)


@triton.jit
def tanh(x):
    """Compute tanh of float32 x, by Cephes' polynomial where the difference from 1 would cancel."""
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    large = 1.0 - 2.0 * e / (1.0 + e)
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, p * z * x + x, tl.where(x < 0.0, -large, large))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Apply the activation to float32 x."""
    if ACTIVATION == "silu":
        e = tl.exp(-tl.abs(x))
        return x * tl.where(x < 0.0, e, 1.0) / (1.0 + e)
    elif ACTIVATION == "lrelu":
        return tl.where(x > 0.0, x, 0.2 * x)
    elif ACTIVATION == "tanh":
        return tanh(x)
    else:
        return tl.where(x < 0.0, 0.0, x) + log1p_exp(-tl.abs(x))


@triton.jit
def linear(
    p_x,  # [BLOCK_N, D]
    p_weight,  # [D, D] (out, in)
    p_bias,  # [D]
    p_time_weight,  # [D]
    t,
    o_m,  # [BLOCK_M]
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute columns o_m of x weight^T + bias + t time_weight: float32 [BLOCK_N, BLOCK_M]."""
    o_k = tl.arange(0, BLOCK_K)
    p_x += tl.arange(0, BLOCK_N)[:, None] * D + o_k[None, :]
    p_weight += o_m[None, :] * D + o_k[:, None]  # [BLOCK_K, BLOCK_M]
    b_y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, D, BLOCK_K):
        b_y = tl.dot(tl.load(p_x), tl.load(p_weight), b_y, input_precision="ieee")
        p_x += BLOCK_K
        p_weight += BLOCK_K
    b_bias = tl.load(p_bias + o_m).to(tl.float32) + t * tl.load(p_time_weight + o_m).to(tl.float32)
    return b_y + b_bias[None, :]


@triton.jit(do_not_specialize=["N", "L"])
def rk4_mlp_kernel(
    out,  # [intervals or steps, N, D]
    h0,  # [N, D]
    weight,  # [L, D, D] (out, in)
    bias,  # [L, D]
    time_weight,  # [L, D]
    layer_io,  # [programs, 2, BLOCK_N, D] scratch, dtype of the weights: layer l reads half l % 2 and writes the other
    state,  # [programs, 3, BLOCK_N, D] float32 scratch: h, weighted sum of the step's slopes, last slope
    N,
    L,
    D,
    starts,  # floats, one for each interval
    lengths,
    counts,  # floats too: Triton would recompile for some integers
    EVERY_STEP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,  # divides D
    BLOCK_K: tl.constexpr,  # divides D
    BLOCK_E: tl.constexpr,
):
    """One program integrates `BLOCK_N` rows; its threads exchange values through its scratch, ordered by barriers."""
    i_n = tl.program_id(0).to(tl.int64)
    numel = BLOCK_N * D
    rows_numel = tl.minimum((N - i_n * BLOCK_N) * D, numel)  # of rows that exist; those past N are computed from zeros
    h0 += i_n * numel
    out += i_n * numel
    layer_io += i_n * (2 * numel)
    p_h = state + i_n * (3 * numel)
    p_sum = p_h + numel
    p_slope = p_sum + numel

    for e in range(0, numel, BLOCK_E):
        o_e = e + tl.arange(0, BLOCK_E)
        b_h = tl.load(h0 + o_e, mask=o_e < rows_numel, other=0.0)
        tl.store(p_h + o_e, b_h.to(tl.float32), mask=o_e < numel)
        tl.store(layer_io + o_e, b_h, mask=o_e < numel)
    tl.debug_barrier()

    for k in range(len(starts)):
        start, dt, count = starts[0], lengths[0], counts[0]
        for j in tl.static_range(1, len(starts)):
            start = tl.where(k == j, starts[j], start)
            dt = tl.where(k == j, lengths[j], dt)
            count = tl.where(k == j, counts[j], count)
        steps = count.to(tl.int32)
        for step in range(steps):
            wanted = EVERY_STEP or step == steps - 1
            for stage in range(4):
                last = stage == 3
                node = tl.where(stage == 0, 0.0, tl.where(last, 1.0, 0.5))
                t = start + (step + node) * dt
                for layer in range(L):
                    p_x = layer_io + (layer % 2) * numel
                    p_y = layer_io + (1 - layer % 2) * numel
                    p_weight = weight + layer * D * D
                    p_bias = bias + layer * D
                    p_time_weight = time_weight + layer * D
                    for m in range(0, D, BLOCK_M):
                        o_m = m + tl.arange(0, BLOCK_M)
                        o_y = tl.arange(0, BLOCK_N)[:, None] * D + o_m[None, :]
                        b_y = linear(p_x, p_weight, p_bias, p_time_weight, t, o_m, D, BLOCK_N, BLOCK_M, BLOCK_K)
                        if layer < L - 1:
                            tl.store(p_y + o_y, activate(b_y, ACTIVATION).to(p_y.dtype.element_ty))
                        else:
                            tl.store(p_slope + o_y, b_y)
                    tl.debug_barrier()

                # The slope takes h to where the next stage evaluates the field; the last slope completes the step. This
                # is separate from the last layer's product: together they would need more registers than exist.
                slope_weight = tl.where((stage == 0) | last, 1.0, 2.0)
                advance = tl.where(stage == 2, dt, 0.5 * dt)
                sum_numel = tl.where(stage == 0, 0, numel)
                h_numel = tl.where(last, numel, 0)
                out_numel = tl.where(last and wanted, rows_numel, 0)
                for e in range(0, numel, BLOCK_E):
                    o_e = e + tl.arange(0, BLOCK_E)
                    m_e = o_e < numel
                    b_slope = tl.load(p_slope + o_e, mask=m_e, other=0.0)
                    b_sum = tl.load(p_sum + o_e, mask=o_e < sum_numel, other=0.0) + slope_weight * b_slope
                    b_h = tl.load(p_h + o_e, mask=m_e, other=0.0)
                    b_h += tl.where(last, (dt / 6.0) * b_sum, advance * b_slope)
                    tl.store(p_sum + o_e, b_sum, mask=m_e)
                    tl.store(p_h + o_e, b_h, mask=o_e < h_numel)
                    tl.store(layer_io + o_e, b_h.to(layer_io.dtype.element_ty), mask=m_e)
                    tl.store(out + o_e, b_h.to(out.dtype.element_ty), mask=o_e < out_numel)
                tl.debug_barrier()
            if wanted:
                out += tl.cast(N, tl.int64) * D


class Blocks(NamedTuple):
    """How the work is divided."""

    rows: int  # BLOCK_N: of one program
    columns: int  # BLOCK_M: of a layer's output, at a time
    depth: int  # BLOCK_K: of a layer's input, at a time
    warps: int


def choose_blocks(rows: int, dim: int, dtype: torch.dtype, processors: int) -> Blocks:
    """Choose the block sizes for a batch [rows, dim] on a GPU with that many multiprocessors.

    Every program reads all weights for each evaluation of the field. 16 rows, the minimum of a matrix instruction, give
    the most programs, which together have the most bandwidth. If those would not all run at once, 64 rows, the minimum
    of sm_90's wgmma, use each weight more often. Float32 is limited by its multiplications (exact ones, not TF32), not
    by its reads: there, 64 rows are used only once they fill the GPU.
    """
    half = dtype != torch.float32
    block_n = 64 if rows > (16 if half else 64) * processors else 16
    # Tiles of the weights have at most 32 KiB, so that two or three are in flight. They divide D, so that no masks are
    # needed; if D is not a multiple of 64, they are small and slow.
    divisor = dim & -dim  # largest power of two
    columns = min(divisor, 256 if half or block_n == 16 else 128)
    depth = min(divisor, 64 if half else 32)
    return Blocks(block_n, columns, depth, warps=8 if columns >= 128 else 4)


def rk4_mlp(
    out: torch.Tensor,
    h0: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    time_weight: torch.Tensor,
    intervals: tuple[tuple[float, float, int], ...],
    every_step: bool,
    activation: str,
) -> None:
    """Integrate dh/dt = r(h, t) from h0; r is `spigan.ops.rk4_mlp.mlp_vector_field`.

    h, slopes and sums are float32 for every dtype. Products of half types have operands of that type and are summed in
    float32.

    Args:
        out: result, [K, N, D] at the intervals' ends, or with `every_step` [sum of counts, N, D] after each step. All
            tensors are contiguous, on one device and of one dtype: float32, bfloat16 or float16.
        h0: [N, D]; D is a multiple of 16, at most 1024.
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D].
        intervals: K <= 64 times (start, step length, count of steps), each starting where the one before ended.
        every_step: write the state after every step, not only at the intervals' ends.
        activation: "silu", "lrelu" (slope 0.2), "tanh" or "softplus".
    """
    rows, dim = h0.shape
    if out.numel() == 0:
        return
    processors = torch.cuda.get_device_properties(h0.device).multi_processor_count if h0.is_cuda else 1
    blocks = choose_blocks(rows, dim, h0.dtype, processors)
    programs = triton.cdiv(rows, blocks.rows)
    layer_io = h0.new_empty(programs, 2, blocks.rows, dim)
    state = h0.new_empty(programs, 3, blocks.rows, dim, dtype=torch.float32)
    slots = next(s for s in SLOTS if len(intervals) <= s)
    intervals += ((0.0, 0.0, 0),) * (slots - len(intervals))
    rk4_mlp_kernel[(programs,)](
        out,
        h0,
        weight,
        bias,
        time_weight,
        layer_io,
        state,
        rows,
        weight.shape[0],
        dim,
        tuple(start for start, _, _ in intervals),
        tuple(length for _, length, _ in intervals),
        tuple(float(count) for _, _, count in intervals),
        EVERY_STEP=every_step,
        ACTIVATION=activation,
        BLOCK_N=blocks.rows,
        BLOCK_M=blocks.columns,
        BLOCK_K=blocks.depth,
        BLOCK_E=512 * blocks.warps,  # 16 elements for each thread
        num_warps=blocks.warps,
        num_stages=3,
        # The most a thread can have: without a bound, ptxas spills some to fit two programs on a multiprocessor.
        maxnreg=255,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )
