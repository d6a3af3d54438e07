"""The forward process: a variance-preserving SDE (Song et al. 2021, eq. 11; the paper's sections 3.1 and 4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class VPSDE:
    """Variance-preserving SDE with a linear noise rate beta(t) = beta_min + t (beta_max - beta_min), t in [0, 1].

    Its solution at time t is Gaussian, x_t ~ N(a(t) x_0, s(t)^2 I), so noise can be added in one step:

        log a(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,    s(t) = sqrt(1 - a(t)^2).

    Args:
        beta_min: noise rate at t = 0, positive.
        beta_max: noise rate at t = 1, at least `beta_min`.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max < infinity.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not (0.0 < self.beta_min <= self.beta_max < math.inf):
            raise ValueError(
                f"VPSDE needs 0 < beta_min <= beta_max, got beta_min={self.beta_min}, beta_max={self.beta_max}"
            )

    def marginal(self, t: float) -> tuple[float, float]:
        """Return the mean coefficient a(t) and the standard deviation s(t) of x_t given x_0.

        Args:
            t: time in [0, 1].

        Returns:
            (mean_coef, std), both in [0, 1].

        Raises:
            ValueError: if t is outside [0, 1].
        """
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"VPSDE.marginal needs t in [0, 1], got {t}")
        log_mean = -0.25 * t * t * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        # expm1 keeps s(t) accurate near t = 0, where 1 - a^2 would cancel.
        return math.exp(log_mean), math.sqrt(-math.expm1(2.0 * log_mean))
