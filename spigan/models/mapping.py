"""Mapping networks: noise image z = i(0) -> latent vector h(t).

`ODEMapping` is the paper's mapping network (section 3.3, eq. 6). `MLPMapping` is StyleGAN2's, for the baseline without
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from spigan.models.layers import Conv2d, Linear, normalize_2nd_moment
from spigan.ops import rk4_mlp
from spigan.ops.rk4_mlp import integrate, mlp_vector_field

Times = float | Sequence[float]

_MAX_STEPS = 10_000  # for dopri5, which would never end with weights that have exploded


def check_unit_times(times: list[float]) -> None:
    """Check times at which the mapping returns h. Unlike those of `spigan.ops`, they may be 0, which gives h(0).

    Raises:
        ValueError: if there are none, or one is outside [0, 1].
    """
    if not times or not all(0.0 <= time <= 1.0 for time in times):
        raise ValueError(f"t must be a time in [0, 1] or a non-empty list of such times, got {times}")


def euler_step(field: Callable[[Tensor, float], Tensor], h: Tensor, t: float, dt: float) -> Tensor:
    """Take one step of the explicit Euler method."""
    return h + dt * field(h, t)


class ImageEmbedding(nn.Module):
    """The network o: noise image -> h(0).

    The paper gives the layer sizes in an appendix that is not available, so they are this project's choice. So is the
    learning rate multiplier: without it, training makes h almost the same for every z (docs/models.md).

    Args:
        resolution: H = W of the image.
        img_channels: C, number of image channels.
        dim_h: D, length of h.
        channels: width of the first convolution. Each further convolution doubles the width, up to D.
        lr_multiplier: learning rate, relative to the optimiser's.
    """

    def __init__(self, resolution: int, img_channels: int, dim_h: int, channels: int, lr_multiplier: float) -> None:
        super().__init__()
        width_in, convs = img_channels, []
        size, width = resolution, channels
        while size > 4:
            convs.append(Conv2d(width_in, width, 3, stride=2, activation="lrelu", lr_multiplier=lr_multiplier))
            size, width_in, width = size // 2, width, min(2 * width, dim_h)
        self.convs = nn.Sequential(*convs)
        self.linear = Linear(width_in * 16, dim_h, lr_multiplier=lr_multiplier)

    def forward(self, z: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, D]."""
        return normalize_2nd_moment(self.linear(self.convs(z).flatten(1)))


