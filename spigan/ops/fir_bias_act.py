"""FIR resampling, a factor for each channel, noise, bias, activation, gain and clamp in one pass: what surrounds the
convolutions of StyleGAN2 (Karras et al. 2020b), forward and backward.

Twins: kernels/fir_bias_act.py, csrc/cpu/fir_bias_act.cpp, csrc/cuda/fir_bias_act.cu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops import backends
from spigan.ops.checks import check_index, check_tensor
from spigan.ops.library import address, define, dtype_number, launcher, library, on, why_transformed
from spigan.ops.philox_normal import philox_normal
from spigan.ops.upfirdn2d import upfirdn2d

LRELU_SLOPE = 0.2
_MAX_TAPS = 8  # kMaxTaps of csrc/operations.h


def fir_bias_act_reference(
    x: Tensor,
    *,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
    fir_gain: float = 1.0,
    factor: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Plain PyTorch definition of `fir_bias_act`."""
    dtype = x.dtype
    if filter is not None:
        x = upfirdn2d(x, filter, up=up, down=down, padding=padding, gain=fir_gain)
    if factor is not None:
        x = x * factor.to(dtype)[:, :, None, None]
    if noise is not None:
        # Multiplied in the wider of the two dtypes and rounded once.
        x = x + (noise if noise_strength is None else noise * noise_strength).to(dtype)
    if bias is not None:
        x = x + bias.to(dtype)[..., None, None]
    if activation == "lrelu":
        x = F.leaky_relu(x, LRELU_SLOPE)
    if gain != 1.0:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x if add is None else x + add.to(dtype)


