"""Interpolations: from h(0) to h(1), between two z, between two h(1), and along the path that training uses.

These are Figs. 9, 10, 11 and 4 of the paper. Every function returns rows of images, uint8 [R, S, C, H, W] on the CPU.
`save_rows` writes them as a picture or an animation. The generator evaluates `Sampler.batch_size` images at a time, so
only the memory for the result grows with the number of images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from spigan.images import ANIMATIONS, display_scale, make_grid, save_animation, save_png, to_uint8
from spigan.models.load import Model
from spigan.ops import path_interpolate, philox_normal, use_backend
from spigan.ops.path_interpolate import to_unit_range
from spigan.sampling.sampler import Sampler
from spigan.sampling.seeds import resolve_seeds
from spigan.sde import VPSDE

Mix = Literal["spherical", "linear"]
PixelNoise = Literal["stored", "own"]
Steps = int | Sequence[float]
"""The number S of evenly spaced values from 0 to 1, as in `torch.linspace(0, 1, S)`; or S values in [0, 1]."""


def interpolate_time(
    seeds: Sequence[int],
    steps: Steps = 9,
    *,
    noise: PixelNoise = "stored",
    model: Model = None,
    **options: Any,
) -> Tensor:
    """Go from noise to image: from h(0) to h(1) for a fixed z (Fig. 9).

    On the learned path, the ODE is solved once, through all the times. If the times are close together, the solver
    takes shorter steps than in `sample`, and the last image equals that of `sample` up to the error of the solver.

    On the analytic path, the row is t G(h) + (1 - t) z, and begins with z itself. With path_latent="1" it is a
    cross-fade from z to one and the same image, G(h(1)).

    Args:
        seeds: R seeds, one for the z of each row.
        steps: number S of times 0, 1 / (S - 1), ..., 1; or a list of S times in [0, 1].
        noise: the generator's per-pixel noise on the learned path, from which it makes the noise of i(t). stored: the
            same for all seeds, as in `sample`; own: each seed's own, as in training, and the same along a row.
        model: as in `spigan.sample`.
        **options: options of `spigan.Sampler`: batch_size, dtype, backend, device.

    Returns:
        uint8 [R, S, C, H, W].

    Raises:
        ValueError: if the model has no time (mapping="mlp" on the learned path), or an argument is out of range.
    """
    if noise not in ("stored", "own"):
        raise ValueError(f'noise must be "stored" or "own", got {noise!r}')
    sampler = _sampler(model, options)
    config = sampler.model.config
    if config.timeless:
        raise ValueError('mapping="mlp" has no time, so there is no h(0) to h(1): interpolate z or h instead')
    if config.path == "analytic" and noise == "own":
        raise ValueError('path="analytic" takes the noise of a row from its z: leave out noise="own"')
    times = _weights(steps).tolist()
    rows = []
    for seed, z in zip(map(int, seeds), _noise(sampler, seeds).split(1), strict=True):
        if config.path == "analytic":
            rows.append(_analytic_row(sampler, z, times))
        elif noise == "own":
            rows.append(_row_of_own_noise(sampler, _latents(sampler, z, times)[:, 0], seed))
        else:
            rows.append(sampler.of_latents(_latents(sampler, z, times)[:, 0], to="cpu"))
    return torch.stack(rows)


def interpolate_z(
    seeds: Sequence[int], steps: Steps = 9, *, mix: Mix = "spherical", model: Model = None, **options: Any
) -> Tensor:
    """Interpolate between the noise z' of one seed and the noise z'' of the next (Fig. 10).

    spherical: z = cos(a pi / 2) z' + sin(a pi / 2) z''. Like z' and z'', it is standard normal for every a.
    linear: z = (1 - a) z' + a z'', as in the paper. Its variance (1 - a)^2 + a^2 drops to 1/2 in the middle.

    Args:
        seeds: R + 1 seeds. Row i goes from the i-th seed to the next.
        steps: number S of values a = 0, 1 / (S - 1), ..., 1; or a list of S values in [0, 1].
        mix: "spherical" or "linear".
        model: as in `spigan.sample`.
        **options: options of `spigan.Sampler`: batch_size, dtype, backend, device.

    Returns:
        uint8 [R, S, C, H, W]. A row begins and ends with the images of its two seeds.

    Raises:
        ValueError: if an argument is out of range.
    """
    if mix not in ("spherical", "linear"):
        raise ValueError(f'mix must be "spherical" or "linear", got {mix!r}')
    sampler = _sampler(model, options)
    z = _noise(sampler, _several(seeds))
    return _between(sampler, z, steps, spherical if mix == "spherical" else linear, sampler.of_noise)


def interpolate_h(seeds: Sequence[int], steps: Steps = 9, *, model: Model = None, **options: Any) -> Tensor:
    """Interpolate between the latent vectors of one seed and the next (Fig. 11): h(1) = (1 - a) h(1)' + a h(1)''.

    Args:
        seeds: R + 1 seeds. Row i goes from the i-th seed to the next.
        steps: number S of values a = 0, 1 / (S - 1), ..., 1; or a list of S values in [0, 1].
        model: as in `spigan.sample`.
        **options: options of `spigan.Sampler`: batch_size, dtype, backend, device.

    Returns:
        uint8 [R, S, C, H, W]. A row begins and ends with the images of its two seeds.

    Raises:
        ValueError: if an argument is out of range.
    """
    sampler = _sampler(model, options)
    h = torch.cat([_latents(sampler, z) for z in _noise(sampler, _several(seeds)).split(sampler.batch_size)])
    return _between(sampler, h, steps, linear, sampler.of_latents)


def forward_path(images: Tensor, seeds: Sequence[int], steps: int = 9, *, sde: VPSDE = VPSDE()) -> Tensor:
    """Go from x_0 to x_T along the SDE, and along the straight path that the discriminator sees in training (Fig. 4).

        SDE:            x_t = a(t) x_0 + s(t) e,                      t = 0, 1 / (S - 1), ..., 1
        straight path:  i(1 - t) = (1 - t) x_0 + t x_T,  x_T = x_1    (eq. 7)

    Both have the same ends and the same noise e. Pixels outside [-1, 1] are clamped.

    Args:
        images: uint8 [N, C, H, W] clean images x_0.
        seeds: N seeds, one for the noise e of each image.
        steps: S, the number of images per row.
        sde: the forward process.

    Returns:
        uint8 [2 N, S, C, H, W], two rows for each image: first along the SDE, then along the straight path.

    Raises:
        ValueError: if an argument is out of range.
    """
    seeds = resolve_seeds(len(images), seeds)
    times = _weights(steps).tolist()
    noise = philox_normal(images.shape, seed=torch.tensor(seeds, dtype=torch.int64, device=images.device))
    clean = to_unit_range(images)
    diffused = torch.stack([a * clean + s * noise for a, s in map(sde.marginal, times)])
    # The reference backend has no limit on the number of times.
    x_T, i = path_interpolate(
        images, [1.0 - t for t in reversed(times[:-1])], noise=noise, sde=sde, backend="reference"
    )
    straight = torch.cat([i.flip(0), x_T[None]])
    return to_uint8(torch.stack([diffused, straight])).permute(2, 0, 1, 3, 4, 5).flatten(0, 1).cpu()


def linear(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return (1 - a) first + a second for every a in `weights` [S], as [S, *first.shape]."""
    a = weights.to(first).view(-1, *(1,) * first.ndim)
    return (1.0 - a) * first + a * second