class ODEMapping(nn.Module):
    """Neural ODE h(0) = o(z), dh/dt = r(h, t), whose state at time t is the style of the image i(t).

    r has `layers` layers of width D with equalised learning rate, each of which computes y = W y + b + t u, with
    activations between them (see `spigan.ops.rk4_mlp`).

    Args:
        resolution, img_channels: shape of z.
        dim_h: D, length of h.
        layers: L, number of layers of r.
        steps: number of solver steps over [0, 1] (for rk4 and euler).
        solver: "rk4", "euler" or "dopri5". dopri5 is adaptive and comes from torchdiffeq. The whole batch shares one
            step size, so an image depends on its neighbours, within `tolerance`.
        activation: "silu", "lrelu", "tanh" or "softplus".
        embed_channels: width of o's first convolution.
        lr_multiplier: learning rate of o and r, relative to the optimiser's (StyleGAN2's mapping uses 0.01).
        tolerance: relative and absolute tolerance of dopri5.
        time_init: initial standard deviation of the time's weights.
    """

    def __init__(
        self,
        *,
        resolution: int,
        img_channels: int,
        dim_h: int,
        layers: int,
        steps: int,
        solver: str,
        activation: str,
        embed_channels: int,
        lr_multiplier: float,
        tolerance: float,
        time_init: float = 1.0,
    ) -> None:
        super().__init__()
        self.embed = ImageEmbedding(resolution, img_channels, dim_h, embed_channels, lr_multiplier)
        self.weight = nn.Parameter(torch.randn(layers, dim_h, dim_h) / lr_multiplier)
        self.bias = nn.Parameter(torch.zeros(layers, dim_h))
        self.time_weight = nn.Parameter(torch.randn(layers, dim_h) / lr_multiplier * time_init)
        self.steps, self.solver, self.activation = steps, solver, activation
        self.weight_gain = lr_multiplier / dim_h**0.5
        # By default, the weights of the time start with variance 1, whereas those of the D other inputs start with
        # 1 / D. The time then moves h about as far as a change of z does. Otherwise the generator learns late to tell
        # the times apart.
        self.bias_gain = self.time_gain = lr_multiplier
        self.tolerance = tolerance

    def forward(self, z: Tensor, t: Times = 1.0) -> Tensor:
        """Return h at one or several times. The ODE is solved once, from 0 through all of them.

        Args:
            z: [N, C, H, W] noise images.
            t: time in [0, 1], or K times in any order. h(0) = o(z).

        Returns:
            [N, D] for a single time, or [K, N, D] for K times.

        Raises:
            ImportError: if the solver is dopri5 and torchdiffeq is not installed.
            ValueError: if a time is outside [0, 1], or dopri5 does not reach it.
        """
        with torch.autocast(z.device.type, enabled=False):
            h0 = self.embed(z.to(self.weight.dtype))
            if isinstance(t, (int, float)):
                return self._solve(h0, [float(t)])[0]
            return self._solve(h0, [float(time) for time in t])

    def _solve(self, h0: Tensor, times: list[float]) -> Tensor:
        check_unit_times(times)
        grid = sorted({time for time in times if time > 0.0})
        states = {0.0: h0}
        if grid:
            states.update(zip(grid, self._integrate(h0, grid).unbind(0), strict=True))
        return torch.stack([states[time] for time in times])

    def _integrate(self, h0: Tensor, grid: list[float]) -> Tensor:
        parameters = (self.weight * self.weight_gain, self.bias * self.bias_gain, self.time_weight * self.time_gain)
        if self.solver == "rk4":
            return rk4_mlp(h0, *parameters, grid, steps=self.steps, activation=self.activation)

        def field(h: Tensor, t: float | Tensor) -> Tensor:
            return mlp_vector_field(h, t, *parameters, self.activation)

        if self.solver == "euler":
            return integrate(euler_step, field, h0, grid, self.steps)
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError('the solver "dopri5" needs torchdiffeq: pip install "spigan[ode]"') from error
        if h0.shape[0] == 0:
            return h0.expand(len(grid), *h0.shape)  # torchdiffeq cannot choose a step size for an empty batch
        times = torch.tensor([0.0, *grid], dtype=h0.dtype, device=h0.device)
        options = {"rtol": self.tolerance, "atol": self.tolerance, "options": {"max_num_steps": _MAX_STEPS}}
        try:
            return odeint(lambda t, h: field(h, t), h0, times, method="dopri5", **options)[1:]
        except AssertionError as error:  # torchdiffeq raises it if the steps are too small or too many
            raise ValueError(f"dopri5 does not reach t = {grid[-1]:g} with these weights ({error}): use rk4") from error


class MLPMapping(nn.Module):
    """StyleGAN2's mapping network: normalised z through `layers` leaky ReLU layers, without time.

    Args:
        dim_h: D, the length of h.
        layers: number of layers.
        lr_multiplier: learning rate, relative to the optimiser's.
        dim_z: M, the number of values of one z. More than D are folded to D (see `fold`). Default: D.
    """

    def __init__(self, *, dim_h: int, layers: int, lr_multiplier: float, dim_z: int | None = None) -> None:
        super().__init__()
        widths = [min(dim_h, dim_z or dim_h)] + [dim_h] * layers
        self.layers = nn.Sequential(
            *(Linear(wide, out, activation="lrelu", lr_multiplier=lr_multiplier) for wide, out in pairwise(widths))
        )
        self.dim_in = widths[0]

    def forward(self, z: Tensor, t: Times = 1.0) -> Tensor:
        """Map z [N, ...], M values each, to [N, D] for t = 1, or to [1, N, D] for t = [1.0].

        Raises:
            ValueError: if t is any other time. This mapping only makes clean images.
        """
        times = [t] if isinstance(t, (int, float)) else list(t)
        if times != [1.0]:
            raise ValueError(f'mapping="mlp" has no time: t must be 1.0, got {t}; use mapping="ode" for other times')
        with torch.autocast(z.device.type, enabled=False):
            z = fold(z.to(next(self.parameters()).dtype).flatten(1), self.dim_in)
            h = self.layers(normalize_2nd_moment(z))
        return h if isinstance(t, (int, float)) else h[None]


def fold(z: Tensor, size: int) -> Tensor:
    """Shorten standard normal vectors to standard normal vectors that depend on all of their values.

    Args:
        z: [N, M].
        size: D, at most M.

    Returns:
        [N, D]: value j is the sum of the values j, j + D, j + 2 D, ..., divided by the root of their number. z itself
        if M = D.
    """
    values = z.shape[1]
    if values == size:
        return z
    full, rest = divmod(values, size)
    counts = torch.full((size,), float(full), dtype=z.dtype, device=z.device)
    counts[:rest] += 1.0
    return nn.functional.pad(z, (0, -values % size)).unflatten(1, (-1, size)).sum(1) / counts.sqrt()
