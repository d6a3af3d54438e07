"""Derivatives of `fir_bias_act` (spigan/ops/fir_bias_act.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from spigan.ops.layer_end import channels_last, slope_of, wide
from spigan.ops.library import launch, register_operator
from spigan.ops.noise import draw_noise

_PART = 64  # pixels that one partial sum of the kernels covers; on a GPU each is a block or more


def _kernel(args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute u = grad times the derivative of clamp(gain act()), and return factor u and sums of u.

    Returns:
        (grad_x [N, C, H, W], sum of u over pixels [N, C], sum of u x over pixels [N, C], sum of u over channels
        [N, 1, H, W]); those that are not wanted are empty.
    """
    grad, dtype = args.grad, args.grad.dtype
    wide_dtype = torch.promote_types(dtype, torch.float32)
    n, channels, height, width = grad.shape
    pixels = height * width
    parts = max(1, -(-pixels // _PART))
    images = channels_last(grad)
    grad_x = torch.empty_like(images) if args.want_x else images.new_empty(0)
    sum_u, sum_ux = (
        images.new_empty((n, parts, channels) if wanted else 0, dtype=wide_dtype)
        for wanted in (args.want_u, args.want_ux)
    )
    sum_c = images.new_empty((n, pixels) if args.want_c else 0, dtype=wide_dtype)
    if grad.numel() == 0:
        for tensor in (sum_u, sum_ux, sum_c):
            tensor.zero_()
    else:
        wants = (args.want_x, args.want_u, args.want_ux, args.want_c)
        results = [t if wanted else None for t, wanted in zip((grad_x, sum_u, sum_ux, sum_c), wants, strict=True)]
        _launch(args, images, results, [n, pixels, channels], parts)
    return (
        grad_x.permute(0, 3, 1, 2) if args.want_x else grad_x,
        sum_u.sum(1) if args.want_u else sum_u,
        sum_ux.sum(1) if args.want_ux else sum_ux,
        sum_c.view(n, 1, height, width) if args.want_c else sum_c,
    )


def _launch(args: Any, images: Tensor, results: list[Tensor | None], size: list[int], parts: int) -> None:
    dtype = images.dtype
    out = channels_last(args.out) if args.out is not None else None
    x = channels_last(args.x.to(dtype)) if args.want_ux else None
    factor = wide(args.factor, dtype)
    # Results that were clamped equal the bound as their dtype rounds it.
    bound = math.inf if args.clamp is None else torch.tensor(args.clamp, dtype=dtype).item()
    end = {"slope": slope_of(args.activation), "gain": args.gain, "clamp": bound}
    if args.backend != "triton":
        launch(args.backend, "bias_act_backward", *results, dtype, images, out, x, factor, *end.values(), size, parts)
        return
    from spigan.kernels.fir_bias_act import bias_act_backward as run

    grad_x, sum_u, sum_ux, sum_c = results
    flat_grad_x, flat_out, flat_x = (None if t is None else t.view(size) for t in (grad_x, out, x))
    run(flat_grad_x, sum_u, sum_ux, sum_c, images.view(size), flat_out, flat_x, factor, **end)


def _fake(args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad, dtype = args.grad, torch.promote_types(args.grad.dtype, torch.float32)
    n, channels, height, width = grad.shape
    return (
        grad.new_empty((n, height, width, channels)).permute(0, 3, 1, 2) if args.want_x else grad.new_empty(0),
        grad.new_empty((n, channels) if args.want_u else 0, dtype=dtype),
        grad.new_empty((n, channels) if args.want_ux else 0, dtype=dtype),
        grad.new_empty((n, 1, height, width) if args.want_c else 0, dtype=dtype),
    )


_bias_act_backward = register_operator(
    "bias_act_backward(Tensor grad, Tensor? out, Tensor? x, Tensor? factor, bool want_x, bool want_u, bool want_ux, "
    "bool want_c, str activation, float gain, float? clamp, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
)


def setup_context(ctx: Any, args: Any, output: Tensor) -> None:
    """Save what `backward` needs."""
    for name in ("size", "up", "down", "pad", "flip", "fir_gain", "activation", "gain", "clamp", "backend"):
        setattr(ctx, name, getattr(args, name))
    ctx.x_size = args.x.shape[2:]
    ctx.bias_ndim = None if args.bias is None else args.bias.ndim
    ctx.noise_rows = None if args.noise is None else args.noise.shape[0]
    ctx.dtypes = {
        name: None if (tensor := getattr(args, name)) is None else tensor.dtype
        for name in ("factor", "noise", "noise_strength", "bias", "add")
    }
    _, _, needs_factor, _, needs_strength, *_ = ctx.needs_input_grad
    linear = args.activation == "linear" and args.clamp is None  # such an end needs no result
    ctx.save_for_backward(
        args.x if needs_factor else None,
        args.filter,
        args.factor,
        args.noise if needs_strength else None,
        args.noise_strength,
        args.noise_seed if needs_strength else None,
        None if linear else output,
    )


def _derivative(out: Tensor, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Return the derivative of clamp(gain act(v)) from its result (gain > 0), as a constant."""
    out = out.detach()
    slope = torch.where(out > 0, gain, gain * slope_of(activation)).to(out.dtype)
    return slope if clamp is None else slope * (out.abs() < clamp)


def _transposed(ctx: Any, u: Tensor, filter: Tensor) -> Tensor:
    """Apply the transposed FIR filter: up and down change places, and the filter is rotated by 180 degrees."""
    pad = filter.shape[0] - 1 - ctx.pad
    fir = (ctx.x_size, ctx.down, ctx.up, pad, not ctx.flip, ctx.fir_gain, "linear", 1.0, None, ctx.backend)
    return torch.ops.spigan.fir_bias_act.default(u, filter, None, None, None, None, None, None, *fir)


def _differentiable_sums(ctx: Any, grad: Tensor, want_c: bool) -> tuple[Any, ...]:
    """Compute (grad_x, sum_u, sum_ux, sum_c) by plain PyTorch and `fir_bias_act`, to be differentiated again."""
    x, filter, factor, _, _, _, out = ctx.saved_tensors
    u = grad * (ctx.gain if out is None else _derivative(out, ctx.activation, ctx.gain, ctx.clamp))
    v = u if filter is None else _transposed(ctx, u, filter)
    wide_dtype = torch.promote_types(u.dtype, torch.float32)
    return (
        v if factor is None else v * factor.to(v.dtype)[:, :, None, None],
        u.sum((2, 3), dtype=wide_dtype) if ctx.needs_input_grad[6] else None,
        (v * x).sum((2, 3), dtype=wide_dtype) if ctx.needs_input_grad[2] else None,
        u.sum(1, keepdim=True, dtype=wide_dtype) if want_c else None,
    )


def _sums(ctx: Any, grad: Tensor, want_c: bool) -> tuple[Any, ...]:
    """Compute (grad_x, sum_u, sum_ux, sum_c) by kernels."""
    x, filter, factor, _, _, _, out = ctx.saved_tensors
    needs_x, _, needs_factor, _, _, _, needs_bias, *_ = ctx.needs_input_grad
    end = (ctx.activation, ctx.gain, ctx.clamp, ctx.backend)
    if filter is None:
        return _bias_act_backward(grad, out, x, factor, needs_x, needs_bias, needs_factor, want_c, *end)
    u, grad_x = grad, None
    sum_u = sum_ux = sum_c = None
    if out is not None or ctx.gain != 1.0 or needs_bias or want_c:
        u, sum_u, _, sum_c = _bias_act_backward(
            grad, out, None, None, needs_x or needs_factor, needs_bias, False, want_c, *end
        )
    if needs_x or needs_factor:
        grad_x = _transposed(ctx, u, filter)
        if factor is not None:
            grad_x, _, sum_ux, _ = _bias_act_backward(
                grad_x, None, x, factor, needs_x, False, needs_factor, False, "linear", 1.0, None, ctx.backend
            )
    return grad_x, sum_u, sum_ux, sum_c


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of `torch.ops.spigan.fir_bias_act`."""
    _, _, _, noise, strength, seed, _ = ctx.saved_tensors
    needs_x, _, needs_factor, needs_noise, needs_strength, _, needs_bias, needs_add, *_ = ctx.needs_input_grad
    want_c = needs_noise or needs_strength
    sums = _differentiable_sums if torch.is_grad_enabled() else _sums
    grad_x, sum_u, sum_ux, sum_c = sums(ctx, grad, want_c)
    grad_noise = grad_strength = grad_bias = None
    if needs_strength:
        drawn = noise if seed is None else draw_noise(seed, sum_c.shape[0], ctx.size)
        grad_strength = (sum_c * drawn).sum().to(ctx.dtypes["noise_strength"])
    if needs_noise:
        grad_noise = sum_c if strength is None else sum_c * strength
        if ctx.noise_rows != sum_c.shape[0]:
            grad_noise = grad_noise.sum(0, keepdim=True)
        grad_noise = grad_noise.to(ctx.dtypes["noise"])
    if needs_bias:
        grad_bias = (sum_u if ctx.bias_ndim == 2 else sum_u.sum(0)).to(ctx.dtypes["bias"])
    return (
        grad_x if needs_x else None,
        None,
        sum_ux.to(ctx.dtypes["factor"]) if needs_factor else None,
        grad_noise,
        grad_strength,
        None,
        grad_bias,
        grad.to(ctx.dtypes["add"]) if needs_add else None,
        *(None,) * 10,
    )
