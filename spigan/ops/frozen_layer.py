"""A layer without gradients: one convolution of the library or of our own, and one pass that ends the layer.

Explained in docs/kernels.md, "A layer without gradients". Twins: kernels/modulated_conv2d.py,
csrc/cpu/modulated_conv2d.cpp.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops.convolution import convolution, fir_padding, result_size
from spigan.ops.layer_end import Fir, LayerEnd, channels_last, finish_layer, wide
from spigan.ops.layer_weights import LayerWeight
from spigan.ops.library import launch, on
from spigan.ops.noise import draw_noise

# Values of the left factor of a matrix product: all of the 16 products stay in the last-level cache (512 channels:
# 256 tiles, 8 MB left factor, 8 MB result, 17 MB weights).
WINOGRAD_CHUNK = 256 * 512
# Values of a matrix product of an upsampling layer: its result stays in the last-level cache (9 MB float32).
PRODUCTS_CHUNK = 512 * 9 * 512
# Multiply-adds of a matrix product from which oneDNN's is faster than MKL's, which torch.bmm calls in float32: on AMD's
# processors MKL's runs at half the rate (2 cores with AVX-512, 512 channels, 256 tiles: 376 against 196 GFLOP/s,
# 2026-11-25).
ONEDNN_MIN_PRODUCTS = 1 << 22
# Bytes of a result that are worth a separate convolution when a batch is convolved in parts to save memory.
MIN_PART_BYTES = 1 << 21
# The same on a GPU, where smaller parts would leave multiprocessors idle at the end of each convolution.
GPU_PART_BYTES = 1 << 30

# oneDNN's matrix product of float32 [T, I] and [O, I], as torch.compile calls it; None if PyTorch was built without it.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def frozen_modulated_conv2d(
    backend: str,
    x: Tensor,
    weight: LayerWeight,
    end: LayerEnd,
    *,
    style: Tensor | None,
    up: int,
    padding: int,
    filter: Tensor,
    keep: bool = True,
    part_bytes: int = GPU_PART_BYTES,
) -> tuple[Tensor | None, Tensor | None]:
    """Run a layer without gradients, on tensors that have been checked.

    Args:
        backend: "cpp", "triton" or "cuda".
        x: [N, H, W, I] contiguous: a channels-last image.
        weight: The layer's weights.
        end: What follows the convolution; with `rgb_weight`, a ToRGB layer is computed too.
        style: wide [N, I]; None if x has already been scaled by it.
        up, padding: See `modulated_conv2d`.
        filter: float32 [m, m], of up = 2.
        keep: False if only the ToRGB layer needs the result.
        part_bytes: See `images_at_a_time`.

    Returns:
        [N, H', W', O] in the dtype of x, or None without `keep`; and float32 [N, H', W', R], or None without
        `rgb_weight`.
    """
    n, height, width, _ = x.shape
    size = result_size(height, width, weight.kernel, up, padding)
    rgb = None if end.rgb_weight is None else x.new_empty((n, *size, end.rgb_weight.shape[1]), dtype=torch.float32)
    if n == 0:
        return x.new_empty((n, *size, weight.channels)) if keep else None, rgb
    fused = weight.form == "taps" and up == 1
    part = n  # images at a time
    if not fused and (up == 2 or not keep):  # the convolution's own result does not become the layer's in place
        part = images_at_a_time(backend, n, size[0] * size[1] * weight.channels * x.dtype.itemsize, part_bytes)
    with on(x.device):
        if end.seed is not None and (part < n or weight.form in ("winograd", "products")):
            # In a part, the stream would start again.
            end = replace(end, noise=wide(draw_noise(end.seed, n, size, backend), x.dtype), seed=None)
        if style is not None and weight.form not in ("modulated", "winograd"):
            x = _scaled(backend, x, style)
        if weight.form in ("winograd", "products") or fused:
            out = x.new_empty((n, *size, weight.channels)) if keep else None
            if weight.form == "winograd":
                _winograd(x, weight, end, style, out, rgb)
            elif weight.form == "products":
                _products(x, weight, end, out, rgb, padding, filter)
            else:
                _fused(x, weight, end, out, rgb, padding)
            return out, rgb
        fir = None
        if up == 2:
            fir = Fir(filter=filter, pad=fir_padding(weight.kernel, filter.shape[-1], padding)[0], gain=4.0)
        return _in_parts(backend, x, weight, end, style, fir, padding, size, part, keep, rgb), rgb


def images_at_a_time(backend: str, n: int, image_bytes: int, part_bytes: int = GPU_PART_BYTES) -> int:
    """Return how many of n images are convolved at a time if the result is only a temporary.

    On the CPU it is a quarter of them, so that memory holds the input, the result and at most a quarter of another
    result. On a GPU it is all of them, or as many as keep the temporary result within `part_bytes`.

    Args:
        backend: "cpp", "triton" or "cuda".
        n: Number of images, at least 1.
        image_bytes: Size of the result for one image.
        part_bytes: Largest temporary result on a GPU.
    """
    if backend == "cpp":
        return min(n, max(-(-n // 4), -(-MIN_PART_BYTES // image_bytes)))
    parts = min(n, -(-n * image_bytes // part_bytes))
    return -(-n // parts)


def _scaled(backend: str, x: Tensor, style: Tensor) -> Tensor:
    scaled = torch.empty_like(x)
    finish_layer(backend, scaled, x, LayerEnd(factor=style))
    return scaled


def _in_parts(
    backend: str, x: Tensor, weight: LayerWeight, end: LayerEnd, style: Tensor | None, fir: Fir | None, padding: int,
    size: tuple[int, int], part: int, keep: bool, rgb: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Convolve `part` images at a time and end the layer of each part."""
    n = x.shape[0]
    out = x.new_empty((n, *size, weight.channels)) if keep and fir is not None else None
    for first in range(0, n, part):
        images = slice(first, first + part)
        y = _convolved(x[images], weight, None if style is None else style[images], fir, padding)
        if keep and fir is None:
            out = y  # the layer ends in place, and there is one part
        finish_layer(
            backend,
            None if out is None else out[images],
            y,
            end.of_images(n, first, y.shape[0]),
            fir=fir,
            rgb=None if rgb is None else rgb[images],
        )
        del y  # before the next one is made
    return out


