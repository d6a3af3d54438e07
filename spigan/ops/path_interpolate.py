"""Noise and the straight path in one pass: from clean images x_0 to x_T and the points i(t) between (paper's eq. 7).

Twins: csrc/common/path.h (arithmetic), csrc/cpu/path_interpolate.cpp, csrc/cuda/path_interpolate.cu,
kernels/path_interpolate.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spigan.ops.checks import FLOATS, check_index, check_tensor, check_times, dtype_names
from spigan.ops.library import launch
from spigan.ops.limits import MAX_PATH_TIMES
from spigan.ops.operation import Operation
from spigan.ops.philox_normal import philox_normal
from spigan.sde import VPSDE


def to_unit_range(x0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return images as floats in [-1, 1]: uint8 v becomes v / 127.5 - 1; floats are only cast to `dtype`."""
    return x0.to(dtype) / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0.to(dtype)


def path_interpolate_reference(
    x0: Tensor, noise: Tensor, flips: Tensor | None, times: Sequence[float], sde: VPSDE, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition: x_T = a(1) x_0 + s(1) e, i(t) = t x_0 + (1 - t) x_T, in float32 or better."""
    if flips is not None:
        x0 = torch.where(flips[:, None, None, None], x0.flip(3), x0)
    compute = torch.float64 if x0.dtype == torch.float64 else torch.float32
    mean_coef, std = sde.marginal(1.0)
    clean = to_unit_range(x0, compute)
    x_T = mean_coef * clean + std * noise.to(compute)
    i = torch.stack([t * clean + (1.0 - t) * x_T for t in times])
    return x_T.to(dtype), i.to(dtype)


def path_interpolate(
    x0: Tensor,
    times: Sequence[float],
    *,
    seed: int | None = None,
    offset: int = 0,
    noise: Tensor | None = None,
    flips: Tensor | None = None,
    sde: VPSDE = VPSDE(),
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the noisy end and interior points of the straight path from noise to image.

        x_T = a(1) x_0 + s(1) e,  e ~ N(0, I);    i(t) = t x_0 + (1 - t) x_T    (the paper's section 3.4, eq. 7)

    The noise is `philox_normal(x0.shape, seed=seed, offset=offset)`, the same on every backend.

    Args:
        x0: [N, C, H, W] clean images, either uint8 (v means v / 127.5 - 1) or float in [-1, 1].
        times: K increasing times in (0, 1]; i(1) = x_0.
        seed: Key of the noise, in [0, 2^63); required unless `noise` is given.
        offset: Index of the first element's noise in the seed's stream.
        noise: [N, C, H, W] e, used instead of drawing it.
        flips: bool [N], True where an image is first mirrored horizontally (the noise is not).
        sde: The forward process.
        dtype: Dtype of the results. The arithmetic is float32, or float64 for float64 images.
        backend: "auto" or one of `BACKENDS`; for the default see `spigan.ops.use_backend`. Only the reference accepts
            float64 images or results and more than 8 times.

    Returns:
        x_T [N, C, H, W] and i [K, N, C, H, W]. Differentiable to any order in a float `x0` and in `noise`.

    Raises:
        TypeError, ValueError: An argument has the wrong type or shape or is out of range.
        BackendUnavailable: A backend requested by name cannot run.
    """
    check_tensor("x0", x0, "[N, C, H, W]", dtypes=(torch.uint8, *FLOATS))
    times = check_times(times)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {dtype_names(FLOATS)}, got {dtype}")
    if noise is None:
        if seed is None:
            raise ValueError("path_interpolate needs a seed to draw the noise, or the noise itself")
        seed = check_index("seed", seed)
        offset = check_index("offset", offset)
    else:
        check_tensor("noise", noise, "[N, C, H, W]", shape=x0.shape, device=x0.device)
    if flips is not None:
        check_tensor("flips", flips, "[N]", shape=x0.shape[:1], dtypes=(torch.bool,), device=x0.device)
    if not isinstance(sde, VPSDE):
        raise TypeError(f"sde must be a spigan.VPSDE, got {type(sde).__name__}")

    name, function = _OPERATION.choose(backend, x0.device, (x0, noise), x0.dtype, dtype, len(times))
    if function is not None:
        if noise is None:
            assert seed is not None
            noise = philox_normal(x0.shape, seed=seed, offset=offset, device=x0.device, backend="reference")
        return function(x0, noise, flips, times, sde, dtype)
    if noise is not None:
        seed, offset, noise = 0, 0, noise.to(torch.float32)
    return _OPERATION.kernel(x0, noise, flips, times, *sde.marginal(1.0), seed, offset, dtype, name)


def _limit(backend: str, x0_dtype: torch.dtype, dtype: torch.dtype, times: int) -> str | None:
    if torch.float64 in (x0_dtype, dtype):
        return "it computes in float32; only the reference accepts float64 images or results"
    if times > MAX_PATH_TIMES:
        return f"it accepts at most {MAX_PATH_TIMES} times, got {times}"
    return None


def _empty(args: Any) -> tuple[Tensor, Tensor]:
    x0, dtype = args.x0, args.dtype
    return x0.new_empty(x0.shape, dtype=dtype), x0.new_empty((len(args.times), *x0.shape), dtype=dtype)


def _contiguous(args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x0, noise, flips = (None if x is None else x.contiguous() for x in (args.x0, args.noise, args.flips))
    assert x0 is not None
    return x0, noise, flips


def _compiled(args: Any) -> tuple[Tensor, Tensor]:
    x_T, i = _empty(args)
    x0, noise, flips = _contiguous(args)
    images, channels, height, width = x0.shape
    launch(
        args.backend, "path_interpolate", x_T, i, args.dtype, x0, x0.dtype, noise, flips, images, channels * height,
        width, list(args.times), args.mean_coef, args.std, args.seed, args.offset,
    )  # fmt: skip
    return x_T, i


def _triton(args: Any) -> tuple[Tensor, Tensor]:
    from spigan.kernels.path_interpolate import path_interpolate as interpolate

    x_T, i = _empty(args)
    interpolate(x_T, i, *_contiguous(args), tuple(args.times), args.mean_coef, args.std, args.seed, args.offset)
    return x_T, i


def _setup_context(ctx: Any, args: Any, output: Any) -> None:
    ctx.times, ctx.mean_coef, ctx.std = args.times, args.mean_coef, args.std
    ctx.x0_dtype, ctx.has_noise = args.x0.dtype, args.noise is not None
    ctx.save_for_backward(*(() if args.flips is None else (args.flips,)))


def _backward(ctx: Any, grad_x_T: Tensor, grad_i: Tensor) -> tuple[Tensor | None, ...]:
    # Plain PyTorch and linear, so that derivatives of any order follow.
    grad_x_T = grad_x_T.to(torch.float32)
    grad_clean = torch.zeros_like(grad_x_T)
    for t, grad in zip(ctx.times, grad_i.to(torch.float32).unbind(0), strict=True):
        grad_clean = grad_clean + t * grad
        grad_x_T = grad_x_T + (1.0 - t) * grad
    grad_noise = ctx.std * grad_x_T if ctx.has_noise else None
    grad_x0 = None
    if ctx.x0_dtype.is_floating_point:
        grad_x0 = grad_clean + ctx.mean_coef * grad_x_T
        for flips in ctx.saved_tensors:
            grad_x0 = torch.where(flips[:, None, None, None], grad_x0.flip(3), grad_x0)
        grad_x0 = grad_x0.to(ctx.x0_dtype)
    return grad_x0, grad_noise, *(None,) * 8


_OPERATION = Operation(
    "path_interpolate(Tensor x0, Tensor? noise, Tensor? flips, float[] times, float mean_coef, float std, SymInt seed, "
    "SymInt offset, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    reference=path_interpolate_reference,
    kernels={"cpp": _compiled, "triton": _triton, "cuda": _compiled},
    fake=_empty,
    limit=_limit,
    setup_context=_setup_context,
    backward=_backward,
)
