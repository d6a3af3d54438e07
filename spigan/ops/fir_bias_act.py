"""What surrounds the convolutions of StyleGAN2 (Karras et al. 2020b), in one pass: FIR resampling, a factor for each
channel, noise, bias, activation, gain and clamp.

Twins: kernels/fir_bias_act.py, csrc/cpu/fir_bias_act.cpp, csrc/cuda/fir_bias_act.cu.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops.bias_act_backward import backward, setup_context
from spigan.ops.checks import check_activation, check_clamp, check_tensor
from spigan.ops.layer_end import LRELU_SLOPE, Fir, LayerEnd, channels_last, finish_layer, wide
from spigan.ops.limits import MAX_TAPS
from spigan.ops.noise import check_noise, draw_noise
from spigan.ops.operation import Operation
from spigan.ops.upfirdn2d import upfirdn2d


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
    """Resample, scale, add noise and bias, activate: what surrounds a convolution, in one pass over memory.

        y = clamp(gain act(factor fir_gain FIR(x) + noise_strength noise + bias)) + add

    Computed in the dtype of `x`; kernels compute at least in float32 and write channels-last images.

    Args:
        x: [N, C, H, W].
        filter: [m, m] FIR filter, convolved as `upfirdn2d` does; None for no resampling.
        up: 1 or 2, upsampling factor before the filter.
        down: 1 or 2, downsampling factor after it.
        padding: Zeros before and after, in both directions, on the upsampled grid; negative values crop.
        fir_gain: Factor of the filter.
        factor: [N, C].
        noise: [N, 1, H', W'] or [1, 1, H', W'].
        noise_strength: Scalar tensor, factor of the noise.
        noise_seed: Integer in [0, 2^63) or int64 scalar tensor from which the noise is drawn, instead of `noise`: pixel
            p of image n is element n H' W' + p of `philox_normal`'s stream of this seed.
        bias: [C], or [N, C] with one for each image.
        activation: "linear" or "lrelu" (slope 0.2).
        gain: Factor after the activation.
        clamp: Bound of the absolute value; None for no bound.
        add: [N, C, H', W'] added at the end. With gradients, only for activation "linear" without clamp.
        backend: "auto" or one of `BACKENDS`; for the default see `spigan.ops.use_backend`.

    Returns:
        [N, C, H', W'] in the dtype of `x`; H' = floor((H up + sum(padding) - m) / down) + 1 with a filter, H without.
        Differentiable to any order in x, factor, noise, noise_strength, bias and add.

    Raises:
        TypeError, ValueError: An argument has the wrong type, shape, dtype or device, or is out of range.
        BackendUnavailable: A backend requested by name cannot run.
    """
    check_tensor("x", x, "[N, C, H, W]")
    check_activation(activation)
    check_clamp(clamp)
    before, after = padding
    size = _result_size(x, filter, up, down, before, after)
    _check_per_channel(x, factor, bias)
    n, channels = x.shape[:2]
    if add is not None:
        check_tensor("add", add, "[N, C, H', W']", shape=(n, channels, *size), device=x.device)
    noise, noise_strength, seed = check_noise(noise, noise_strength, noise_seed, n, size, x.device)
    tensors = (x, filter, factor, noise, noise_strength, bias, add)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if needs_grad and add is not None and (activation != "linear" or clamp is not None):
        raise ValueError('add has gradients only with activation="linear" and clamp=None')
    name, function = _OPERATION.choose(backend, x.device, tensors, x.dtype, filter, gain, needs_grad)
    if function is not None:
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
    return _OPERATION.kernel(
        x, filter, factor, noise, noise_strength, seed, bias, add,
        size, up, down, before, True, fir_gain, activation, gain, clamp, name,
    )  # fmt: skip


def upsample2d(x: Tensor, filter: Tensor, add: Tensor | None = None) -> Tensor:
    """Upsample x [N, C, H, W] to [N, C, 2H, 2W], centred and with its brightness, and add `add`."""
    m = filter.shape[0]
    return fir_bias_act(x, filter=filter, up=2, padding=((m + 1) // 2, (m - 2) // 2), fir_gain=4.0, add=add)


def downsample2d(x: Tensor, filter: Tensor) -> Tensor:
    """Downsample x [N, C, H, W] to [N, C, H/2, W/2], centred and with its brightness."""
    m = filter.shape[0]
    return fir_bias_act(x, filter=filter, down=2, padding=((m - 1) // 2, (m - 2) // 2))


def _result_size(x: Tensor, filter: Tensor | None, up: int, down: int, before: int, after: int) -> tuple[int, int]:
    """Check the arguments of the resampling and return (H', W')."""
    height, width = x.shape[2:]
    if filter is None:
        if (up, down, before, after) != (1, 1, 0, 0):
            raise ValueError(f"up={up}, down={down} and padding={(before, after)} need a filter")
        return height, width
    if up not in (1, 2) or down not in (1, 2):
        raise ValueError(f"up and down must be 1 or 2, got up={up} and down={down}")
    check_tensor("filter", filter, "[m, m]", device=x.device)
    taps = filter.shape[0]
    if taps == 0 or filter.shape[1] != taps:
        raise ValueError(f"filter must be square and not empty, got {list(filter.shape)}")
    new_height, new_width = ((s * up + before + after - taps) // down + 1 for s in (height, width))
    if min(new_height, new_width) < 1:
        raise ValueError(
            f"x of {height}x{width} is too small for a filter of {taps} taps and padding {(before, after)}"
        )
    return new_height, new_width


def _check_per_channel(x: Tensor, factor: Tensor | None, bias: Tensor | None) -> None:
    n, channels = x.shape[:2]
    if factor is not None:
        check_tensor("factor", factor, "[N, C]", shape=(n, channels), device=x.device)
    if bias is not None:
        per_image = isinstance(bias, Tensor) and bias.ndim == 2
        expected = (n, channels) if per_image else (channels,)
        check_tensor("bias", bias, "[N, C]" if per_image else "[C]", shape=expected, device=x.device)


def limit(backend: str, dtype: torch.dtype, filter: Tensor | None, gain: float, needs_grad: bool) -> str | None:
    """Return why the kernels of `backend` do not accept a call, or None if they do; `modulated_conv2d` shares it."""
    if backend != "cpp" and dtype == torch.float64:
        return "it accepts float32, bfloat16 and float16, not float64"
    if filter is not None and filter.shape[-1] > MAX_TAPS:
        return f"it accepts filters of at most {MAX_TAPS} taps, got {filter.shape[-1]}"
    if needs_grad and filter is not None and filter.requires_grad:
        return "it has no derivative with respect to the filter"
    if needs_grad and not gain > 0:
        return f"it has derivatives only for a positive gain, got {gain}"
    return None


def _kernel(args: Any) -> Tensor:
    x, dtype, fir = args.x, args.x.dtype, None
    if args.filter is not None:
        fir = Fir(
            filter=args.filter.to(torch.float32).contiguous(),
            up=args.up,
            down=args.down,
            pad=args.pad,
            flip=args.flip,
            gain=args.fir_gain,
        )
    end = LayerEnd(
        factor=wide(args.factor, dtype),
        noise=wide(args.noise, dtype),
        seed=args.noise_seed,
        strength=wide(args.noise_strength, dtype),
        bias=wide(args.bias, dtype),
        activation=args.activation,
        gain=args.gain,
        clamp=args.clamp,
        add=None if args.add is None else channels_last(args.add.to(dtype)),
    )
    out = x.new_empty((x.shape[0], *args.size, x.shape[1]))
    finish_layer(args.backend, out, channels_last(x), end, fir=fir)
    return out.permute(0, 3, 1, 2)


def _fake(args: Any) -> Tensor:
    return args.x.new_empty((args.x.shape[0], *args.size, args.x.shape[1])).permute(0, 3, 1, 2)


_OPERATION = Operation(
    "fir_bias_act(Tensor x, Tensor? filter, Tensor? factor, Tensor? noise, Tensor? noise_strength, "
    "Tensor? noise_seed, Tensor? bias, Tensor? add, SymInt[] size, SymInt up, SymInt down, SymInt pad, bool flip, "
    "float fir_gain, str activation, float gain, float? clamp, str backend) -> Tensor",
    reference=fir_bias_act_reference,
    kernels=dict.fromkeys(("cpp", "triton", "cuda"), _kernel),
    fake=_fake,
    limit=limit,
    setup_context=setup_context,
    backward=backward,
)