def check_noise(
    noise: object, strength: object, seed: object, n: int, size: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments `noise`, `noise_strength` and `noise_seed` of an operation.

    Args:
        noise: [n, 1, *size] or [1, 1, *size], or None.
        strength: scalar tensor, or None.
        seed: integer or int64 scalar tensor, or None.

    Returns:
        (noise, strength, seed), the seed as int64 [1] on `device`.
    """
    if noise is not None:
        rows = n if isinstance(noise, Tensor) and noise.ndim and noise.shape[0] != 1 else 1
        noise = check_tensor("noise", noise, "[N or 1, 1, H', W']", shape=(rows, 1, *size), device=device)
    if strength is not None:
        strength = check_tensor("noise_strength", strength, "[]", shape=(), device=device)
    if seed is None:
        return noise, strength, None
    if noise is not None:
        raise ValueError("noise and noise_seed exclude each other: the noise is given, or drawn from the seed")
    if isinstance(seed, Tensor):
        seed = check_tensor("noise_seed", seed, "[]", shape=(), dtypes=(torch.int64,), device=device)
        return None, strength, seed.reshape(1)
    return None, strength, torch.full((1,), check_index("noise_seed", seed), device=device)


def draw_noise(seed: Tensor, n: int, size: tuple[int, int], backend: str | None = None) -> Tensor:
    """[n, 1, *size] float32 normals: pixel p of image i is element i H W + p of the stream of `seed`, int64 [1]."""
    return philox_normal((1, n * size[0] * size[1]), seed=seed, backend=backend).view(n, 1, *size)


def fir_bias_act(
    x: Tensor,
    *,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Sequence[int] = (0, 0),
    fir_gain: float = 1.0,
    factor: Tensor | None = None,
    noise: Tensor | None = None,
    noise_strength: Tensor | None = None,
    noise_seed: int | Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "linear",
    gain: float = 1.0,
    clamp: float | None = None,
    add: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What surrounds a convolution, in one pass over memory.

        y = clamp(gain act(factor fir_gain FIR(x) + noise_strength noise + bias)) + add

    Computed in the dtype of `x`, kernels at least in float32. The kernels write channels-last images.

    Args:
        x: [N, C, H, W].
        filter: [m, m] FIR filter, convolved as `upfirdn2d` does; None: no resampling.
        up: 1 or 2, upsampling factor before the filter.
        down: 1 or 2, downsampling factor after it.
        padding: zeros before and after, in both directions, on the upsampled grid; negative crops.
        fir_gain: factor of the filter.
        factor: [N, C].
        noise: [N, 1, H', W'] or [1, 1, H', W'].
        noise_strength: scalar tensor, factor of the noise.
        noise_seed: integer in [0, 2^63) or int64 scalar tensor instead of `noise`, which is then drawn: pixel p of
            image n is element n H' W' + p of `philox_normal`'s stream of this seed.
        bias: [C], or [N, C] with one for each image.
        activation: "linear" or "lrelu" (slope 0.2).
        gain: factor after the activation.
        clamp: bound of the absolute value; None for no bound.
        add: [N, C, H', W'] added at the end; with gradients for activation "linear" without clamp only.
        backend: "auto" or one of `BACKENDS`; default: see `spigan.ops.use_backend`.

    Returns:
        [N, C, H', W'] in the dtype of `x`; H' = floor((H up + sum(padding) - m) / down) + 1 with a filter, H without.
        Differentiable to any order in x, factor, noise, noise_strength, bias and add.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    check_tensor("x", x, "[N, C, H, W]")
    n, channels, height, width = x.shape
    if activation not in ("linear", "lrelu"):
        raise ValueError(f'activation must be "linear" or "lrelu", got {activation!r}')
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be positive or None, got {clamp}")
    before, after = padding
    if filter is None:
        if (up, down, before, after) != (1, 1, 0, 0):
            raise ValueError(f"up={up}, down={down} and padding={tuple(padding)} need a filter")
        size = (height, width)
    else:
        if up not in (1, 2) or down not in (1, 2):
            raise ValueError(f"up and down must be 1 or 2, got up={up} and down={down}")
        check_tensor("filter", filter, "[m, m]", device=x.device)
        taps = filter.shape[0]
        if taps == 0 or filter.shape[1] != taps:
            raise ValueError(f"filter must be square and not empty, got {list(filter.shape)}")
        size = tuple((s * up + before + after - taps) // down + 1 for s in (height, width))  # type: ignore[assignment]
        if min(size) < 1:
            raise ValueError(f"x of {height}x{width} is too small for a filter of {taps} taps and padding {padding}")
    if factor is not None:
        check_tensor("factor", factor, "[N, C]", shape=(n, channels), device=x.device)
    if bias is not None:
        per_image = isinstance(bias, Tensor) and bias.ndim == 2
        expected = (n, channels) if per_image else (channels,)
        check_tensor("bias", bias, "[N, C]" if per_image else "[C]", shape=expected, device=x.device)
    if add is not None:
        check_tensor("add", add, "[N, C, H', W']", shape=(n, channels, *size), device=x.device)
    noise, noise_strength, seed = check_noise(noise, noise_strength, noise_seed, n, size, x.device)

    tensors = (x, filter, factor, noise, noise_strength, bias, add)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad and add is not None and (activation != "linear" or clamp is not None):
        raise ValueError('add has gradients with activation "linear" and no clamp only')
    transformed = why_transformed(*tensors)

    def limit(name: str) -> str | None:
        if name not in backends.KERNELS:
            return None
        if transformed is not None:
            return transformed
        if name in ("triton", "cuda") and x.dtype == torch.float64:
            return "it takes float32, bfloat16 and float16, not float64"
        if filter is not None and filter.shape[0] > _MAX_TAPS:
            return f"it takes filters of at most {_MAX_TAPS} taps, got {filter.shape[0]}"
        if needs_grad and filter is not None and filter.requires_grad:
            return "it has no derivative with respect to the filter"
        if needs_grad and not gain > 0:
            return f"it has derivatives for a positive gain only, got {gain}"
        return None

    name = backends.choose("fir_bias_act", backend, x.device, limit)
    if (function := backends.function("fir_bias_act", name)) is not None:
        return function(
            x,
            filter=filter,
            up=up,
            down=down,
            padding=(before, after),
            fir_gain=fir_gain,
            factor=factor,
            noise=noise if seed is None else draw_noise(seed, n, size),
            noise_strength=noise_strength,
            bias=bias,
            activation=activation,
            gain=gain,
            clamp=clamp,
            add=add,
        )
    return torch.ops.spigan.fir_bias_act(
        x, filter, factor, noise, noise_strength, seed, bias, add,
        size, up, down, before, True, fir_gain, activation, gain, clamp, name,
    )  # fmt: skip


def upsample2d(x: Tensor, filter: Tensor, add: Tensor | None = None) -> Tensor:
    """x [N, C, H, W] -> [N, C, 2H, 2W], centred, brightness kept; plus `add`."""
    m = filter.shape[0]
    return fir_bias_act(x, filter=filter, up=2, padding=((m + 1) // 2, (m - 2) // 2), fir_gain=4.0, add=add)


def downsample2d(x: Tensor, filter: Tensor) -> Tensor:
    """x [N, C, H, W] -> [N, C, H/2, W/2], centred, brightness kept."""
    m = filter.shape[0]
    return fir_bias_act(x, filter=filter, down=2, padding=((m - 1) // 2, (m - 2) // 2))


# ---- Launching ----


def channels_last(x: Tensor) -> Tensor:
    """x [N, C, H, W] -> [N, H, W, C], contiguous."""
    return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)


def wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Contiguous and in the dtype in which kernels of images of `dtype` compute."""
    return None if tensor is None else tensor.to(torch.promote_types(dtype, torch.float32)).contiguous()


def slope_of(activation: str) -> float:
    """Slope of the activation's negative side."""
    return LRELU_SLOPE if activation == "lrelu" else 1.0


def launch_fir_bias_act(
    backend: str,
    out: Tensor | None,
    x: Tensor,
    *,
    filter: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    pad: int = 0,
    flip: bool = True,
    fir_gain: float = 1.0,
    factor: Tensor | None = None,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    slope: float = 1.0,
    gain: float = 1.0,
    clamp: float | None = None,
    next_factor: Tensor | None = None,
    add: Tensor | None = None,
    rgb: Tensor | None = None,
    rgb_weight: Tensor | None = None,
) -> None:
    """Run the kernel on tensors that are checked, contiguous and of the dtypes that it takes.

        out = next_factor clamp(gain act(factor fir_gain FIR(x) + strength noise + bias)) + add

    Args:
        backend: "cpp", "triton" or "cuda".
        out: [N, H', W', C]; None where only `rgb` is wanted. It may be `x` where no filter is.
        x: [N, H, W, C].
        pad: zeros before the first row and column of the upsampled x.
        flip: convolve with the filter; False: correlate.
        noise: wide [N or 1, ..., H', W'].
        seed: int64 [1].
        slope: of the activation's negative side.
        next_factor: wide [N, C], what the next layer scales its input by.
        rgb: float32 [N, H', W', R]: sums over channels of rgb_weight times what stands before `next_factor`.
        rgb_weight: float32 [N, R, C], R <= 4.
        (the others: as of `fir_bias_act`, wide).
    """
    shape = (out if out is not None else rgb).shape  # type: ignore[union-attr]
    n, height, width = shape[:3]
    if n == 0 or (x.numel() == 0 and (out is None or out.numel() == 0)):
        return
    clamp = math.inf if clamp is None else clamp
    with on(x.device):
        if backend == "triton":
            from spigan.kernels.fir_bias_act import fir_bias_act as run

            given = None if noise is None else noise.view(-1, height, width)
            run(
                out, rgb, x, filter, factor, given, seed, strength, bias, add, next_factor, rgb_weight,
                up=up, down=down, pad=pad, flip=flip, fir_gain=fir_gain, slope=slope, gain=gain, clamp=clamp,
            )  # fmt: skip
            return
        module, context = launcher(backend, x.device)
        channels = x.shape[3]
        module.fir_bias_act(
            address(out),
            dtype_number(module, x.dtype),
            [n, height, width, channels],
            address(x),
            list(x.shape[1:3]),
            address(filter),
            [1 if filter is None else filter.shape[0], up, down, pad],
            flip,
            fir_gain,
            address(factor),
            address(noise),
            0 if noise is None or noise.numel() == height * width else height * width,
            address(seed),
            address(strength),
            address(bias),
            channels if bias is not None and bias.ndim == 2 else 0,
            slope,
            gain,
            clamp,
            address(next_factor),
            address(add),
            address(rgb),
            address(rgb_weight),
            0 if rgb is None else rgb.shape[3],
            context,
        )


def _kernel(  # type: ignore[no-untyped-def]
    x, filter, factor, noise, noise_strength, noise_seed, bias, add,
    size, up, down, pad, flip, fir_gain, activation, gain, clamp, backend,
):  # fmt: skip
    dtype = x.dtype
    images = channels_last(x)
    out = x.new_empty((x.shape[0], *size, x.shape[1]))
    launch_fir_bias_act(
        backend,
        out,
        images,
        filter=None if filter is None else filter.to(torch.float32).contiguous(),
        up=up,
        down=down,
        pad=pad,
        flip=flip,
        fir_gain=fir_gain,
        factor=wide(factor, dtype),
        noise=wide(noise, dtype),
        seed=noise_seed,
        strength=wide(noise_strength, dtype),
        bias=wide(bias, dtype),
        slope=slope_of(activation),
        gain=gain,
        clamp=clamp,
        add=None if add is None else channels_last(add.to(dtype)),
    )
    return out.permute(0, 3, 1, 2)


def _fake(x, filter, factor, noise, noise_strength, noise_seed, bias, add, size, *_):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], *size, x.shape[1])).permute(0, 3, 1, 2)