def _convolved(x: Tensor, weight: LayerWeight, style: Tensor | None, fir: Fir | None, padding: int) -> Tensor:
    """Convolve only: [N, H, W, I] -> [N, H', W', O]; before a FIR filter transposed with stride 2, H' = 2 H + k - 2."""
    n, height, width, _ = x.shape
    if weight.form == "modulated":
        modulated = weight.value if style is None else weight.value * style[:, None]  # [N, O, I]
        return torch.matmul(x.flatten(1, 2), modulated.to(x.dtype).mT).view(n, height, width, weight.channels)
    if weight.form in ("direct", "transposed"):
        value = weight.value if weight.form == "direct" else weight.value.transpose(0, 1)
        return channels_last(convolution(x.permute(0, 3, 1, 2), value, 1 if fir is None else 2, padding))
    from spigan.kernels.modulated_conv2d import transposed_conv2d

    y = x.new_empty((n, 2 * height + weight.kernel - 2, 2 * width + weight.kernel - 2, weight.channels))
    transposed_conv2d(y, x, weight.value)
    return y


def _fused(x: Tensor, weight: LayerWeight, end: LayerEnd, out: Tensor | None, rgb: Tensor | None, padding: int) -> None:
    """Run the layer in one pass, by Triton."""
    from spigan.kernels.modulated_conv2d import conv2d

    result = out if out is not None else rgb
    assert result is not None
    noise = None if end.noise is None else end.noise.view(-1, *result.shape[1:3])
    conv2d(
        out, rgb, x, weight.value, end.factor, noise, end.seed, end.strength, end.bias, end.next_factor, end.rgb_weight,
        padding=padding, **end.pointwise,
    )  # fmt: skip


