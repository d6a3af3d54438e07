"""Noise and straight path in one pass: clean images x_0 -> x_T and the points i(t) between them (the paper's eq. 7).

Twins: csrc/common/path.h (arithmetic), csrc/cpu/path_interpolate.cpp, csrc/cuda/path_interpolate.cu,
kernels/path_interpolate.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spigan.ops import backends
from spigan.ops.checks import FLOATS, check_index, check_tensor, check_times, dtype_names
from spigan.ops.library import address, define, dtype_number, launcher, library, on, why_transformed
from spigan.ops.philox_normal import philox_normal
from spigan.sde import VPSDE


def to_unit_range(x0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images as floats in [-1, 1]: uint8 v becomes v / 127.5 - 1, floats are only cast to `dtype`."""
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
    """Noisy end and interior points of the straight path from noise to image.

        x_T = a(1) x_0 + s(1) e,  e ~ N(0, I);    i(t) = t x_0 + (1 - t) x_T    (the paper's section 3.4, eq. 7)

    The noise is that of `philox_normal(x0.shape, seed=seed, offset=offset)`: the same on every backend.

    Args:
        x0: [N, C, H, W] clean images; uint8 (v means v / 127.5 - 1) or float in [-1, 1].
        times: K increasing times in (0, 1]; i(1) = x_0.
        seed: key of the noise, in [0, 2^63); needed unless `noise` is given.
        offset: index in the seed's stream of the first element's noise.
        noise: [N, C, H, W] e to use instead of drawing it.
        flips: bool [N], True where an image is mirrored horizontally first (the noise is not).
        sde: the forward process.
        dtype: dtype of the results; the arithmetic is float32, or float64 for float64 images.
        backend: "auto" or one of `BACKENDS`; default: see `spigan.ops.use_backend`. float64 images or results and more
            than 8 times are for the reference alone.

    Returns:
        x_T [N, C, H, W] and i [K, N, C, H, W]. Differentiable to any order in a float `x0` and in `noise`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or range.
        BackendUnavailable: a backend asked for by name cannot run.
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

    transformed = why_transformed(x0, noise)

    def limit(name: str) -> str | None:
        if name in backends.KERNELS and transformed is not None:
            return transformed
        if name in backends.KERNELS and torch.float64 in (x0.dtype, dtype):
            return "it computes in float32: float64 images or results are for the reference"
        if name in backends.KERNELS and len(times) > _MAX_TIMES:
            return f"it takes at most {_MAX_TIMES} times, got {len(times)}"
        return None

    name = backends.choose("path_interpolate", backend, x0.device, limit)
    if (function := backends.function("path_interpolate", name)) is not None:
        if noise is None:
            assert seed is not None
            noise = philox_normal(x0.shape, seed=seed, offset=offset, device=x0.device, backend="reference")
        return function(x0, noise, flips, times, sde, dtype)
    if noise is not None:
        seed, offset, noise = 0, 0, noise.to(torch.float32)
    return torch.ops.spigan.path_interpolate(x0, noise, flips, times, *sde.marginal(1.0), seed, offset, dtype, name)


_MAX_TIMES = 8  # kMaxPathTimes of csrc/common/path.h


def _kernel(
    x0: Tensor,
    noise: Tensor | None,
    flips: Tensor | None,
    times: Sequence[float],
    mean_coef: float,
    std: float,
    seed: int,
    offset: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    x0 = x0.contiguous()
    noise = None if noise is None else noise.contiguous()
    flips = None if flips is None else flips.contiguous()
    x_T = x0.new_empty(x0.shape, dtype=dtype)
    i = x0.new_empty((len(times), *x0.shape), dtype=dtype)
    with on(x0.device):
        if backend == "triton":
            from spigan.kernels.path_interpolate import path_interpolate as interpolate

            interpolate(x_T, i, x0, noise, flips, tuple(times), mean_coef, std, seed, offset)
        else:
            module, context = launcher(backend, x0.device)
            images, channels, height, width = x0.shape
            module.path_interpolate(
                address(x_T),
                address(i),
                dtype_number(module, dtype),
                address(x0),
                dtype_number(module, x0.dtype),
                address(noise),
                address(flips),
                images,
                channels * height,
                width,
                list(times),
                mean_coef,
                std,
                seed,
                offset,
                context,
            )
    return x_T, i


def _fake(x0, noise, flips, times, mean_coef, std, seed, offset, dtype, backend):  # type: ignore[no-untyped-def]
    return x0.new_empty(x0.shape, dtype=dtype), x0.new_empty((len(times), *x0.shape), dtype=dtype)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x0, noise, flips, ctx.times, ctx.mean_coef, ctx.std, *_ = inputs
    ctx.x0_dtype, ctx.has_noise = x0.dtype, noise is not None
    ctx.save_for_backward(*(() if flips is None else (flips,)))


def _backward(ctx, grad_x_T, grad_i):  # type: ignore[no-untyped-def]
    # Plain PyTorch, and linear: derivatives of any order follow.
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


define(
    "path_interpolate(Tensor x0, Tensor? noise, Tensor? flips, float[] times, float mean_coef, float std, SymInt seed, "
    "SymInt offset, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
torch.library.register_autograd("spigan::path_interpolate", _backward, setup_context=_setup_context, lib=library)
backends.register("path_interpolate", "reference", backends.always_available, path_interpolate_reference)
backends.register("path_interpolate", "cpp", backends.extension_on_cpu)
backends.register("path_interpolate", "triton", backends.triton_on_gpu)
backends.register("path_interpolate", "cuda", backends.cuda_on_gpu)
