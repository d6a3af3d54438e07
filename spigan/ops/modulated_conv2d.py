"""StyleGAN2's layer: modulation, convolution, demodulation, FIR upsampling, noise, bias and activation
(Karras et al. 2020b, "Analyzing and improving the image quality of StyleGAN", section 2.2).

Twin: csrc/cpu/modulated_conv2d.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops import backends
from spigan.ops.checks import check_index, check_tensor
from spigan.ops.library import address, define, dtype_number, launcher, library, why_transformed
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

_EPS = 1e-8  # StyleGAN2's, inside the demodulation's square root
_LRELU_SLOPE = 0.2


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """d[n, o] = 1 / sqrt(sum over i, k of (style[n, i] weight[o, i, k])^2 + 1e-8), at least in float32.

    Args:
        weight: [O, I, k, k].
        style: [N, I].

    Returns:
        [N, O].
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, style.dtype), torch.float32)
    # A reduced-precision matrix product would put its rounding error on every pixel of a channel alike.
    with torch.autocast(style.device.type, enabled=False):
        power = style.to(dtype).square() @ weight.to(dtype).square().sum((2, 3)).T
    return (power + _EPS).rsqrt()


def _prenormalized(weight: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
    """Factors that demodulation takes out again, so that the convolution before it stays within float16.

    (As in StyleGAN2-ADA. With 512 input channels and |x| up to the usual clamp of 256 it would overflow.)
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    fan_in = weight[0].numel()
    with torch.no_grad():  # the result does not depend on these factors
        weight_scale = weight.to(dtype).abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-20) * fan_in**0.5
        style_scale = style.to(dtype).abs().amax(1, keepdim=True).clamp(min=1e-20)
    return weight / weight_scale, style / style_scale


def _fir_padding(kernel: int, taps: int, padding: int) -> tuple[int, int]:
    """Zeros before and after the transposed convolution's result, for the FIR filter of up = 2; negative crops."""
    return padding + (taps + 1) // 2 - (kernel - 1), padding + (taps - 2) // 2 - (kernel - 2)


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
        weight, style = _prenormalized(weight, style)
    x = x * style.to(dtype)[:, :, None, None]
    if up == 1:
        x = F.conv2d(x, weight.to(dtype), padding=padding)
    else:
        # StyleGAN2 upsamples with a true convolution (kernel flipped against conv2d's correlation), which is what
        # conv_transpose2d computes: zeros inserted, stride 2. It leaves the kernel - 1 extra rows and columns that the
        # FIR's padding takes into account, so that the result stays centred at twice the size.
        x = F.conv_transpose2d(x, weight.to(dtype).transpose(0, 1), stride=2)
        fir_padding = _fir_padding(weight.shape[-1], resample_filter.shape[-1], padding)
        x = upfirdn2d(x, resample_filter, padding=fir_padding, gain=4.0)
    if demodulate:
        x = x * demodulation(weight, style).to(dtype)[:, :, None, None]
    if noise is not None:
        x = x + noise.to(dtype)
    if bias is not None:
        x = x + bias.to(dtype)[:, None, None]
    if activation == "lrelu":
        x = F.leaky_relu(x, _LRELU_SLOPE)
    if gain != 1.0:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


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
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Modulated convolution and everything that follows it in a StyleGAN2 layer.

        y = clamp(gain act(FIR(conv(x style, weight)) d + noise + bias)),   d: see `demodulation`

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
        bias: [O].
        activation: "linear" or "lrelu" (slope 0.2).
        gain: factor after the activation.
        clamp: bound of the absolute value of the result; None for no bound.
        backend: "auto" or one of `BACKENDS`; default: see `spigan.ops.use_backend`. "cpp" takes float32 and bfloat16;
            its derivatives are the reference's, computed from the beginning, so "auto" takes it without gradients only.

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
    filter = fir_filter(device=x.device) if resample_filter is None else resample_filter
    if up == 2:
        filter = fir_filter(filter)
    grow = 2 * padding - kernel + 1
    size = (up * height + grow, up * width + grow)
    if min(*size, height, width) < 1:
        raise ValueError(f"x of {height}x{width} is too small for kernel {kernel} and padding {padding}")
    if bias is not None:
        check_tensor("bias", bias, "[O]", shape=(channels_out,), device=x.device)
    if noise is not None:
        rows = n if isinstance(noise, Tensor) and noise.ndim and noise.shape[0] != 1 else 1
        check_tensor("noise", noise, "[N or 1, 1, H', W']", shape=(rows, 1, *size), device=x.device)
    if up == 1:
        filter = filter.detach()  # not used
    tensors = (x, weight, style, noise, bias, filter)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    transformed = why_transformed(*tensors)

    def limit(name: str) -> str | None:
        if name != "reference" and transformed is not None:
            return transformed
        if name == "cpp" and x.dtype not in (torch.float32, torch.bfloat16):
            return f"it takes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
        if name == "cpp" and needs_grad and backends.requested(backend)[0] == "auto":
            return "gradients are wanted, which the reference computes"
        return None

    name = backends.choose("modulated_conv2d", backend, x.device, limit)
    if name != "reference":
        return torch.ops.spigan.modulated_conv2d(
            x, weight, style, noise, bias, filter, demodulate, up, padding, activation, gain, clamp, name
        )
    return modulated_conv2d_reference(
        x,
        weight,
        style,
        demodulate=demodulate,
        up=up,
        padding=padding,
        resample_filter=filter,
        noise=noise,
        bias=bias,
        activation=activation,
        gain=gain,
        clamp=clamp,
    )


# Winograd's convolution transforms the weights anew at each call, which for fewer tiles takes longer than it saves: a
# single 32x32 image of 512 channels, 256 tiles, took 10 % longer (two cores of an AVX-512 server CPU).
_WINOGRAD_MIN_TILES = 512
_WINOGRAD_MIN_CHANNELS = 64
# Tiles a matrix product: its three factors stay in the last cache (512 channels: 8, 8 and 17 MB).
_WINOGRAD_CHUNK = 256
# Pixels a matrix product of an upsampling layer, whose result stays in the last cache (512 channels: 9 MB float32).
_PRODUCTS_CHUNK = 512


def _vector(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()


def _kernel(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor,
    demodulate: bool,
    up: int,
    padding: int,
    activation: str,
    gain: float,
    clamp: float | None,
    backend: str,
) -> Tensor:
    """One pass before the convolution scales the input by the style, one after it does everything else."""
    out = _fake(
        x, weight, style, noise, bias, resample_filter, demodulate, up, padding, activation, gain, clamp, backend
    )
    n, channels_out, height, width = out.shape
    if out.numel() == 0:
        return out
    module, threads = launcher(backend, x.device)
    x = x.contiguous(memory_format=torch.channels_last)
    style = _vector(style)
    factor = demodulation(weight, style) if demodulate else torch.ones_like(style[:, :1]).expand(n, channels_out)
    factor = _vector(factor)
    noise = None if noise is None else _vector(noise)
    bias = x.new_zeros(channels_out, dtype=torch.float32) if bias is None else _vector(bias)
    _, channels_in, in_height, in_width = x.shape
    kernel = weight.shape[-1]

    before, after = _fir_padding(kernel, resample_filter.shape[-1], padding)
    separable = False
    if up == 2:
        rows, columns = resample_filter.sum(1), resample_filter.sum(0)
        separable = kernel * resample_filter.shape[-1] <= 64 and torch.allclose(
            torch.outer(rows, columns), resample_filter, rtol=0.0, atol=1e-7
        )

    def finish(y: Tensor, first: int = 0, count: int = n, winograd: bool = False) -> None:
        filters: tuple[list[float], list[float]] = ([], [])
        if separable:  # flipped: the filter is convolved; 4: the gain that makes up for the zeros inserted
            filters = (4.0 * rows).flip(0).tolist(), columns.flip(0).tolist()
        module.finish_layer(
            address(out[first:]),
            dtype_number(module, out.dtype),
            address(y),
            address(factor[first:]),
            address(noise if noise is None or noise.shape[0] == 1 else noise[first:]),
            0 if noise is None or noise.shape[0] == 1 else height * width,
            address(bias),
            0,
            _LRELU_SLOPE if activation == "lrelu" else 1.0,
            gain,
            math.inf if clamp is None else clamp,
            [count, height, width, channels_out],
            [in_height, in_width, kernel],
            before,
            *filters,
            winograd,
            threads,
        )

    def scaled() -> Tensor:
        result = torch.empty_like(x)
        number = dtype_number(module, x.dtype)
        module.scale_channels(
            address(result), number, address(x), address(style), n, in_height * in_width, channels_in, threads
        )
        return result

    tiles = -(-height // 2) * -(-width // 2)  # of an image
    if (
        (up, kernel, padding, x.dtype) == (1, 3, 1, torch.float32)
        and min(channels_in, channels_out) >= _WINOGRAD_MIN_CHANNELS
        and n * tiles >= _WINOGRAD_MIN_TILES
    ):
        u = x.new_empty(16, channels_in, channels_out)
        whole_weight = _vector(weight)  # bound to a name: an address alone would not keep it alive
        module.winograd_weight(address(u), address(whole_weight), channels_out, channels_in, threads)
        chunk = min(n, max(1, _WINOGRAD_CHUNK // tiles))
        v, products = x.new_empty(16, chunk * tiles, channels_in), x.new_empty(16, chunk * tiles, channels_out)
        for first in range(0, n, chunk):
            count = min(chunk, n - first)
            if count < chunk:
                v, products = (x.new_empty(16, count * tiles, c) for c in (channels_in, channels_out))
            size = [count, in_height, in_width, channels_in]
            module.winograd_input(address(v), address(x[first:]), address(style[first:]), size, threads)
            torch.bmm(v, u, out=products)
            finish(products, first, count, winograd=True)
    elif separable:
        # All products of a tap and a pixel as one matrix product, chunk by chunk; the last pass sums them.
        taps = weight.permute(2, 3, 0, 1).reshape(-1, channels_in).to(x.dtype)  # [k k O, I]
        pixels = scaled().permute(0, 2, 3, 1)
        chunk = max(1, _PRODUCTS_CHUNK // (in_height * in_width))
        for first in range(0, n, chunk):
            part = pixels[first : first + chunk]
            finish(F.linear(part.reshape(-1, channels_in), taps), first, len(part))
    elif up == 2:
        y = F.conv_transpose2d(scaled(), weight.to(x.dtype).transpose(0, 1), stride=2)
        y = upfirdn2d(y, resample_filter, padding=(before, after), gain=4.0)
        finish(y.contiguous(memory_format=torch.channels_last))
    elif kernel == 1 and padding == 0 and channels_out <= 8:
        # ToRGB: so few outputs that scaling the weights is cheaper than a pass over the input.
        modulated = (weight[:, :, 0, 0].to(torch.float32) * style[:, None]).to(x.dtype)  # [N, O, I]
        pixels = x.permute(0, 2, 3, 1).reshape(n, -1, channels_in)
        y = torch.bmm(pixels, modulated.transpose(1, 2)).view(n, height, width, channels_out).permute(0, 3, 1, 2)
        finish(y)
    else:
        y = F.conv2d(scaled(), weight.to(x.dtype), padding=padding)
        finish(y.contiguous(memory_format=torch.channels_last))
    return out


def _fake(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    resample_filter: Tensor,
    demodulate: bool,
    up: int,
    padding: int,
    activation: str,
    gain: float,
    clamp: float | None,
    backend: str,
) -> Tensor:
    grow = 2 * padding - weight.shape[-1] + 1
    size = (x.shape[0], weight.shape[0], up * x.shape[2] + grow, up * x.shape[3] + grow)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.demodulate, ctx.up, ctx.padding, ctx.activation, ctx.gain, ctx.clamp, _ = inputs
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None))


def _backward(ctx, grad_out):  # type: ignore[no-untyped-def]
    # Through the reference, once more with a graph; differentiable again.
    create_graph = torch.is_grad_enabled()
    needs = ctx.needs_input_grad[: len(ctx.given)]
    saved = iter(ctx.saved_tensors)
    tensors: list[Any] = [next(saved) if given else None for given in ctx.given]
    # Views where a graph is wanted: the inputs may be functions of each other, and only what this operation makes of
    # each is to be differentiated.
    tensors = [
        t if not need else t.view_as(t) if create_graph else t.detach().requires_grad_()
        for t, need in zip(tensors, needs, strict=True)
    ]
    x, weight, style, noise, bias, resample_filter = tensors
    with torch.enable_grad():
        out = modulated_conv2d_reference(
            x,
            weight,
            style,
            demodulate=ctx.demodulate,
            up=ctx.up,
            padding=ctx.padding,
            resample_filter=resample_filter,
            noise=noise,
            bias=bias,
            activation=ctx.activation,
            gain=ctx.gain,
            clamp=ctx.clamp,
        )
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
    grads = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=create_graph))
    return *(next(grads) if need else None for need in needs), *(None,) * 7


define(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor style, Tensor? noise, Tensor? bias, Tensor resample_filter, "
    "bool demodulate, SymInt up, SymInt padding, str activation, float gain, float? clamp, str backend) -> Tensor",
    _kernel,
    _fake,
)
torch.library.register_autograd("spigan::modulated_conv2d", _backward, setup_context=_setup_context, lib=library)
backends.register("modulated_conv2d", "reference", backends.always_available)
backends.register("modulated_conv2d", "cpp", backends.extension_on_cpu)
