"""Noise and straight path in one pass: clean images x_0 -> x_T and the points i(t) between them (the paper's eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spigan.ops import backends
from spigan.ops.checks import FLOATS, check_index, check_tensor, check_times, dtype_names
from spigan.ops.philox_normal import philox_normal
from spigan.sde import VPSDE


def to_unit_range(x0: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images as floats in [-1, 1]: uint8 v becomes v / 127.5 - 1, floats are only cast to `dtype`."""
    return x0.to(dtype) / 127.5 - 1.0 if x0.dtype == torch.uint8 else x0.to(dtype)


def path_interpolate_reference(
    x0: Tensor, noise: Tensor, times: Sequence[float], sde: VPSDE, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition: x_T = a(1) x_0 + s(1) e, i(t) = t x_0 + (1 - t) x_T, in float32 or better."""
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
        sde: the forward process.
        dtype: dtype of the results; the arithmetic is float32, or float64 for float64 images.
        backend: "auto" or "reference"; default: see `spigan.ops.use_backend`.

    Returns:
        x_T [N, C, H, W] and i [K, N, C, H, W]. Differentiable in a float `x0` and in `noise`.

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
    backends.choose("path_interpolate", backend, x0.device)
    if noise is None:
        assert seed is not None
        noise = philox_normal(x0.shape, seed=seed, offset=offset, device=x0.device)
    return path_interpolate_reference(x0, noise, times, sde, dtype)


backends.register("path_interpolate", "reference", backends.always_available)
