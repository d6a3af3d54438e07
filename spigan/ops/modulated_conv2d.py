"""StyleGAN2's layer: modulation, convolution, demodulation, FIR upsampling, noise, bias and activation
(Karras et al. 2020b, "Analyzing and improving the image quality of StyleGAN", section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops import backends
from spigan.ops.checks import check_index, check_tensor
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
        kernel, taps = weight.shape[-1], resample_filter.shape[-1]
        before = padding + (taps + 1) // 2 - (kernel - 1)
        after = padding + (taps - 2) // 2 - (kernel - 2)
        x = F.conv_transpose2d(x, weight.to(dtype).transpose(0, 1), stride=2)
        x = upfirdn2d(x, resample_filter, padding=(before, after), gain=4.0)
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
        backend: "auto" or "reference"; default: see `spigan.ops.use_backend`.

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
    backends.choose("modulated_conv2d", backend, x.device)
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


backends.register("modulated_conv2d", "reference", backends.always_available)
