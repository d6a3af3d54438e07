"""Integration of the mapping network's ODE dh/dt = r(h, t), r a small MLP, by the classical Runge-Kutta method
(the paper's eq. 6 and section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops import backends
from spigan.ops.checks import check_index, check_tensor, check_times

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "lrelu": lambda x: F.leaky_relu(x, 0.2),
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


def mlp_vector_field(
    h: Tensor, t: float | Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, activation: str
) -> Tensor:
    """r(h, t): layer l computes y <- weight[l] y + bias[l] + t time_weight[l], activations between, the last linear.

    Args:
        h: [N, D].
        t: time.
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D].
        activation: one of `ACTIVATIONS`.

    Returns:
        [N, D] dh/dt.
    """
    layers = weight.shape[0]
    for layer in range(layers):
        h = F.linear(h, weight[layer], bias[layer] + t * time_weight[layer])
        if layer < layers - 1:
            h = ACTIVATIONS[activation](h)
    return h


def step_grid(times: Sequence[float], steps: int) -> Iterator[tuple[float, float, bool]]:
    """Steps (start, length, whether it ends at a requested time) that lead from 0 through all `times`.

    An interval of length d is divided into ceil(steps d) equal steps.
    """
    start = 0.0
    for end in times:
        # 1e-6 of a step keeps rounding in e.g. 0.7 - 0.2 from adding one.
        count = max(1, math.ceil(steps * (end - start) - 1e-6))
        length = (end - start) / count
        for i in range(count):
            yield start + i * length, length, i == count - 1
        start = end


def rk4_step(field: Callable[[Tensor, float], Tensor], h: Tensor, t: float, dt: float) -> Tensor:
    """One step of the classical fourth-order Runge-Kutta method: nodes (0, 1/2, 1/2, 1), weights (1, 2, 2, 1) / 6."""
    k1 = field(h, t)
    k2 = field(h + (dt / 2) * k1, t + dt / 2)
    k3 = field(h + (dt / 2) * k2, t + dt / 2)
    k4 = field(h + dt * k3, t + dt)
    return h + (dt / 6) * (k1 + 2.0 * (k2 + k3) + k4)


def integrate(
    step: Callable[[Callable[[Tensor, float], Tensor], Tensor, float, float], Tensor],
    field: Callable[[Tensor, float], Tensor],
    h0: Tensor,
    times: Sequence[float],
    steps: int,
) -> Tensor:
    """Solve dh/dt = field(h, t), h(0) = h0 once through all `times` (the paper's section 3.5, "implementation trick").

    Returns:
        [K, N, D] h at the K times.
    """
    h, states = h0, []
    for t, dt, wanted in step_grid(times, steps):
        h = step(field, h, t, dt)
        if wanted:
            states.append(h)
    return torch.stack(states)


def rk4_mlp_reference(
    h0: Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, times: Sequence[float], steps: int, activation: str
) -> Tensor:
    """Plain PyTorch definition of `rk4_mlp`, differentiable to any order."""

    def field(h: Tensor, t: float) -> Tensor:
        return mlp_vector_field(h, t, weight, bias, time_weight, activation)

    return integrate(rk4_step, field, h0, times, steps)


def rk4_mlp(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor,
    time_weight: Tensor,
    times: Sequence[float],
    *,
    steps: int = 4,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """Integrate dh/dt = r(h, t) from h(0) = h0 through all `times` with classical Runge-Kutta steps.

    r is an MLP of L layers, y <- weight[l] y + bias[l] + t time_weight[l], activations between, the last linear. An
    interval of length d between requested times takes ceil(steps d) equal steps.

    Args:
        h0: [N, D] state at t = 0.
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D] weight of the time, which is concatenated to each layer's input.
        times: K increasing floats in (0, 1], shared by the batch.
        steps: steps for the whole interval [0, 1].
        activation: "silu", "lrelu" (slope 0.2), "tanh" or "softplus".
        backend: "auto" or "reference"; default: see `spigan.ops.use_backend`.

    Returns:
        [K, N, D] h at the requested times. Differentiable in all tensors, to any order.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, dtype, device or range.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    check_tensor("h0", h0, "[N, D]")
    dim, layers = h0.shape[1], weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else None
    matrix = (layers, dim, dim)
    check_tensor("weight", weight, "[L, D, D]", shape=matrix, dtypes=(h0.dtype,), device=h0.device)
    for name, value in (("bias", bias), ("time_weight", time_weight)):
        check_tensor(name, value, "[L, D]", shape=matrix[:2], dtypes=(h0.dtype,), device=h0.device)
    if layers == 0:
        raise ValueError("weight must hold at least one layer, got shape " + str(list(weight.shape)))
    times = check_times(times)
    steps = check_index("steps", steps, minimum=1)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    backends.choose("rk4_mlp", backend, h0.device)
    return rk4_mlp_reference(h0, weight, bias, time_weight, times, steps, activation)


backends.register("rk4_mlp", "reference", backends.always_available)