define(
    "fir_bias_act(Tensor x, Tensor? filter, Tensor? factor, Tensor? noise, Tensor? noise_strength, "
    "Tensor? noise_seed, Tensor? bias, Tensor? add, SymInt[] size, SymInt up, SymInt down, SymInt pad, bool flip, "
    "float fir_gain, str activation, float gain, float? clamp, str backend) -> Tensor",
    _kernel,
    _fake,
)


# ---- Derivatives ----

_PART = 64  # pixels that one partial sum of the derivative kernels covers; on a GPU each is a block or more


def _backward_kernel(  # type: ignore[no-untyped-def]
    grad, out, x, factor, want_x, want_u, want_ux, want_c, activation, gain, clamp, backend
):  # fmt: skip
    dtype, wide_dtype = grad.dtype, torch.promote_types(grad.dtype, torch.float32)
    n, channels, height, width = grad.shape
    pixels = height * width
    parts = max(1, -(-pixels // _PART))
    images = channels_last(grad)
    result = channels_last(out) if out is not None else None
    inputs = channels_last(x.to(dtype)) if want_ux else None
    factor = wide(factor, dtype)
    grad_x = torch.empty_like(images) if want_x else images.new_empty(0)
    sum_u, sum_ux = (images.new_empty((n, parts, channels) if w else 0, dtype=wide_dtype) for w in (want_u, want_ux))
    sum_c = images.new_empty((n, pixels) if want_c else 0, dtype=wide_dtype)
    wanted = [t if w else None for t, w in ((grad_x, want_x), (sum_u, want_u), (sum_ux, want_ux), (sum_c, want_c))]
    if grad.numel() == 0:
        for tensor in (sum_u, sum_ux, sum_c):
            tensor.zero_()
    else:
        # Results that were clamped have the bound as their dtype rounds it.
        bound = math.inf if clamp is None else torch.tensor(clamp, dtype=dtype).item()
        end = {"slope": slope_of(activation), "gain": gain, "clamp": bound}
        with on(grad.device):
            if backend == "triton":
                from spigan.kernels.fir_bias_act import bias_act_backward as run

                flat = [None if t is None else t.view(n, pixels, channels) for t in (images, result, inputs)]
                run(None if not want_x else grad_x.view(n, pixels, channels), *wanted[1:], *flat, factor, **end)
            else:
                module, context = launcher(backend, grad.device)
                module.bias_act_backward(
                    *map(address, wanted),
                    dtype_number(module, dtype),
                    *map(address, (images, result, inputs, factor)),
                    **end,
                    size=[n, pixels, channels],
                    parts=parts,
                    **{"threads" if backend == "cpp" else "stream": context},
                )
    return (
        grad_x.permute(0, 3, 1, 2) if want_x else grad_x,
        sum_u.sum(1) if want_u else sum_u,
        sum_ux.sum(1) if want_ux else sum_ux,
        sum_c.view(n, 1, height, width) if want_c else sum_c,
    )


def _backward_fake(  # type: ignore[no-untyped-def]
    grad, out, x, factor, want_x, want_u, want_ux, want_c, activation, gain, clamp, backend
):  # fmt: skip
    dtype = torch.promote_types(grad.dtype, torch.float32)
    n, channels, height, width = grad.shape
    return (
        grad.new_empty((n, height, width, channels)).permute(0, 3, 1, 2) if want_x else grad.new_empty(0),
        grad.new_empty((n, channels) if want_u else 0, dtype=dtype),
        grad.new_empty((n, channels) if want_ux else 0, dtype=dtype),
        grad.new_empty((n, 1, height, width) if want_c else 0, dtype=dtype),
    )


define(
    "bias_act_backward(Tensor grad, Tensor? out, Tensor? x, Tensor? factor, bool want_x, bool want_u, bool want_ux, "
    "bool want_c, str activation, float gain, float? clamp, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, filter, factor, noise, strength, seed, bias, _, *options = inputs
    ctx.size, ctx.up, ctx.down, ctx.pad, ctx.flip, ctx.fir_gain, ctx.activation, ctx.gain, ctx.clamp, ctx.backend = (
        options
    )
    ctx.x_size = x.shape[2:]
    ctx.bias_ndim = None if bias is None else bias.ndim
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:8]]
    _, _, needs_factor, _, needs_strength, *_ = ctx.needs_input_grad
    # A linear end needs no result; what the other derivatives need only.
    linear = ctx.activation == "linear" and ctx.clamp is None
    ctx.noise_rows = None if noise is None else noise.shape[0]
    ctx.save_for_backward(
        x if needs_factor else None,
        filter,
        factor,
        noise if needs_strength else None,
        strength,
        seed if needs_strength else None,
        None if linear else output,
    )


def _derivative(out: Tensor, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Derivative of clamp(gain act(v)), told from its result (gain > 0), as a constant."""
    out = out.detach()
    slope = torch.where(out > 0, gain, gain * slope_of(activation)).to(out.dtype)
    return slope if clamp is None else slope * (out.abs() < clamp)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, filter, factor, noise, strength, seed, out = ctx.saved_tensors
    needs_x, _, needs_factor, needs_noise, needs_strength, _, needs_bias, needs_add, *_ = ctx.needs_input_grad
    want_c = needs_noise or needs_strength
    end = (ctx.activation, ctx.gain, ctx.clamp, ctx.backend)
    sum_u: Any = None
    sum_ux: Any = None
    sum_c: Any = None

    def transposed(u: Tensor) -> Tensor:
        """The FIR filter's transpose: up and down change places, the filter is turned round."""
        pad = filter.shape[0] - 1 - ctx.pad
        fir = (ctx.x_size, ctx.down, ctx.up, pad, not ctx.flip, ctx.fir_gain, "linear", 1.0, None, ctx.backend)
        return torch.ops.spigan.fir_bias_act(u, filter, None, None, None, None, None, None, *fir)

    if torch.is_grad_enabled():
        # Differentiable again: plain PyTorch and this operator itself.
        u = grad * (ctx.gain if out is None else _derivative(out, *end[:3]))
        v = u if filter is None else transposed(u)
        wide_dtype = torch.promote_types(u.dtype, torch.float32)
        sum_u = u.sum((2, 3), dtype=wide_dtype) if needs_bias else None
        sum_c = u.sum(1, keepdim=True, dtype=wide_dtype) if want_c else None
        sum_ux = (v * x).sum((2, 3), dtype=wide_dtype) if needs_factor else None
        grad_x = v if factor is None else v * factor.to(v.dtype)[:, :, None, None]
    elif filter is None:
        grad_x, sum_u, sum_ux, sum_c = torch.ops.spigan.bias_act_backward(
            grad, out, x, factor, needs_x, needs_bias, needs_factor, want_c, *end
        )
    else:
        u = grad
        if out is not None or ctx.gain != 1.0 or needs_bias or want_c:
            u, sum_u, _, sum_c = torch.ops.spigan.bias_act_backward(
                grad, out, None, None, needs_x or needs_factor, needs_bias, False, want_c, *end
            )
        if needs_x or needs_factor:
            grad_x = transposed(u)
            if factor is not None:
                grad_x, _, sum_ux, _ = torch.ops.spigan.bias_act_backward(
                    grad_x, None, x, factor, needs_x, False, needs_factor, False, "linear", 1.0, None, ctx.backend
                )

    grad_noise = grad_strength = grad_bias = None
    if needs_strength:
        drawn = noise if seed is None else draw_noise(seed, sum_c.shape[0], ctx.size)
        grad_strength = (sum_c * drawn).sum().to(ctx.dtypes[4])
    if needs_noise:
        grad_noise = sum_c if strength is None else sum_c * strength
        if ctx.noise_rows != sum_c.shape[0]:
            grad_noise = grad_noise.sum(0, keepdim=True)
        grad_noise = grad_noise.to(ctx.dtypes[3])
    if needs_bias:
        grad_bias = (sum_u if ctx.bias_ndim == 2 else sum_u.sum(0)).to(ctx.dtypes[6])
    return (
        grad_x if needs_x else None,
        None,
        sum_ux.to(ctx.dtypes[2]) if needs_factor else None,
        grad_noise,
        grad_strength,
        None,
        grad_bias,
        grad.to(ctx.dtypes[7]) if needs_add else None,
        *(None,) * 10,
    )


torch.library.register_autograd("spigan::fir_bias_act", _backward, setup_context=_setup_context, lib=library)
backends.register("fir_bias_act", "reference", backends.always_available, fir_bias_act_reference)
backends.register("fir_bias_act", "cpp", backends.extension_on_cpu)
backends.register("fir_bias_act", "triton", backends.triton_on_gpu)
backends.register("fir_bias_act", "cuda", backends.cuda_on_gpu)
