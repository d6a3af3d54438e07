"""From images to the noisy end and the points of the straight path in one pass over memory (the paper's eq. 7).

The noise is drawn in registers.

PyTorch twin: spigan/ops/path_interpolate.py; C++ twin: csrc/common/path.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .philox_normal import BLOCK_PHILOX, NUM_WARPS, philox_normals


@triton.jit(do_not_specialize=["seed", "first_block"])
def path_interpolate_kernel(
    x_T,  # [numel]
    i,  # [K, numel]
    x0,  # [numel]
    noise,  # [numel] float32, or None: drawn
    flips,  # [N] uint8, or None
    numel,
    times,  # K floats t_k
    complements,  # K floats 1 - t_k
    mean_coef,
    std,
    seed: tl.int64,
    first_block: tl.int64,
    SKIP: tl.constexpr,  # numbers of the first Philox block that precede the first element
    IMAGE: tl.constexpr,  # C * H * W
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes the elements of `BLOCK` Philox blocks, 4 neighbours in each thread."""
    i_tile = tl.program_id(0).to(tl.int64)
    start = i_tile * (4 * BLOCK) - SKIP
    o_lane = tl.arange(0, 4 * BLOCK)
    o_e = start + o_lane  # index in x0
    m_e = (o_e >= 0) & (o_e < numel)

    if noise is None:
        b_e = philox_normals(seed, first_block + i_tile * BLOCK + tl.arange(0, BLOCK))
    else:
        b_e = tl.load(noise + o_e, mask=m_e, other=0.0)

    o_x0 = o_e
    if flips is not None:
        # Counted from the tile's first image, positions fit in 32 bits (cheaper to divide) unless an image is huge.
        i_first = tl.maximum(start, 0) // IMAGE
        o_position = o_e - i_first * IMAGE
        if IMAGE < 2**30:
            o_position = o_position.to(tl.int32)
        b_flip = tl.load(flips + i_first + o_position // IMAGE, mask=m_e, other=0)
        o_x0 += tl.where(b_flip != 0, WIDTH - 1 - 2 * (o_position % WIDTH), 0)
    b_x0 = tl.load(x0 + o_x0, mask=m_e, other=0)
    if x0.dtype.element_ty == tl.uint8:
        # v / 127.5 - 1 as (2 v - 255) / 255: the numerator is exact.
        b_x0 = (2 * b_x0.to(tl.int32) - 255).to(tl.float32) * (1.0 / 255.0)
    else:
        b_x0 = b_x0.to(tl.float32)

    b_x_T = mean_coef * b_x0 + std * b_e
    tl.store(x_T + o_e, b_x_T.to(x_T.dtype.element_ty), mask=m_e)
    p_i = i + o_e
    for k in tl.static_range(len(times)):
        tl.store(p_i, (times[k] * b_x0 + complements[k] * b_x_T).to(i.dtype.element_ty), mask=m_e)
        p_i += numel


def path_interpolate(
    x_T: torch.Tensor,
    i: torch.Tensor,
    x0: torch.Tensor,
    noise: torch.Tensor | None,
    flips: torch.Tensor | None,
    times: tuple[float, ...],
    mean_coef: float,
    std: float,
    seed: int,
    offset: int,
) -> None:
    """Compute x_T = mean_coef x_0 + std e and i_k = t_k x_0 + (1 - t_k) x_T, in float32; x_0 is read once.

    Args:
        x_T: [N, C, H, W] result, float32, bfloat16 or float16; all tensors are contiguous and on one device.
        i: [K, N, C, H, W] result, the dtype of `x_T`.
        x0: [N, C, H, W] uint8 (v means v / 127.5 - 1), float32, bfloat16 or float16.
        noise: [N, C, H, W] float32 e, or None to draw e: elements offset, offset + 1, ... of the stream of `seed`.
        flips: [N] bool or uint8: an image is mirrored along W (its noise is not) if not 0; None mirrors none.
        times: K times t_k.
        mean_coef: coefficient of the image at the noisy end.
        std: coefficient of the noise there.
        seed: key of the noise, in [0, 2^63).
        offset: index in the stream of the first element's noise, in [0, 2^63).
    """
    numel = x0.numel()
    if numel == 0:
        return
    # Given noise need not be aligned with Philox blocks.
    first_block, skip = divmod(offset, 4) if noise is None else (0, 0)
    path_interpolate_kernel[(triton.cdiv(skip + numel, 4 * BLOCK_PHILOX),)](
        x_T,
        i,
        x0,
        noise,
        None if flips is None else flips.view(torch.uint8),
        numel,
        times,
        tuple(1.0 - t for t in times),
        mean_coef,
        std,
        seed,
        first_block,
        SKIP=skip,
        # Compile-time constants, which turn divisions into multiplications; only mirrored images need them.
        IMAGE=1 if flips is None else numel // x0.shape[0],
        WIDTH=1 if flips is None else x0.shape[3],
        BLOCK=BLOCK_PHILOX,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )
