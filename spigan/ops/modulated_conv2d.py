"""StyleGAN2's layer: modulation, convolution, demodulation, FIR upsampling, noise, bias and activation
(Karras et al. 2020b, "Analyzing and improving the image quality of StyleGAN", section 2.2).

The style scales the input, one convolution with shared weights serves the whole batch, and one pass of `fir_bias_act`
ends the layer. Twins: kernels/modulated_conv2d.py, csrc/cpu/modulated_conv2d.cpp.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from spigan.ops import backends
from spigan.ops.checks import check_index, check_tensor
from spigan.ops.fir_bias_act import (
    channels_last,
    check_noise,
    draw_noise,
    fir_bias_act,
    fir_bias_act_reference,
    launch_fir_bias_act,
    slope_of,
    wide,
)
from spigan.ops.library import address, define, dtype_number, launcher, on, why_transformed
from spigan.ops.upfirdn2d import fir_filter

_EPS = 1e-8  # StyleGAN2's, inside the demodulation's square root


def squared_sums(weight: Tensor) -> Tensor:
    """weight [O, I, k, k] -> [O, I], sums over k x k of its squares, at least in float32: what `demodulation` needs."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum((2, 3))


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """d[n, o] = 1 / sqrt(sum over i, k of (style[n, i] weight[o, i, k])^2 + 1e-8), at least in float32.

    Args:
        weight: [O, I, k, k].
        style: [N, I].

    Returns:
        [N, O].
    """
    return demodulation_of_sums(squared_sums(weight), style)


def demodulation_of_sums(sums: Tensor, style: Tensor) -> Tensor:
    """`demodulation` of weights whose `squared_sums` are known: sums [..., O, I], style [..., N, I] -> [..., N, O]."""
    dtype = torch.promote_types(sums.dtype, style.dtype)
    # A reduced-precision matrix product would put its rounding error on every pixel of a channel alike.
    with torch.autocast(style.device.type, enabled=False):
        power = style.to(dtype).square() @ sums.to(dtype).mT
    return (power + _EPS).rsqrt()


def normalized_weight(weight: Tensor) -> Tensor:
    """weight [O, I, k, k] over its largest magnitude times sqrt(I k k), at least in float32.

    With `normalized_style` and demodulation, which takes both factors out again, a float16 convolution stays within its
    range. (As in StyleGAN2-ADA. With 512 input channels and |x| up to the usual clamp of 256 it would overflow.)
    """
    wide_weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    with torch.no_grad():  # the result of the layer does not depend on the factor
        scale = wide_weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20) * weight[0].numel() ** 0.5
    return weight / scale


def normalized_style(style: Tensor) -> Tensor:
    """style [N, I] over its largest magnitude in each row, at least in float32; see `normalized_weight`."""
    wide_style = style.to(torch.promote_types(style.dtype, torch.float32))
    with torch.no_grad():
        scale = wide_style.abs().amax(1, keepdim=True).clamp(min=1e-20)
    return style / scale


def _fir_padding(kernel: int, taps: int, padding: int) -> tuple[int, int]:
    """Zeros before and after the transposed convolution's result, for the FIR filter of up = 2; negative crops."""
    return padding + (taps + 1) // 2 - (kernel - 1), padding + (taps - 2) // 2 - (kernel - 2)


def _convolution(x: Tensor, weight: Tensor, up: int, padding: int) -> Tensor:
    # StyleGAN2 upsamples with a true convolution (kernel flipped against conv2d's correlation), which is what
    # conv_transpose2d computes: zeros inserted, stride 2. It leaves the kernel - 1 extra rows and columns that the
    # FIR's padding takes into account, so that the result stays centred at twice the size.
    if up == 2:
        return F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    return F.conv2d(x, weight, padding=padding)


def modulated_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool,
    up: int,
    padding: int,
    resample_filter: Tensor,
    noise: Tensor | None,
    noise_strength: Tensor | None,
    bias: Tensor | None,
    activation: str,
    gain: float,
    clamp: float | None,
) -> Tensor:
    """Plain PyTorch definition: the style scales the input, so that one convolution serves the whole batch.

    (Scaling the weight for each sample is the same function as a grouped convolution, which is several times slower.)
    """
    dtype = x.dtype
    if demodulate and dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    x = _convolution(x * style.to(dtype)[:, :, None, None], weight.to(dtype), up, padding)
    return fir_bias_act_reference(
        x,
        filter=resample_filter if up == 2 else None,
        padding=_fir_padding(weight.shape[-1], resample_filter.shape[-1], padding) if up == 2 else (0, 0),
        fir_gain=4.0,
        factor=demodulation(weight, style) if demodulate else None,
        noise=noise,
        noise_strength=noise_strength,
        bias=bias,
        activation=activation,
        gain=gain,
        clamp=clamp,
    )


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    padding: int | None = None,
    resample_filter: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    noise_seed: int | Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Modulated convolution and everything that follows it in a StyleGAN2 layer.

        y = clamp(gain act(FIR(conv(x style, weight)) d + noise_strength noise + bias)),   d: see `demodulation`

    Computed in the dtype of `x`, to which the other tensors are cast; the demodulation factors in float32 at least.

    Args:
        x: [N, I, H, W].
        weight: [O, I, k, k], k odd.
        style: [N, I] factor of each input channel.
        demodulate: scale each output channel to unit expected variance.
        up: 1, or 2 for the stride-2 transposed convolution followed by the FIR filter with gain 4.
        padding: zero padding of the convolution; default k // 2, which keeps (up = 1) or doubles (up = 2) the size.
        resample_filter: [m] or [m, m] FIR filter of up = 2, normalised to sum 1; default [1, 3, 3, 1].
        noise: [N, 1, H', W'] or [1, 1, H', W'] added after demodulation.
        noise_strength: scalar tensor, factor of the noise.
        noise_seed: integer in [0, 2^63) or int64 scalar tensor instead of `noise`, which is then drawn: pixel p of
            image n is element n H' W' + p of `philox_normal`'s stream of this seed.
        bias: [O].
        activation: "linear" or "lrelu" (slope 0.2).
        gain: factor after the activation.
        clamp: bound of the absolute value of the result; None for no bound.
        backend: "auto" or one of `BACKENDS`; default: see `spigan.ops.use_backend`.

    Returns:
        [N, O, H', W'] in the dtype of `x`. Differentiable in all tensors, to any order.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    check_tensor("x", x, "[N, I, H, W]")
    n, channels_in, height, width = x.shape
    check_tensor("weight", weight, "[O, I, k, k]", shape=(None, channels_in, None, None), device=x.device)
    channels_out, _, kernel, kernel_width = weight.shape
    check_tensor("style", style, "[N, I]", shape=(n, channels_in), device=x.device)
    if kernel != kernel_width or kernel % 2 == 0:
        raise ValueError(f"weight must have a square kernel of odd size, got {kernel}x{kernel_width}")
    if channels_in == 0 or channels_out == 0:
        raise ValueError(f"weight must have at least one input and one output channel, got shape {list(weight.shape)}")
    if up not in (1, 2):
        raise ValueError(f"up must be 1 or 2, got {up}")
    padding = kernel // 2 if padding is None else check_index("padding", padding)
    if activation not in ("linear", "lrelu"):
        raise ValueError(f'activation must be "linear" or "lrelu", got {activation!r}')
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be positive or None, got {clamp}")
    if resample_filter is not None:
        layout = "[m]" if isinstance(resample_filter, Tensor) and resample_filter.ndim == 1 else "[m, m]"
        check_tensor("resample_filter", resample_filter, layout, device=x.device)
    if resample_filter is None:
        filter = _default_filter(x.device)
    else:
        filter = fir_filter(resample_filter) if up == 2 else resample_filter
    grow = 2 * padding - kernel + 1
    size = (up * height + grow, up * width + grow)
    if min(*size, height, width) < 1:
        raise ValueError(f"x of {height}x{width} is too small for kernel {kernel} and padding {padding}")
    if bias is not None:
        check_tensor("bias", bias, "[O]", shape=(channels_out,), device=x.device)
    noise, noise_strength, seed = check_noise(noise, noise_strength, noise_seed, n, size, x.device)
    if up == 1:
        filter = filter.detach()  # not used
    tensors = (x, weight, style, noise, noise_strength, bias, filter)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    transformed = why_transformed(*tensors)

    def limit(name: str) -> str | None:
        if name not in backends.KERNELS:
            return None
        if transformed is not None:
            return transformed
        if x.dtype == torch.float64 and name != "cpp":
            return "it takes float32, bfloat16 and float16, not float64"
        if up == 2 and filter.shape[-1] > 8:
            return f"it takes filters of at most 8 taps, got {filter.shape[-1]}"
        if needs_grad and filter.requires_grad:
            return "it has no derivative with respect to the filter"
        if needs_grad and not gain > 0:
            return f"it has derivatives for a positive gain only, got {gain}"
        return None

    name = backends.choose("modulated_conv2d", backend, x.device, limit)
    end: dict[str, Any] = {"activation": activation, "gain": gain, "clamp": clamp}
    if (function := backends.function("modulated_conv2d", name)) is not None:
        with torch.autocast(x.device.type, enabled=False):  # as in a kernel: computed in the dtype of x
            return function(
                x,
                weight,
                style,
                demodulate=demodulate,
                up=up,
                padding=padding,
                resample_filter=filter,
                noise=noise if seed is None else draw_noise(seed, n, size),
                noise_strength=noise_strength,
                bias=bias,
                **end,
            )
    if not needs_grad:
        return torch.ops.spigan.modulated_conv2d(
            x, weight, style, noise, noise_strength, seed, bias, filter, demodulate, up, padding, *end.values(), name
        )
    # With gradients: the passes around the convolution and the convolution itself are operators with derivatives of any
    # order, the library's for the convolution.
    dtype = x.dtype
    if demodulate and dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    with torch.autocast(x.device.type, enabled=False):  # as in a kernel: computed in the dtype of x
        if _few_outputs(kernel, padding, up, channels_out):
            modulated = (weight[:, :, 0, 0] * style[:, None]).to(dtype)  # [N, O, I]
            y = torch.matmul(x.permute(0, 2, 3, 1).flatten(1, 2), modulated.mT)  # [N, H W, O]
            y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        else:
            scaled = fir_bias_act(x, factor=style, backend=name)
            y = _convolution(scaled, weight.to(dtype), up, padding)
    return fir_bias_act(
        y,
        filter=filter if up == 2 else None,
        padding=_fir_padding(kernel, filter.shape[-1], padding) if up == 2 else (0, 0),
        fir_gain=4.0,
        factor=demodulation(weight, style) if demodulate else None,
        noise=noise,
        noise_strength=noise_strength,
        noise_seed=None if seed is None else seed[0],
        bias=bias,
        backend=name,
        **end,
    )


@cache
def _kept_filter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return fir_filter(device=device)


def _default_filter(device: torch.device) -> Tensor:
    # Kept: a copy from the host at each call could not be captured in a CUDA graph. What compilers trace is not real.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return fir_filter(device=device)
    return _kept_filter(device)


def _few_outputs(kernel: int, padding: int, up: int, channels_out: int) -> bool:
    """ToRGB: so few outputs that scaling the weights is cheaper than a pass over the input."""
    return kernel == 1 and padding == 0 and up == 1 and channels_out <= 8


# ---- Inference: one call of the library or of our own kernel, and one pass at the end ----

# docs/kernels.md has the measurements behind these numbers (two cores of an AVX-512 server CPU).
# Weights that are not kept are transformed in each call, which for few tiles takes longer than Winograd's saves.
_WINOGRAD_MIN_TILES, _WINOGRAD_MIN_TILES_KEPT = 512, 64
# Up = 2: the library's transposed convolution is slow for few pixels and for many channels.
_PRODUCTS_MAX_PIXELS, _PRODUCTS_MIN_CHANNELS = 2048, 256
_WINOGRAD_MIN_CHANNELS = 128
# Values of the left factor of a matrix product: all of the 16 products stay in the last cache (512 channels: 256 tiles,
# 8 MB left, 8 MB result, 17 MB weights).
_WINOGRAD_CHUNK = 256 * 512
# Values a matrix product of an upsampling layer: its result stays in the last cache (9 MB float32).
_PRODUCTS_CHUNK = 512 * 9 * 512
# Multiply-adds of a matrix product from which oneDNN's is faster than MKL's, which torch.bmm calls in float32: on AMD's
# processors MKL's runs at half the rate (2 cores with AVX-512, 512 channels, 256 tiles: 376 against 196 GFLOP/s,
# 2026-11-25).
_ONEDNN_MIN_PRODUCTS = 1 << 22
# Bytes of a result that are worth a convolution of their own where a batch is convolved in parts to save memory.
_MIN_PART_BYTES = 1 << 21


