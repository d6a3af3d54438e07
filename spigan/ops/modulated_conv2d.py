"""StyleGAN2's layer: modulation, convolution, demodulation, FIR upsampling, noise, bias and activation
(Karras et al. 2020b, "Analyzing and improving the image quality of StyleGAN", section 2.2).

The style scales the input, one convolution with shared weights serves the whole batch, and one pass of `fir_bias_act`
ends the layer. Without gradients, spigan/ops/frozen_layer.py runs it, in a way that
spigan/ops/layer_plans.py chooses.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from spigan.ops.checks import check_activation, check_clamp, check_index, check_tensor
from spigan.ops.convolution import convolution, fir_padding, has_few_outputs, result_size
from spigan.ops.demodulation import demodulation, normalized_style, normalized_weight
from spigan.ops.fir_bias_act import fir_bias_act, fir_bias_act_reference, limit
from spigan.ops.layer_end import LayerEnd, channels_last, wide
from spigan.ops.layer_plans import LayerCall, LayerPlan, layer_plan
from spigan.ops.layer_weights import LayerWeight, prepare_weight
from spigan.ops.noise import check_noise, draw_noise
from spigan.ops.operation import Operation
from spigan.ops.upfirdn2d import fir_filter


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
    """Plain PyTorch definition of `modulated_conv2d`.

    The style scales the input, so that one convolution serves the whole batch. (Scaling the weight for each sample
    gives the same result by a grouped convolution, which is several times slower.)
    """
    dtype = x.dtype
    if demodulate and dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    x = convolution(x * style.to(dtype)[:, :, None, None], weight.to(dtype), up, padding)
    return fir_bias_act_reference(
        x,
        filter=resample_filter if up == 2 else None,
        padding=fir_padding(weight.shape[-1], resample_filter.shape[-1], padding) if up == 2 else (0, 0),
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

    Computed in the dtype of `x`, to which the other tensors are cast; the demodulation at least in float32.

    Args:
        x: [N, I, H, W].
        weight: [O, I, k, k], k odd.
        style: [N, I] factor of each input channel.
        demodulate: Scale each output channel to unit expected variance.
        up: 1, or 2 for the stride-2 transposed convolution followed by the FIR filter with gain 4.
        padding: Zero padding of the convolution. The default k // 2 keeps (up = 1) or doubles (up = 2) the size.
        resample_filter: [m] or [m, m] FIR filter of up = 2, normalised to sum 1; default [1, 3, 3, 1].
        noise: [N, 1, H', W'] or [1, 1, H', W'] added after demodulation.
        noise_strength: Scalar tensor, factor of the noise.
        noise_seed: Integer in [0, 2^63) or int64 scalar tensor from which the noise is drawn, instead of `noise`: pixel
            p of image n is element n H' W' + p of `philox_normal`'s stream of this seed.
        bias: [O].
        activation: "linear" or "lrelu" (slope 0.2).
        gain: Factor after the activation.
        clamp: Bound of the absolute value of the result; None for no bound.
        backend: "auto" or one of `BACKENDS`; for the default see `spigan.ops.use_backend`.

    Returns:
        [N, O, H', W'] in the dtype of `x`. Differentiable in all tensors, to any order.

    Raises:
        TypeError, ValueError: An argument has the wrong type, shape, dtype or device, or is out of range.
        BackendUnavailable: A backend requested by name cannot run.
    """
    padding, size = _check_convolution(x, weight, style, up, padding)
    check_activation(activation)
    check_clamp(clamp)
    filter = _checked_filter(resample_filter, up, x.device)
    n, channels_out = x.shape[0], weight.shape[0]
    if bias is not None:
        check_tensor("bias", bias, "[O]", shape=(channels_out,), device=x.device)
    noise, noise_strength, seed = check_noise(noise, noise_strength, noise_seed, n, size, x.device)
    tensors = (x, weight, style, noise, noise_strength, bias, filter)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    used_filter = filter if up == 2 else None
    name, function = _OPERATION.choose(backend, x.device, tensors, x.dtype, used_filter, gain, needs_grad)
    end: dict[str, Any] = {"activation": activation, "gain": gain, "clamp": clamp}
    if function is not None:
        with torch.autocast(x.device.type, enabled=False):  # as in a kernel: computed in the dtype of x
            noise = noise if seed is None else draw_noise(seed, n, size)
            return function(
                x, weight, style, demodulate=demodulate, up=up, padding=padding, resample_filter=filter,
                noise=noise, noise_strength=noise_strength, bias=bias, **end,
            )  # fmt: skip
    if not needs_grad:
        return _OPERATION.kernel(
            x, weight, style, noise, noise_strength, seed, bias, filter, demodulate, up, padding, *end.values(), name
        )
    if demodulate and x.dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    return fir_bias_act(
        _differentiable_convolution(x, weight, style, up, padding, name),
        filter=used_filter,
        padding=fir_padding(weight.shape[-1], filter.shape[-1], padding) if up == 2 else (0, 0),
        fir_gain=4.0,
        factor=demodulation(weight, style) if demodulate else None,
        noise=noise,
        noise_strength=noise_strength,
        noise_seed=None if seed is None else seed[0],
        bias=bias,
        backend=name,
        **end,
    )