# ---- Matrix products on the CPU, of a chunk of pixels at a time, which stays in the cache. A chunk consists of some
# images, or of some rows of one. ----


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x [T, I] and weight [O, I] to [T, O], by the faster of the CPU's libraries."""
    large = x.numel() * weight.shape[0] >= ONEDNN_MIN_PRODUCTS
    if x.dtype == torch.float32 and large and _onednn_linear is not None:
        return _onednn_linear(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _end_arguments(
    end: LayerEnd,
    out: Tensor | None,
    rgb: Tensor | None,
    weight: LayerWeight,
    dtype: torch.dtype,
    first: int,
    count: int,
) -> list[object]:
    """Return the last arguments of the kernel that ends the images first, ..., first + count - 1."""
    result = out if out is not None else rgb
    assert result is not None
    images = slice(first, first + count)
    return end.of_images(result.shape[0], first, count).arguments(
        None if out is None else out[images],
        None if rgb is None else rgb[images],
        (count, *result.shape[1:3], weight.channels),
        dtype,
    )


def _winograd(
    x: Tensor, weight: LayerWeight, end: LayerEnd, style: Tensor | None, out: Tensor | None, rgb: Tensor | None
) -> None:
    """Convolve by Winograd's F(2x2, 3x3), which makes 16 matrix products of the 2x2 tiles of the result."""
    n, height, width, channels_in = x.shape
    tile_rows, columns = -(-height // 2), -(-width // 2)
    most = WINOGRAD_CHUNK // max(channels_in, weight.channels)
    chunk = max(1, most // (tile_rows * columns))
    some_rows = tile_rows if chunk > 1 else max(1, min(tile_rows, most // columns))
    tiles = min(chunk, n) * some_rows * columns
    memory = x.new_empty(16 * tiles * channels_in)
    for first, row in itertools.product(range(0, n, chunk), range(0, tile_rows, some_rows)):
        count, rows = min(chunk, n - first), min(some_rows, tile_rows - row)
        tiles = count * rows * columns
        left = memory[: 16 * tiles * channels_in].view(16, tiles, channels_in)
        part, styles = x[first : first + count], None if style is None else style[first : first + count]
        launch("cpp", "winograd_input", left, part, styles, list(part.shape), [row, rows])
        if tiles * channels_in * weight.channels < ONEDNN_MIN_PRODUCTS:
            products = [*torch.bmm(left, weight.value.mT)]  # small: one call for all of them
        else:
            products = [_linear(left[k], weight.value[k]) for k in range(16)]
        launch(
            "cpp",
            "winograd_output",
            [product.data_ptr() for product in products],
            [row, rows],
            *_end_arguments(end, out, rgb, weight, x.dtype, first, count),
        )


def _products(
    x: Tensor, weight: LayerWeight, end: LayerEnd, out: Tensor | None, rgb: Tensor | None, padding: int, filter: Tensor
) -> None:
    """Convolve and upsample by one matrix product of pixels and all taps; the kernel that ends the layer sums them."""
    n, height, width, channels_in = x.shape
    result = out if out is not None else rgb
    assert result is not None
    out_rows = result.shape[1]
    kernel, taps = weight.kernel, filter.shape[-1]
    pad = fir_padding(kernel, taps, padding)[0]
    # Flipped, because the filter is convolved; 4 makes up for the zeros inserted.
    filter_y, filter_x = (4.0 * filter.sum(1)).flip(0).tolist(), filter.sum(0).flip(0).tolist()
    pixels = max(1, PRODUCTS_CHUNK // weight.value.shape[0])
    chunk = max(1, pixels // (height * width))
    some_rows = out_rows if chunk > 1 else max(2, min(out_rows, 2 * (pixels // width)))
    for first, row in itertools.product(range(0, n, chunk), range(0, out_rows, some_rows)):
        count, rows = min(chunk, n - first), min(some_rows, out_rows - row)
        # Row r of the result needs rows r - pad, ..., r - pad + taps - 1 of the transposed convolution, and row a of
        # that needs rows (a - kernel + 1) / 2, ..., a / 2 of x.
        begin = min(height, max(0, -((kernel - 1 - (row - pad)) // 2)))
        stop = min(height, (row + rows - 1 - pad + taps - 1) // 2 + 1)
        part = x[first : first + count, begin:stop]
        y = _linear(part.reshape(-1, channels_in), weight.value)
        y_rows = [begin, max(0, stop - begin)]
        launch(
            "cpp", "finish_products", y, [height, width, kernel], y_rows, pad, filter_y, filter_x, [row, rows],
            *_end_arguments(end, out, rgb, weight, x.dtype, first, count),
        )  # fmt: skip
        del y  # before the next one is made