def spherical(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Return cos(a pi / 2) first + sin(a pi / 2) second for every a in `weights` [S], as [S, *first.shape].

    The result is standard normal if `first` and `second` are standard normal and independent.
    """
    angle = weights.double().view(-1, *(1,) * first.ndim) * (math.pi / 2)
    return angle.cos().to(first) * first + angle.sin().to(first) * second


def save_rows(rows: Tensor, out: str | Path, *, columns: int | None = None, frame_time: int = 80) -> Path:
    """Write rows of images as a grid (.png), or as an animation that plays forwards and backwards (.gif, .webp).

    Args:
        rows: uint8 [R, S, C, H, W] images.
        out: the file to write.
        columns: for an animation, which shows all rows at once: how many images lie side by side in a frame. By
            default, frames are about square.
        frame_time: for an animation: how long each frame is shown, in milliseconds.

    Returns:
        `out`.

    Raises:
        ValueError: if `out` has any other suffix.
    """
    out = Path(out)
    check_suffix(out)
    scale = display_scale(rows.shape[-1])
    if out.suffix.lower() not in ANIMATIONS:
        return save_png(make_grid(rows.flatten(0, 1), columns=rows.shape[1], scale=scale), out)
    frames = [make_grid(images, columns=columns, scale=scale) for images in rows.unbind(1)]
    return save_animation(torch.stack([*frames, *frames[-2:0:-1]]), out, frame_time=frame_time)


def check_suffix(out: Path) -> None:
    """Raise ValueError unless `save_rows` can write `out`."""
    if out.suffix.lower() not in (".png", *ANIMATIONS):
        raise ValueError(f"{out}: expected a .png (a grid), or a .gif or .webp (an animation)")


def _sampler(model: Model, options: dict[str, Any]) -> Sampler:
    return Sampler(model, output="uint8", **options)


def _weights(steps: Steps) -> Tensor:
    """Return float64 [S]: 0, 1 / (S - 1), ..., 1, or the given values."""
    if not isinstance(steps, int):
        if not steps or not all(0.0 <= weight <= 1.0 for weight in steps):
            raise ValueError(f"steps must be a number, or a non-empty list of values in [0, 1], got {steps}")
        return torch.tensor(steps, dtype=torch.float64)
    if steps < 2:
        raise ValueError(f"steps must be at least 2, for the two ends, got {steps}")
    return torch.linspace(0.0, 1.0, steps, dtype=torch.float64)


def _several(seeds: Sequence[int]) -> list[int]:
    """Return the seeds, after checking that there are at least two, and that neighbours differ."""
    seeds = resolve_seeds(None, seeds)
    if len(seeds) < 2 or any(a == b for a, b in pairwise(seeds)):
        raise ValueError(f"at least two seeds are needed, each different from the one before it, got {seeds}")
    return seeds


def _noise(sampler: Sampler, seeds: Sequence[int]) -> Tensor:
    """Return the noise z [R, *z_shape] of seeds, as `sample` draws it."""
    numbers = torch.tensor(resolve_seeds(None, seeds), dtype=torch.int64, device=sampler.device)
    if not len(numbers):
        raise ValueError("at least one seed is needed, got none")
    return philox_normal((len(numbers), *sampler.model.config.z_shape), seed=numbers, backend=sampler.backend)


def _latents(sampler: Sampler, z: Tensor, t: float | list[float] = 1.0) -> Tensor:
    """Return the latent vectors h of z: [N, D] at one time, or [K, N, D] at K times."""
    with torch.inference_mode(), use_backend(sampler.backend):
        return sampler.model.mapping(z, t)


def _analytic_row(sampler: Sampler, z: Tensor, times: list[float]) -> Tensor:
    """Return uint8 [S, C, H, W] of z [1, C, H, W] on the analytic path, `batch_size` times at once."""
    options: dict[str, Any] = {"dtype": sampler.dtype, "backend": sampler.backend, "output": "uint8", "batch_size": 1}
    parts = [times[start : start + sampler.batch_size] for start in range(0, len(times), sampler.batch_size)]
    return torch.cat([Sampler(sampler.model, t=part, **options).of_noise(z, to="cpu")[:, 0] for part in parts])


def _row_of_own_noise(sampler: Sampler, h: Tensor, seed: int) -> Tensor:
    """Return uint8 [S, C, H, W] of h [S, D], where the generator's per-pixel noise is that of a seed."""
    generator, start = sampler.model.generator, math.prod(sampler.model.config.z_shape)
    noise = []
    for side in generator.layer_sizes():  # numbers of the seed's stream that follow those of its z
        noise.append(philox_normal((1, 1, side, side), seed=seed, offset=start, device=sampler.device))
        start += side * side
    autocast = torch.autocast(sampler.device.type, sampler.dtype, enabled=sampler.dtype != torch.float32)
    with torch.inference_mode(), autocast, use_backend(sampler.backend):
        return torch.cat([to_uint8(generator(part, noise)).cpu() for part in h.split(sampler.batch_size)])


def _between(
    sampler: Sampler,
    ends: Tensor,
    steps: Steps,
    mix: Callable[[Tensor, Tensor, Tensor], Tensor],
    images_of: Callable[..., Tensor],
) -> Tensor:
    """Return rows of images between ends [R + 1, ...]. Only one batch of mixtures is in memory at a time."""
    parts = _weights(steps).split(sampler.batch_size)
    return torch.stack(
        [
            torch.cat([images_of(mix(first, second, part), to="cpu") for part in parts])
            for first, second in pairwise(ends)
        ]
    )