# oneDNN's matrix product of float32 [T, I] and [O, I], as torch.compile calls it; None where PyTorch was built without.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] and weight [O, I] -> [T, O], by the faster of the CPU's libraries."""
    large = x.numel() * weight.shape[0] >= _ONEDNN_MIN_PRODUCTS
    if x.dtype == torch.float32 and large and _onednn_linear is not None:
        return _onednn_linear(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@dataclass(frozen=True)
class LayerWeight:
    """The weights of a layer, in the form in which one way of convolving takes them.

    Attributes:
        form: "direct" [O, I, k, k], channels-last: the library's convolution.
            "products" [k k O, I]: one matrix product for all taps (up = 2 on the CPU), "taps" [k, k, O, I]: Triton's.
            "winograd" [16, O, I] float32: Winograd's F(2x2, 3x3) on the CPU.
            "modulated" [O, I] at least float32: scaled for each image instead of the image.
        value: in the dtype of the images unless said otherwise.
        kernel: k.
        channels: O.
    """

    form: str
    value: Tensor
    kernel: int
    channels: int


def separable(filter: Tensor) -> bool:
    """Whether a [m, m] filter of sum 1 is the outer product of its sums. Reads its values: for tensors on the CPU."""
    return torch.allclose(torch.outer(filter.sum(1), filter.sum(0)), filter, rtol=0.0, atol=1e-7)


def weight_form(
    backend: str, shape: torch.Size, size: tuple[int, int], dtype: torch.dtype, n: int, up: int, padding: int,
    filter: Tensor, kept: bool = False,
) -> str:  # fmt: skip
    """The fastest form of weights of `shape` for n images with results of `size`; see `LayerWeight`.

    Args:
        kept: the weights are in that form already, or are kept in it.
    """
    channels_out, channels_in, kernel, _ = shape
    if _few_outputs(kernel, padding, up, channels_out):
        return "modulated"
    if backend == "triton":
        return "taps"
    if backend != "cpp" or dtype == torch.float64:
        return "direct"
    if up == 1:
        tiles = n * -(-size[0] // 2) * -(-size[1] // 2)
        winograd = (kernel, padding, dtype) == (3, 1, torch.float32)
        winograd = winograd and min(channels_in, channels_out) >= _WINOGRAD_MIN_CHANNELS
        enough = tiles >= (_WINOGRAD_MIN_TILES_KEPT if kept else _WINOGRAD_MIN_TILES)
        return "winograd" if winograd and enough else "direct"
    few_pixels = n * size[0] * size[1] <= 4 * _PRODUCTS_MAX_PIXELS
    products = (
        (few_pixels or channels_out >= _PRODUCTS_MIN_CHANNELS) and kernel * filter.shape[-1] <= 64 and separable(filter)
    )
    return "products" if products else "direct"


def prepare_weight(weight: Tensor, form: str, dtype: torch.dtype, backend: str) -> LayerWeight:
    """weight [O, I, k, k] in a form of `LayerWeight` for images of `dtype`."""
    channels_out, channels_in, kernel, _ = weight.shape
    if form == "winograd":
        module, threads = launcher(backend, weight.device)
        value = weight.new_empty((16, channels_out, channels_in), dtype=torch.float32)
        whole = weight.to(torch.float32).contiguous()  # bound to a name: an address alone would not keep it alive
        module.winograd_weight(address(value), address(whole), channels_out, channels_in, threads)
    elif form == "modulated":
        value = weight[:, :, 0, 0].to(torch.promote_types(weight.dtype, torch.float32))
    elif form == "direct":
        value = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    else:
        value = weight.to(dtype).permute(2, 3, 0, 1).contiguous()
        if form == "products":
            value = value.view(-1, channels_in)
    return LayerWeight(form, value, kernel, channels_out)


def convolve(
    backend: str,
    x: Tensor,
    weight: LayerWeight,
    *,
    style: Tensor | None,
    factor: Tensor | None,
    up: int,
    padding: int,
    filter: Tensor,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    seed: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    next_style: Tensor | None = None,
    rgb_weight: Tensor | None = None,
    keep: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """A layer without gradients, on tensors that were checked.

    Args:
        backend: "cpp", "triton" or "cuda".
        x: [N, H, W, I] contiguous: a channels-last image.
        weight: its weights.
        style: wide [N, I]; None: x has been scaled by it already.
        factor: wide [N, O], the demodulation; None: 1.
        filter: float32 [m, m], of up = 2.
        noise, strength, seed, bias: as of `launch_fir_bias_act`.
        next_style: wide [N, O], scales the result: the style of the layer that takes it.
        rgb_weight: float32 [N, R, O], R <= 4, the modulated weights of a ToRGB layer of the unscaled result.
        keep: False: only the ToRGB layer wants the result.

    Returns:
        [N, H', W', O] in the dtype of x or None, and float32 [N, H', W', R] or None.
    """
    n, height, width, _ = x.shape
    kernel, channels_out = weight.kernel, weight.channels
    grow = 2 * padding - kernel + 1
    size = (up * height + grow, up * width + grow)
    rgb = None if rgb_weight is None else x.new_empty((n, *size, rgb_weight.shape[1]), dtype=torch.float32)
    if n == 0:
        return x.new_empty((n, *size, channels_out)) if keep else None, rgb
    end: dict[str, Any] = {"slope": slope_of(activation), "gain": gain, "clamp": math.inf if clamp is None else clamp}
    fused = weight.form == "taps" and up == 1
    # Where the convolution's own result does not become the layer's in place, a quarter of the images is convolved at a
    # time: beside the input and the result there is never more than a quarter of a result.
    chunk = n
    if not fused and (up == 2 or not keep):
        image_bytes = size[0] * size[1] * channels_out * x.dtype.itemsize
        chunk = min(n, max(-(-n // 4), -(-_MIN_PART_BYTES // image_bytes)))
    if seed is not None and (chunk < n or weight.form in ("winograd", "products")):
        noise, seed = wide(draw_noise(seed, n, size, backend), x.dtype), None  # in a chunk the stream would begin anew
    images: dict[str, Any] = {
        "factor": factor,
        "noise": noise,
        "bias": bias,
        "next_factor": next_style,
        "rgb_weight": rgb_weight,
    }
    if weight.form in ("winograd", "products"):
        out = x.new_empty((n, *size, channels_out)) if keep else None
        _convolve_on_cpu(x, weight, style, out, rgb, padding, filter, images | {"strength": strength}, end)
        return out, rgb
    if style is not None and weight.form != "modulated":
        x, unscaled = torch.empty_like(x), x
        launch_fir_bias_act(backend, x, unscaled, factor=style)

    if fused:
        from spigan.kernels.modulated_conv2d import conv2d

        out = x.new_empty((n, *size, channels_out)) if keep else None
        noise = None if noise is None else noise.view(-1, *size)
        with on(x.device):
            conv2d(
                out, rgb, x, weight.value, factor, noise, seed, strength, bias, next_style, rgb_weight,
                padding=padding, **end,
            )  # fmt: skip
        return out, rgb

    out = x.new_empty((n, *size, channels_out)) if keep and up == 2 else None
    fir: dict[str, Any] = {}
    if up == 2:
        fir = {"filter": filter, "pad": _fir_padding(kernel, filter.shape[-1], padding)[0], "fir_gain": 4.0}
    for first in range(0, n, chunk):
        count = min(chunk, n - first)
        y = _images_convolved(x[first : first + count], weight, _of_images(style, n, first, count), up, padding)
        if keep and up == 1:
            out = y
        part: dict[str, Any] = {name: _of_images(tensor, n, first, count) for name, tensor in images.items()}
        launch_fir_bias_act(
            backend,
            None if out is None else out if up == 1 else out[first : first + count],
            y,
            seed=seed,
            strength=strength,
            rgb=None if rgb is None else rgb[first : first + count],
            **part,
            **fir,
            **end,
        )
        del y  # before the next one is made
    return out, rgb


def _of_images(tensor: Tensor | None, n: int, first: int, count: int) -> Tensor | None:
    """What images first .. first + count - 1 of n have of a tensor with something for each image or one for all."""
    return tensor if tensor is None or tensor.ndim == 1 or tensor.shape[0] != n else tensor[first : first + count]


def _images_convolved(x: Tensor, weight: LayerWeight, style: Tensor | None, up: int, padding: int) -> Tensor:
    """The convolution alone, [N, H, W, I] -> [N, H', W', O]; with up = 2 stride-2 transposed, H' = 2 H + k - 2."""
    n, height, width, _ = x.shape
    if weight.form == "modulated":
        modulated = weight.value if style is None else weight.value * style[:, None]  # [N, O, I]
        return torch.matmul(x.flatten(1, 2), modulated.to(x.dtype).mT).view(n, height, width, weight.channels)
    if weight.form == "direct":
        return channels_last(_convolution(x.permute(0, 3, 1, 2), weight.value, up, padding))
    from spigan.kernels.modulated_conv2d import transposed_conv2d

    y = x.new_empty((n, 2 * height + weight.kernel - 2, 2 * width + weight.kernel - 2, weight.channels))
    with on(x.device):
        transposed_conv2d(y, x, weight.value)
    return y


def _convolve_on_cpu(
    x: Tensor,
    weight: LayerWeight,
    style: Tensor | None,
    out: Tensor | None,
    rgb: Tensor | None,
    padding: int,
    filter: Tensor,
    images: dict[str, Any],
    end: dict[str, Any],
) -> None:
    """The forms "products" and "winograd": matrix products of a chunk of pixels at a time, which stay in the cache.

    A chunk is some images, or some rows of one.
    """
    module, threads = launcher("cpp", x.device)
    n, height, width, channels_in = x.shape
    result = out if out is not None else rgb
    assert result is not None
    size = result.shape[1:3]
    strength = images.pop("strength")

    def arguments(first: int, count: int) -> dict[str, Any]:
        """What ends images first .. first + count - 1."""
        part = {name: _of_images(tensor, n, first, count) for name, tensor in images.items()}
        noise = part["noise"]
        return {
            "out": address(None if out is None else out[first : first + count]),
            "dtype": dtype_number(module, x.dtype),
            "size": [count, *size, weight.channels],
            **{name: address(tensor) for name, tensor in part.items()},
            "noise_stride": 0 if noise is None or noise.numel() == size.numel() else size.numel(),
            "strength": address(strength),
            "rgb": address(None if rgb is None else rgb[first : first + count]),
            "rgb_channels": 0 if rgb is None else rgb.shape[3],
            **end,
            "threads": threads,
        }

    if weight.form == "winograd":
        tile_rows, columns = -(-height // 2), -(-width // 2)
        most = _WINOGRAD_CHUNK // max(channels_in, weight.channels)
        chunk = max(1, most // (tile_rows * columns))
        some_rows = tile_rows if chunk > 1 else max(1, min(tile_rows, most // columns))
        tiles = min(chunk, n) * some_rows * columns
        v = x.new_empty(16 * tiles * channels_in)
        for first, row in itertools.product(range(0, n, chunk), range(0, tile_rows, some_rows)):
            count, rows = min(chunk, n - first), min(some_rows, tile_rows - row)
            tiles = count * rows * columns
            left = v[: 16 * tiles * channels_in].view(16, tiles, channels_in)
            part, styles = x[first : first + count], None if style is None else style[first : first + count]
            module.winograd_input(address(left), address(part), address(styles), list(part.shape), [row, rows], threads)
            if tiles * channels_in * weight.channels < _ONEDNN_MIN_PRODUCTS:
                products = [*torch.bmm(left, weight.value.mT)]  # small: one call for all of them
            else:
                products = [_linear(left[k], weight.value[k]) for k in range(16)]
            module.winograd_output(products=[*map(address, products)], tile_rows=[row, rows], **arguments(first, count))
        return

    kernel, taps = weight.kernel, filter.shape[-1]
    pad = _fir_padding(kernel, taps, padding)[0]
    # Flipped: the filter is convolved. 4: the gain that makes up for the zeros inserted.
    filters = (4.0 * filter.sum(1)).flip(0).tolist(), filter.sum(0).flip(0).tolist()
    if style is not None:
        x, unscaled = torch.empty_like(x), x
        launch_fir_bias_act("cpp", x, unscaled, factor=style)
    pixels = max(1, _PRODUCTS_CHUNK // weight.value.shape[0])
    chunk = max(1, pixels // (height * width))
    some_rows = size[0] if chunk > 1 else max(2, min(size[0], 2 * (pixels // width)))
    for first, row in itertools.product(range(0, n, chunk), range(0, size[0], some_rows)):
        count, rows = min(chunk, n - first), min(some_rows, size[0] - row)
        # Row r of the result needs rows r - pad .. r - pad + taps - 1 of the transposed convolution, row a of which
        # needs rows (a - kernel + 1) / 2 .. a / 2 of x.
        begin = min(height, max(0, -((kernel - 1 - (row - pad)) // 2)))
        stop = min(height, (row + rows - 1 - pad + taps - 1) // 2 + 1)
        part = x[first : first + count, begin:stop]
        y = _linear(part.reshape(-1, channels_in), weight.value)
        module.finish_products(
            y=address(y),
            y_size=[height, width, kernel],
            y_rows=[begin, max(0, stop - begin)],
            pad=pad,
            filter_y=filters[0],
            filter_x=filters[1],
            rows=[row, rows],
            **arguments(first, count),
        )
        del y  # before the next one is made


def _kernel(  # type: ignore[no-untyped-def]
    x, weight, style, noise, noise_strength, noise_seed, bias, resample_filter,
    demodulate, up, padding, activation, gain, clamp, backend,
):  # fmt: skip
    dtype = x.dtype
    if demodulate and dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    grow = 2 * padding - weight.shape[-1] + 1
    size = (up * x.shape[2] + grow, up * x.shape[3] + grow)
    form = weight_form(backend, weight.shape, size, dtype, x.shape[0], up, padding, resample_filter)
    out, _ = convolve(
        backend,
        channels_last(x),
        prepare_weight(weight, form, dtype, backend),
        style=wide(style, dtype),
        factor=wide(demodulation(weight, style), dtype) if demodulate else None,
        up=up,
        padding=padding,
        filter=resample_filter.to(torch.float32).contiguous(),
        noise=wide(noise, dtype),
        strength=wide(noise_strength, dtype),
        seed=noise_seed,
        bias=wide(bias, dtype),
        activation=activation,
        gain=gain,
        clamp=clamp,
    )
    assert out is not None
    return out.permute(0, 3, 1, 2)


def _fake(  # type: ignore[no-untyped-def]
    x, weight, style, noise, noise_strength, noise_seed, bias, resample_filter, demodulate, up, padding, *_
):  # fmt: skip
    grow = 2 * padding - weight.shape[-1] + 1
    size = (up * x.shape[2] + grow, up * x.shape[3] + grow)
    return x.new_empty((x.shape[0], *size, weight.shape[0])).permute(0, 3, 1, 2)


define(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor style, Tensor? noise, Tensor? noise_strength, "
    "Tensor? noise_seed, Tensor? bias, Tensor resample_filter, bool demodulate, SymInt up, SymInt padding, "
    "str activation, float gain, float? clamp, str backend) -> Tensor",
    _kernel,
    _fake,
)
backends.register("modulated_conv2d", "reference", backends.always_available, modulated_conv2d_reference)
backends.register("modulated_conv2d", "cpp", backends.extension_on_cpu)
backends.register("modulated_conv2d", "triton", backends.triton_on_gpu)
backends.register("modulated_conv2d", "cuda", backends.cuda_on_gpu)
