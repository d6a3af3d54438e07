"""The noise of a layer: given, or drawn from a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from spigan.ops.checks import check_index, check_tensor
from spigan.ops.philox_normal import philox_normal


def check_noise(
    noise: object, strength: object, seed: object, n: int, size: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Check the arguments `noise`, `noise_strength` and `noise_seed` of an operation.

    Args:
        noise: [n, 1, *size] or [1, 1, *size], or None.
        strength: Scalar tensor, or None.
        seed: Integer or int64 scalar tensor, or None.

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
        raise ValueError("noise and noise_seed exclude each other: give the noise, or the seed to draw it from")
    if isinstance(seed, Tensor):
        seed = check_tensor("noise_seed", seed, "[]", shape=(), dtypes=(torch.int64,), device=device)
        return None, strength, seed.reshape(1)
    return None, strength, torch.full((1,), check_index("noise_seed", seed), device=device)


def draw_noise(seed: Tensor, n: int, size: tuple[int, int], backend: str | None = None) -> Tensor:
    """Draw float32 normals [n, 1, *size]: pixel p of image i is element i H W + p of the stream of seed, int64 [1]."""
    return philox_normal((1, n * size[0] * size[1]), seed=seed, backend=backend).view(n, 1, *size)
