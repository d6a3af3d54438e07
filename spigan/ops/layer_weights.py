"""The weights of a layer without gradients, in the form that the fastest way of convolving takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spigan.ops.convolution import has_few_outputs
from spigan.ops.library import launch
from spigan.ops.limits import MAX_PRODUCT_TERMS

# docs/kernels.md has the measurements behind these numbers (two cores of an AVX-512 server CPU).
# Weights that are not kept are transformed in each call. For few tiles that takes longer than Winograd's method saves.
WINOGRAD_MIN_TILES, WINOGRAD_MIN_TILES_KEPT = 512, 64
WINOGRAD_MIN_CHANNELS = 128
# Up = 2: the library's transposed convolution is slow for few pixels and for many channels.
PRODUCTS_MAX_PIXELS, PRODUCTS_MIN_CHANNELS = 2048, 256


@dataclass(frozen=True)
class LayerWeight:
    """The weights of a layer, in the form for one way of convolving.

    Attributes:
        form: "direct" [O, I, k, k], channels-last: the library's convolution.
            "transposed" [I, O, k, k], channels-last: the library's transposed convolution (up = 2 on a GPU), which
            would copy weights in any other layout at each call.
            "products" [k k O, I]: one matrix product for all taps (up = 2 on the CPU).
            "taps" [k, k, O, I]: Triton's convolution.
            "winograd" [16, O, I] float32: Winograd's F(2x2, 3x3) on the CPU.
            "modulated" [O, I], at least float32: scaled for each image, instead of the image.
        value: In the dtype of the images, unless stated otherwise.
        kernel: k.
        channels: O.
    """

    form: str
    value: Tensor
    kernel: int
    channels: int


def separable(filter: Tensor) -> bool:
    """Return whether a [m, m] filter of sum 1 is the outer product of its sums. Reads its values: for CPU tensors."""
    return torch.allclose(torch.outer(filter.sum(1), filter.sum(0)), filter, rtol=0.0, atol=1e-7)


def weight_form(
    backend: str, shape: torch.Size, size: tuple[int, int], dtype: torch.dtype, n: int, up: int, padding: int,
    filter: Tensor, kept: bool = False,
) -> str:  # fmt: skip
    """Return the fastest form of `LayerWeight` for n images.

    Args:
        backend: "cpp", "triton" or "cuda".
        shape: [O, I, k, k] of the weights.
        size: (H', W') of the results.
        dtype: Of the images.
        n: Number of images.
        up, padding, filter: See `modulated_conv2d`.
        kept: The weights are already in that form, or will be kept in it.
    """
    channels_out, channels_in, _, _ = shape
    if backend != "cpp":
        return possible_forms(backend, shape, dtype, up, padding, filter)[0]
    if up == 1:
        tiles = n * -(-size[0] // 2) * -(-size[1] // 2)
        enough = tiles >= (WINOGRAD_MIN_TILES_KEPT if kept else WINOGRAD_MIN_TILES)
        faster = enough and min(channels_in, channels_out) >= WINOGRAD_MIN_CHANNELS
    else:
        faster = n * size[0] * size[1] <= 4 * PRODUCTS_MAX_PIXELS or channels_out >= PRODUCTS_MIN_CHANNELS
    # The filter's values are read only if they matter.
    return possible_forms(backend, shape, dtype, up, padding, filter if faster else None)[-1 if faster else 0]


def possible_forms(
    backend: str, shape: torch.Size, dtype: torch.dtype, up: int, padding: int, filter: Tensor | None
) -> tuple[str, ...]:
    """Return the forms of `LayerWeight` with which `backend` computes a layer, the library's first on the CPU.

    See `weight_form` for the arguments. Without `filter`, forms that depend on its values are left out.
    """
    channels_out, _, kernel, _ = shape
    if has_few_outputs(kernel, padding, up, channels_out):
        return ("modulated",)
    if backend != "cpp":
        library = "transposed" if up == 2 else "direct"
        return (library,) if backend == "cuda" else ("taps", library)
    if up == 1:
        return ("direct", "winograd") if (kernel, padding, dtype) == (3, 1, torch.float32) else ("direct",)
    products = filter is not None and dtype != torch.float64 and kernel * filter.shape[-1] <= MAX_PRODUCT_TERMS
    return ("direct", "products") if products and separable(filter) else ("direct",)  # type: ignore[arg-type]


def prepare_weight(weight: Tensor, form: str, dtype: torch.dtype, backend: str) -> LayerWeight:
    """Convert weight [O, I, k, k] to a form of `LayerWeight` for images of `dtype`."""
    channels_out, channels_in, kernel, _ = weight.shape
    if form == "winograd":
        value = weight.new_empty((16, channels_out, channels_in), dtype=torch.float32)
        whole = weight.to(torch.float32).contiguous()
        launch(backend, "winograd_weight", value, whole, channels_out, channels_in)
    elif form == "modulated":
        value = weight[:, :, 0, 0].to(torch.promote_types(weight.dtype, torch.float32))
    elif form in ("direct", "transposed"):
        whole = weight.to(dtype) if form == "direct" else weight.to(dtype).transpose(0, 1)
        value = whole.contiguous(memory_format=torch.channels_last)
    else:
        value = weight.to(dtype).permute(2, 3, 0, 1).contiguous()
        if form == "products":
            value = value.view(-1, channels_in)
    return LayerWeight(form, value, kernel, channels_out)
