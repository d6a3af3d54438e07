"""Standard normals of the Philox4x32-10 streams of `spigan.ops.philox_normal`, and the device functions that draw them.

PyTorch twin: spigan/ops/philox_normal.py; C++ twin: csrc/common/philox.h and csrc/common/math.h.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_PHILOX = 256
"""Philox blocks of four numbers that one program draws: one per thread, which then owns 4 neighbouring elements, the 16
bytes of the widest float32 store."""

NUM_WARPS = BLOCK_PHILOX // 32


@triton.jit
def philox4x32_10(c0, c1, k0, k1):
    """Apply ten rounds of Philox4x32 to the uint32 counters (c0, c1, 0, 0) under the key (k0, k1)."""
    c2 = c0 * 0
    c3 = c0 * 0
    for _ in tl.static_range(10):
        # One 64-bit multiplication gives both words.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def log_positive(x):
    """Compute ln x of positive normal float32 x, within 2 ulp, by Cephes' polynomial on [sqrt(1/2), sqrt(2))."""
    # Moved so that the exponent changes at sqrt(1/2): x = 2^n (1 + m).
    b_shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    n = (b_shifted >> 23).to(tl.float32)
    m = ((b_shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    p = 7.0376836292e-2 * m - 1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m - 1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m - 1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m - 2.4999993993e-1
    p = p * m + 3.3333331174e-1
    y = p * m * z - n * 2.12194440e-4 - 0.5 * z
    return n * 0.693359375 + (m + y)


@triton.jit
def cos_sin_of_turn(u):
    """Compute cos(2 pi u) and sin(2 pi u) of float32 u in [0, 1]; the reduction of u to an eighth of a turn is exact.

    By Cephes' polynomials, because Triton's own functions reserve local memory to reduce large angles.
    """
    quarters = (4.0 * u + 12582912.0) - 12582912.0  # nearest integer: in the sum with 1.5 2^23 the last bit counts 1
    x = (u - 0.25 * quarters) * 6.2831853
    z = x * x
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = s * z - 1.6666654611e-1
    s = s * z * x + x
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z + (1.0 - 0.5 * z)
    q = quarters.to(tl.int32)
    odd = (q & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    return tl.where(((q + 1) & 2) != 0, -cosine, cosine), tl.where((q & 2) != 0, -sine, sine)


@triton.jit
def box_muller(word0, word1):
    """Return two float32 normals from two uint32 words."""
    # 2^-33 keeps the logarithm's argument above 0; the product by a power of two is exact, fused or not.
    u1 = word0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u2 = word1.to(tl.float32) * 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * log_positive(u1))
    cosine, sine = cos_sin_of_turn(u2)
    return radius * cosine, radius * sine


@triton.jit
def philox_normals(seed, o_block):
    """Draw elements 4 b, ..., 4 b + 3 of a seed's stream for the int64 blocks b = o_block [B]: float32 [4 B]."""
    key = seed.to(tl.uint64)
    word0, word1, word2, word3 = philox4x32_10(
        o_block.to(tl.uint32), (o_block >> 32).to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    n0, n1 = box_muller(word0, word1)
    n2, n3 = box_muller(word2, word3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def philox_normals_at(seed, o_element):
    """Draw elements o_element (int64, any shape) of a seed's stream, float32, from one Philox block each.

    This is for tiles with no more elements than threads. A thread then draws one block either way; here the tile may
    begin anywhere, half of the Box-Muller transforms suffice, and the numbers need not be reordered.
    """
    key = seed.to(tl.uint64)
    o_block = o_element >> 2
    word0, word1, word2, word3 = philox4x32_10(
        o_block.to(tl.uint32), (o_block >> 32).to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32)
    )
    first_pair = (o_element & 2) == 0
    even, odd = box_muller(tl.where(first_pair, word0, word2), tl.where(first_pair, word1, word3))
    return tl.where((o_element & 1) == 0, even, odd)


@triton.jit(do_not_specialize=["tiles", "first_block"])
def philox_normal_kernel(
    out,  # [R, M]
    seeds,  # [R] int64
    M,
    tiles,  # programs for each row
    first_block: tl.int64,
    SKIP: tl.constexpr,  # numbers of the first block that precede the row
    BLOCK: tl.constexpr,
):
    """One program draws `BLOCK` Philox blocks of one row."""
    i_row = tl.program_id(0) // tiles
    i_tile = (tl.program_id(0) % tiles).to(tl.int64)
    o_block = i_tile * BLOCK + tl.arange(0, BLOCK)
    b_normal = philox_normals(tl.load(seeds + i_row), first_block + o_block)
    o_m = i_tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - SKIP
    p_out = out + i_row.to(tl.int64) * M + o_m
    tl.store(p_out, b_normal.to(out.dtype.element_ty), mask=(o_m >= 0) & (o_m < M))


def philox_normal(out: torch.Tensor, seeds: torch.Tensor, offset: int) -> None:
    """Fill out[r, j] with element offset + j of the stream of seeds[r].

    Args:
        out: [R, M] float32, bfloat16 or float16, contiguous.
        seeds: [R] int64, contiguous, on the same device.
        offset: index of the first element in every stream, in [0, 2^63).
    """
    rows, row_numel = out.shape
    if out.numel() == 0:
        return
    first_block, skip = divmod(offset, 4)
    tiles = triton.cdiv(skip + row_numel, 4 * BLOCK_PHILOX)
    philox_normal_kernel[(rows * tiles,)](
        out,
        seeds,
        row_numel,
        tiles,
        first_block,
        SKIP=skip,
        BLOCK=BLOCK_PHILOX,
        num_warps=NUM_WARPS,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )
