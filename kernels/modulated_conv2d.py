"""The convolution of a StyleGAN2 layer as an implicit matrix product with the end of the layer in its epilogue.

Only the layer's input, weights and result pass through memory.

Rows of the product are pixels of the result, of all images; columns are output channels; the sum is over taps and input
channels. PyTorch twin: spigan/ops/frozen_layer.py.

ESTIMATE for an H200, not measured: a tile of 128 x 256 in bfloat16 loads 48 KiB from the L2 cache for 2.1 M products.
At 30 bytes per clock and multiprocessor, from an L2 cache that provides about 7 TB/s, that is 1600 clocks. The matrix
unit takes 1024, so it reaches about 60 % of its rate, or 500 to 600 TFLOP/s. Exact float32 has at most 67 TFLOP/s.
"""

# ruff: noqa: E741 -- I and O are input and output channels, as everywhere in the project.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .layer_end import add_partial_sums, layer_end, of_images, partial_sums, store_rgb


@triton.jit
def products(
    x,  # [N, H, W, I]
    weight,  # [KERNEL, KERNEL, O, I]
    o_n,  # int64 image, or [BLOCK_M] images
    o_y,  # [BLOCK_M] row of x that the first tap meets; far outside of x where there is no pixel
    o_x,  # [BLOCK_M] column
    o_c,  # [BLOCK_O] output channels
    H,
    W,
    I,
    O,
    first_y,  # row of the weight's first tap
    first_x,
    taps_y,  # rows of taps
    taps_x,
    KERNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # every other tap, each of which meets the row of x before the last tap's
    WHOLE: tl.constexpr,  # BLOCK_I divides I
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Multiply pixels and weights, summed over taps and input channels: float32 [BLOCK_M, BLOCK_O]."""
    STEP: tl.constexpr = 2 if TRANSPOSED else 1
    SIGN: tl.constexpr = -1 if TRANSPOSED else 1
    o_i = tl.arange(0, BLOCK_I)
    m_c = o_c < O
    p_x = x + ((o_n * H + o_y) * W + o_x) * I
    p_weight = weight + o_c.to(tl.int64)[None, :] * I + o_i[:, None]
    b_y = tl.zeros([BLOCK_M, BLOCK_O], tl.float32)
    taps = taps_y * taps_x
    # Taps are the inner loop: they read almost the same pixels, which are then still in the cache.
    for step in range(taps * tl.cdiv(I, BLOCK_I)):
        tap = step % taps
        i = step // taps * BLOCK_I
        tap_y = tap // taps_x
        tap_x = tap % taps_x
        y = o_y + SIGN * tap_y
        column = o_x + SIGN * tap_x
        m_x = ((y >= 0) & (y < H) & (column >= 0) & (column < W))[:, None]
        m_weight = m_c[None, :]
        if not WHOLE:
            m_x &= (i + o_i < I)[None, :]
            m_weight &= (i + o_i < I)[:, None]
        o_tap = SIGN * (tap_y.to(tl.int64) * W + tap_x) * I + i
        o_weight = ((first_y + STEP * tap_y) * KERNEL + first_x + STEP * tap_x).to(tl.int64) * O * I + i
        b_x = tl.load(p_x[:, None] + (o_tap + o_i)[None, :], mask=m_x, other=0.0)
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)
        b_y = tl.dot(b_x, b_weight, b_y, input_precision=PRECISION)
    return b_y


@triton.jit(do_not_specialize=["N", "H", "W", "height", "width", "noise_stride"])
def conv2d_kernel(
    out,  # [N, height, width, O], or None
    rgb,  # [channel tiles, N, height, width, R] float32, or None
    x,  # [N, H, W, I]
    weight,  # [KERNEL, KERNEL, O, I]
    factor,  # [N, O] float32, or None
    noise,  # float32, or None
    seed,  # [1] int64, or None
    strength,  # [1] float32, or None
    bias,  # [O] or [N, O] float32, or None
    next_factor,  # [N, O] float32, or None
    rgb_weight,  # [N, R, O] float32, or None
    N,
    H,
    W,
    I,
    O,
    height,
    width,
    noise_stride,  # from one image's noise to the next one's
    slope,
    gain,
    clamp,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    ONE_IMAGE: tl.constexpr,  # a program's pixels are of one image
    BIAS_OF_IMAGE: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program computes BLOCK_M pixels in BLOCK_O channels."""
    # Programs that run together share few pixels and all weights, which the L2 cache then holds.
    tiles_o = tl.cdiv(O, BLOCK_O)
    i_o = tl.program_id(0) % tiles_o
    o_c = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_c = o_c < O
    i_m = (tl.program_id(0) // tiles_o).to(tl.int64)
    pixels = height * width
    if ONE_IMAGE:
        tiles = tl.cdiv(pixels, BLOCK_M)
        o_n = i_m // tiles
        o_p = (i_m % tiles).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_e = o_p < pixels
        o_images = o_n
    else:
        first = i_m * BLOCK_M
        o_n = first // pixels
        o_p = (first - o_n * pixels).to(tl.int32) + tl.arange(0, BLOCK_M)
        o_n += o_p // pixels
        o_p %= pixels
        m_e = o_n < N
        o_n = tl.minimum(o_n, N - 1)
        o_images = o_n[:, None]
    o_e = o_n * pixels + o_p
    o_y = tl.where(m_e, o_p // width - PADDING, -KERNEL)
    o_x = o_p % width - PADDING
    b_v = products(
        x, weight, o_n, o_y, o_x, o_c, H, W, I, O, 0, 0, KERNEL, KERNEL,
        KERNEL, False, WHOLE, PRECISION, BLOCK_M, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    o_noise = o_n * noise_stride + o_p
    b_v = layer_end(
        b_v, o_images, o_e, o_noise, m_e, o_c, m_c, O,
        factor, noise, seed, strength, bias, slope, gain, clamp, BIAS_OF_IMAGE,
    )  # fmt: skip
    if rgb is not None:
        p_rgb = rgb + i_o * (tl.cast(N, tl.int64) * pixels * R)
        store_rgb(p_rgb, rgb_weight, b_v, o_images, o_e, m_e, o_c, m_c, O, R)
    if out is not None:
        if next_factor is not None:
            b_v *= of_images(next_factor, o_images, o_c, m_c, O)
        p_out = out + o_e[:, None] * O + o_c[None, :]
        tl.store(p_out, b_v.to(out.dtype.element_ty), mask=m_e[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["N", "H", "W"])
def transposed_conv2d_kernel(
    y,  # [N, 2 H + KERNEL - 2, 2 W + KERNEL - 2, O]
    x,  # [N, H, W, I]
    weight,  # [KERNEL, KERNEL, O, I]
    N,
    H,
    W,
    I,
    O,
    KERNEL: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program computes BLOCK_M pixels in BLOCK_O channels. Their rows are all even or all odd, like their columns.

    Pixel 2 h + t of y is the product of pixel h of x and tap t: even pixels have the even taps, odd ones the odd taps.
    """
    odd_y = tl.program_id(1) // 2
    odd_x = tl.program_id(1) % 2
    height = 2 * H + KERNEL - 2
    width = 2 * W + KERNEL - 2
    rows = (height + 1 - odd_y) // 2
    columns = (width + 1 - odd_x) // 2
    pixels = rows * columns
    tiles_o = tl.cdiv(O, BLOCK_O)
    o_c = tl.program_id(0) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    first = (tl.program_id(0) // tiles_o).to(tl.int64) * BLOCK_M
    if first >= tl.cast(N, tl.int64) * pixels:  # the grid is for the even pixels, the most of the four kinds
        return
    o_n = first // pixels
    o_p = (first - o_n * pixels).to(tl.int32) + tl.arange(0, BLOCK_M)
    o_n += o_p // pixels
    o_p %= pixels
    m_e = o_n < N
    o_r = o_p // columns
    o_w = o_p % columns
    b_y = products(
        x, weight, o_n, tl.where(m_e, o_r, -1), o_w, o_c, H, W, I, O,
        odd_y, odd_x, (KERNEL + 1 - odd_y) // 2, (KERNEL + 1 - odd_x) // 2,
        KERNEL, True, WHOLE, PRECISION, BLOCK_M, BLOCK_O, BLOCK_I,
    )  # fmt: skip
    o_e = (o_n * height + 2 * o_r + odd_y) * width + 2 * o_w + odd_x
    p_y = y + o_e[:, None] * O + o_c[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_e[:, None] & (o_c < O)[None, :])


class Blocks(NamedTuple):
    """How the work is divided."""

    pixels: int  # BLOCK_M
    channels: int  # BLOCK_O
    depth: int  # BLOCK_I: input channels at a time
    warps: int
    stages: int  # tiles of x and weight in flight
    one_image: bool  # a program's pixels are of one image


# (pixels, channels, warps): for half types and TF32, and for exact float32, which is limited by its multiplications.
MATRIX_UNIT = ((128, 256, 8), (128, 128, 8), (64, 128, 4), (64, 64, 4), (64, 32, 4))
EXACT = ((128, 64, 8), (64, 64, 4), (32, 64, 4), (32, 32, 4))
SEVERAL_IMAGES = 64 * 64
"""Numbers in the largest tile whose pixels may be of several images: the factors of each take registers."""

UNALIGNED = 64 * 32
"""Numbers in the largest tile without loads of 16 bytes: each number then takes registers for its address."""

STAGES_BYTES = 144 * 1024
"""Shared memory for the tiles in flight; sm_80 has 163 KiB."""


def choose_blocks(
    images: int, pixels: int, channels_out: int, channels_in: int, bits: int, exact: bool, widest: int, processors: int
) -> Blocks:
    """Choose the block sizes for a product [images pixels, channels_in k k] by [channels_in k k, channels_out].

    The bytes that a step of the sum loads, and so its time, grow as the sum of a tile's sides. The chosen tile takes
    the least time, given the rounds that the GPU's multiprocessors need for all tiles.

    Args:
        bits: Of a number.
        exact: The matrix unit is not used.
        widest: Most channels of a tile.
        processors: Multiprocessors of the GPU.
    """
    unaligned = channels_in * bits % 128 != 0

    def possible(tile: tuple[int, int, int], one_image: bool) -> bool:
        numbers, channels = tile[0] * tile[1], tile[1]
        if unaligned and numbers > (UNALIGNED // 2 if exact else UNALIGNED):
            return False
        return channels <= widest and (one_image or numbers <= SEVERAL_IMAGES)

    def time(choice: tuple[tuple[int, int, int], bool]) -> int:
        (block_m, block_o, _), one_image = choice
        tiles_m = images * triton.cdiv(pixels, block_m) if one_image else triton.cdiv(images * pixels, block_m)
        rounds = triton.cdiv(tiles_m * triton.cdiv(channels_out, block_o), processors)
        return rounds * (block_m + block_o)

    tiles = EXACT if exact else MATRIX_UNIT
    choices = [(tile, one_image) for one_image in (True, False) for tile in tiles if possible(tile, one_image)]
    (block_m, block_o, warps), one_image = min(choices, key=time)
    depth = min(max(triton.next_power_of_2(channels_in), 16), 16 if exact or unaligned else 1024 // bits)
    stages = STAGES_BYTES * 8 // ((block_m + block_o) * depth * bits)
    return Blocks(block_m, block_o, depth, warps, min(6, stages), one_image)


def properties(device: torch.device) -> tuple[int, int]:
    """Return (major compute capability, multiprocessors); (0, 1) on the CPU, for Triton's interpreter."""
    if device.type != "cuda":
        return 0, 1
    found = torch.cuda.get_device_properties(device)
    return found.major, found.multi_processor_count


def blocks_for(images: int, pixels: int, x: torch.Tensor, weight: torch.Tensor, rgb: bool, tf32: bool) -> Blocks:
    """Choose the block sizes for `pixels` pixels of each image."""
    channels_out, channels_in = weight.shape[2:]
    exact = x.dtype == torch.float32 and not tf32
    capability, processors = properties(x.device)
    # The widest tile is only for sm_90, whose operands take no registers, and only without sums over channels.
    widest = 256 if capability >= 9 and x.dtype != torch.float32 and not rgb else 128
    widest = min(widest, max(32, triton.next_power_of_2(channels_out)))
    bits = 8 * x.element_size()
    return choose_blocks(images, pixels, channels_out, channels_in, bits, exact, widest, processors)


def conv2d(
    out: torch.Tensor | None,
    rgb: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    factor: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    strength: torch.Tensor | None,
    bias: torch.Tensor | None,
    next_factor: torch.Tensor | None,
    rgb_weight: torch.Tensor | None,
    *,
    padding: int,
    slope: float,
    gain: float,
    clamp: float,
    tf32: bool = False,
) -> None:
    """Compute out = next_factor clamp(gain act(factor conv(x, weight) + strength noise + bias)), rounded once.

    Args:
        out: [N, H', W', O] result, H' = H + 2 padding - k + 1, or None if only `rgb` is wanted; H' W' < 2^30. All
            tensors are contiguous, on one device, and float32 unless stated otherwise.
        x: [N, H, W, I] float32, bfloat16 or float16, already scaled by the style.
        weight: [k, k, O, I], of x's dtype; correlated as by `torch.nn.functional.conv2d`.
        padding: Zeros around x.
        tf32: Round the float32 factors of products to TF32. The sums are float32.
        factor, ..., clamp: See `spigan.kernels.fir_bias_act.fir_bias_act`.
    """
    size = out if out is not None else rgb
    if size is None or size.numel() == 0:
        return
    n, height, width, _ = size.shape
    pixels, channels_out = height * width, weight.shape[2]
    blocks = blocks_for(n, pixels, x, weight, rgb is not None, tf32)
    tiles_m = triton.cdiv(pixels, blocks.pixels) * n if blocks.one_image else triton.cdiv(n * pixels, blocks.pixels)
    tiles_o = triton.cdiv(channels_out, blocks.channels)
    sums = partial_sums(rgb, tiles_o)
    conv2d_kernel[(tiles_m * tiles_o,)](
        out, sums, x, weight, factor, noise, seed, strength, bias, next_factor, rgb_weight,
        n, *x.shape[1:], channels_out, height, width, 0 if noise is None or noise.shape[0] == 1 else pixels,
        float(slope), float(gain), float(clamp),
        KERNEL=weight.shape[0],
        PADDING=padding,
        ONE_IMAGE=blocks.one_image,
        BIAS_OF_IMAGE=bias is not None and bias.ndim == 2,
        R=0 if rgb is None else rgb.shape[3],
        WHOLE=x.shape[3] % blocks.depth == 0,
        PRECISION="tf32" if tf32 else "ieee",
        BLOCK_M=blocks.pixels,
        BLOCK_O=blocks.channels,
        BLOCK_I=blocks.depth,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )  # fmt: skip
    add_partial_sums(rgb, sums)


def transposed_conv2d(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, tf32: bool = False) -> None:
    """Compute the stride-2 transposed convolution of `torch.nn.functional.conv_transpose2d` without padding.

    Args:
        y: [N, 2 H + k - 2, 2 W + k - 2, O] result; fewer than 2^30 pixels per image.
        x: [N, H, W, I] float32, bfloat16 or float16; all tensors are contiguous, on one device and of one dtype.
        weight: [k, k, O, I].
        tf32: See `conv2d`.
    """
    if y.numel() == 0:
        return
    n, height, width, channels_out = y.shape
    most = triton.cdiv(height, 2) * triton.cdiv(width, 2)  # pixels of an image whose row and column are even
    # Tiles may span images, because no factor depends on the image.
    blocks = blocks_for(1, 4 * n * most, x, weight, False, tf32)
    tiles = triton.cdiv(n * most, blocks.pixels) * triton.cdiv(channels_out, blocks.channels)
    transposed_conv2d_kernel[(tiles, 4)](
        y,
        x,
        weight,
        n,
        *x.shape[1:],
        channels_out,
        KERNEL=weight.shape[0],
        WHOLE=x.shape[3] % blocks.depth == 0,
        PRECISION="tf32" if tf32 else "ieee",
        BLOCK_M=blocks.pixels,
        BLOCK_O=blocks.channels,
        BLOCK_I=blocks.depth,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        enable_fp_fusion=True,  # for speed; stated because Triton's default differs between versions
    )