def _check_convolution(
    x: Tensor, weight: Tensor, style: Tensor, up: int, padding: int | None
) -> tuple[int, tuple[int, int]]:
    """Check the arguments of the convolution and return (padding, (H', W'))."""
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
    size = result_size(height, width, kernel, up, padding)
    if min(*size, height, width) < 1:
        raise ValueError(f"x of {height}x{width} is too small for kernel {kernel} and padding {padding}")
    return padding, size


def _checked_filter(filter: Tensor | None, up: int, device: torch.device) -> Tensor:
    """Return the FIR filter [m, m]; without upsampling it is not used and has no gradient."""
    if filter is None:
        return _default_filter(device)
    layout = "[m]" if isinstance(filter, Tensor) and filter.ndim == 1 else "[m, m]"
    check_tensor("resample_filter", filter, layout, device=device)
    return fir_filter(filter) if up == 2 else filter.detach()


@cache
def _kept_filter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return fir_filter(device=device)


def _default_filter(device: torch.device) -> Tensor:
    # Kept, because a CUDA graph could not capture a copy from the host at each call. Compilers trace fake tensors.
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return fir_filter(device=device)
    return _kept_filter(device)


def _differentiable_convolution(
    x: Tensor, weight: Tensor, style: Tensor, up: int, padding: int, backend: str
) -> Tensor:
    """Modulate and convolve by operators with derivatives of any order; the convolution is the library's."""
    kernel, height, width = weight.shape[-1], *x.shape[2:]
    with torch.autocast(x.device.type, enabled=False):  # as in a kernel: computed in the dtype of x
        if has_few_outputs(kernel, padding, up, weight.shape[0]):
            modulated = (weight[:, :, 0, 0] * style[:, None]).to(x.dtype)  # [N, O, I]
            y = torch.matmul(x.permute(0, 2, 3, 1).flatten(1, 2), modulated.mT)  # [N, H W, O]
            return y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return convolution(fir_bias_act(x, factor=style, backend=backend), weight.to(x.dtype), up, padding)


# ---- The operator, for calls without gradients ----


def _size(args: Any) -> tuple[int, int]:
    _, _, height, width = args.x.shape
    return result_size(height, width, args.weight.shape[-1], args.up, args.padding)


def _kernel(args: Any) -> Tensor:
    x, weight, style, dtype = args.x, args.weight, args.style, args.x.dtype
    if args.demodulate and dtype == torch.float16:
        weight, style = normalized_weight(weight), normalized_style(style)
    end = LayerEnd(
        factor=wide(demodulation(weight, style), dtype) if args.demodulate else None,
        noise=wide(args.noise, dtype),
        seed=args.noise_seed,
        strength=wide(args.noise_strength, dtype),
        bias=wide(args.bias, dtype),
        activation=args.activation,
        gain=args.gain,
        clamp=args.clamp,
    )
    call = LayerCall(
        x=channels_last(x),
        end=end,
        style=wide(style, dtype),
        up=args.up,
        padding=args.padding,
        filter=args.resample_filter.to(torch.float32).contiguous(),
        shape=weight.shape,
    )

    def pack(plan: LayerPlan) -> LayerWeight:
        return prepare_weight(weight, plan.form, dtype, plan.backend)

    plan = layer_plan(args.backend, call, pack)
    out, _ = call.run(plan, pack(plan))
    assert out is not None
    return out.permute(0, 3, 1, 2)


def _fake(args: Any) -> Tensor:
    return args.x.new_empty((args.x.shape[0], *_size(args), args.weight.shape[0])).permute(0, 3, 1, 2)


_OPERATION = Operation(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor style, Tensor? noise, Tensor? noise_strength, "
    "Tensor? noise_seed, Tensor? bias, Tensor resample_filter, bool demodulate, SymInt up, SymInt padding, "
    "str activation, float gain, float? clamp, str backend) -> Tensor",
    reference=modulated_conv2d_reference,
    kernels=dict.fromkeys(("cpp", "triton", "cuda"), _kernel),
    fake=_fake,
    limit=limit,
)
