"""spigan.sde against published numbers and against integrals of the noise rate."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from spigan import VPSDE

SDES = [VPSDE(), VPSDE(0.5, 0.5), VPSDE(1e-4, 0.02), VPSDE(0.1, 40.0)]


@pytest.mark.parametrize(
    ("t", "mean_coef", "std"),
    [(0.25, 0.723657, 0.690160), (0.5, 0.281183, 0.959654), (0.75, 0.058664, 0.998278), (1.0, 0.0065716, 0.9999784)],
)
def test_marginal_has_the_known_values(t, mean_coef, std):
    assert VPSDE().marginal(t) == pytest.approx((mean_coef, std), rel=0, abs=1e-6)


def test_nothing_has_happened_at_time_0():
    assert VPSDE().marginal(0.0) == (1.0, 0.0)


@settings(max_examples=50)
@given(t=st.floats(0, 1), beta_min=st.floats(1e-6, 5), extra=st.floats(0, 50))
def test_variance_is_preserved(t, beta_min, extra):
    mean_coef, std = VPSDE(beta_min, beta_min + extra).marginal(t)
    assert 0 <= mean_coef <= 1 and 0 <= std <= 1
    assert mean_coef**2 + std**2 == pytest.approx(1, rel=0, abs=1e-14)


@pytest.mark.parametrize("sde", SDES)
def test_noise_grows_with_time(sde):
    means, stds = zip(*(sde.marginal(i / 100) for i in range(101)), strict=True)
    assert all(a > b for a, b in pairwise(means))
    assert all(a < b for a, b in pairwise(stds))


@pytest.mark.parametrize("sde", SDES)
@pytest.mark.parametrize("t", [0.01, 0.3, 0.77, 1.0])
def test_marginal_solves_the_sde(sde, t):
    def beta(u):
        return (1 - u) * sde.beta_min + u * sde.beta_max

    mean_coef, std = sde.marginal(t)
    assert mean_coef == pytest.approx(math.exp(-0.5 * quad(beta, 0, t)[0]), rel=1e-12)
    # dx = -beta/2 x dt + sqrt(beta) dw: the mean and the variance of x obey these equations.
    moments = solve_ivp(
        lambda u, y: [-0.5 * beta(u) * y[0], beta(u) * (1 - y[1])],
        (0, t),
        [1, 0],
        method="DOP853",
        rtol=1e-12,
        atol=1e-13,
    ).y[:, -1]
    assert mean_coef == pytest.approx(moments[0], rel=1e-9)
    assert std**2 == pytest.approx(moments[1], rel=1e-9)


@pytest.mark.parametrize("t", [1e-12, 1e-8, 1e-5, 1e-3])
def test_std_is_accurate_where_one_minus_a_squared_cancels(t):
    with localcontext() as context:
        context.prec = 60
        log_mean = -(Decimal(t) ** 2) * Decimal("19.9") / 4 - Decimal(t) * Decimal("0.1") / 2
        exact = (1 - (2 * log_mean).exp()).sqrt()
    assert VPSDE().marginal(t)[1] == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("t", [-1e-9, 1 + 1e-9, math.nan, math.inf])
def test_marginal_refuses_times_outside_0_to_1(t):
    with pytest.raises(ValueError, match=r"t in \[0, 1\], got"):
        VPSDE().marginal(t)


@pytest.mark.parametrize("betas", [(0, 1), (-0.1, 20), (2, 1), (0.1, math.inf), (math.nan, 1), (0.1, math.nan)])
def test_refuses_noise_rates_that_make_no_process(betas):
    with pytest.raises(ValueError, match="0 < beta_min <= beta_max, got beta_min="):
        VPSDE(*betas)


def test_is_a_value():
    sde = VPSDE()
    assert sde == VPSDE(beta_min=0.1, beta_max=20.0) and hash(sde) == hash(VPSDE())
    assert sde != VPSDE(0.2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sde.beta_min = 1.0
