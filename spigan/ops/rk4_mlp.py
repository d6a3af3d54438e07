"""The mapping network's ODE dh/dt = r(h, t), where r is a small MLP, integrated by the classical Runge-Kutta method
(the paper's eq. 6 and section 3.3).

Twins: csrc/common/rk4.h and activations.h (arithmetic), csrc/cpu/rk4_mlp.cpp, csrc/cuda/rk4_mlp.cu, kernels/rk4_mlp.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops.checks import check_index, check_tensor, check_times
from spigan.ops.layer_end import LRELU_SLOPE
from spigan.ops.library import compiled, dtype_number, launch, register_operator
from spigan.ops.limits import MAX_ODE_DIM, MAX_ODE_LAYERS, MAX_ODE_TIMES, ODE_DIM_MULTIPLE
from spigan.ops.operation import Operation
from spigan.ops.rk4_mlp_backward import Gradients, Solve, batched_gradients, stepwise_gradients

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "lrelu": lambda x: F.leaky_relu(x, LRELU_SLOPE),
    "tanh": torch.tanh,
    "softplus": F.softplus,
}


def mlp_vector_field(
    h: Tensor, t: float | Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, activation: str
) -> Tensor:
    """Evaluate the vector field r(h, t).

    Layer l computes y <- weight[l] y + bias[l] + t time_weight[l]. The activation follows every layer but the last.

    Args:
        h: [N, D].
        t: Time.
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D].
        activation: One of `ACTIVATIONS`.

    Returns:
        [N, D] dh/dt.
    """
    layers = weight.shape[0]
    for layer in range(layers):
        h = F.linear(h, weight[layer], bias[layer] + t * time_weight[layer])
        if layer < layers - 1:
            h = ACTIVATIONS[activation](h)
    return h


def segments(times: Sequence[float], steps: int) -> Iterator[tuple[float, float, int]]:
    """Yield (start, step length, number of steps) of the segments that lead from 0 to each of `times` in turn.

    A segment of length d has ceil(steps d) equal steps.
    """
    start = 0.0
    for end in times:
        # 1e-6 of a step, so that rounding (of 0.7 - 0.2, for example) does not add one.
        count = max(1, math.ceil(steps * (end - start) - 1e-6))
        yield start, (end - start) / count, count
        start = end


def step_grid(times: Sequence[float], steps: int) -> Iterator[tuple[float, float, bool]]:
    """Yield the steps from 0 through all `times`: (start, length, whether it ends at a requested time)."""
    for start, length, count in segments(times, steps):
        for i in range(count):
            yield start + i * length, length, i == count - 1


def rk4_step(field: Callable[[Tensor, float], Tensor], h: Tensor, t: float, dt: float) -> Tensor:
    """Take a step of the classical fourth-order Runge-Kutta method.

    Its nodes are (0, 1/2, 1/2, 1), its weights (1, 2, 2, 1) / 6.
    """
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
    """Solve dh/dt = field(h, t), h(0) = h0, once through all `times` (the paper's section 3.5, "implementation trick").

    Returns:
        [K, N, D] h at the K times.
    """
    h, states = h0, []
    for t, dt, wanted in step_grid(times, steps):
        h = step(field, h, t, dt)
        if wanted:
            states.append(h)
    return torch.stack(states)


def _field(weight: Tensor, bias: Tensor, time_weight: Tensor, activation: str, h: Tensor, t: float) -> Tensor:
    return mlp_vector_field(h, t, weight, bias, time_weight, activation)


def rk4_mlp_reference(
    h0: Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, times: Sequence[float], steps: int, activation: str
) -> Tensor:
    """Plain PyTorch definition of `rk4_mlp`, differentiable to any order."""
    return integrate(rk4_step, partial(_field, weight, bias, time_weight, activation), h0, times, steps)


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

    r is an MLP of L layers y <- weight[l] y + bias[l] + t time_weight[l]. The activation follows every layer but the
    last. A segment of length d between requested times takes ceil(steps d) equal steps.

    Args:
        h0: [N, D] state at t = 0.
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D] weight of the time, which is concatenated to each layer's input.
        times: K increasing floats in (0, 1], shared by the batch.
        steps: Number of steps for the whole interval [0, 1].
        activation: "silu", "lrelu" (slope 0.2), "tanh" or "softplus".
        backend: "auto" or one of `BACKENDS`; for the default see `spigan.ops.use_backend`. "triton" and "cuda" accept D
            that is a multiple of 16 up to 1024, up to 8 layers, up to 64 times, and no float64.

    Returns:
        [K, N, D] h at the requested times. Differentiable in all tensors, to any order. A kernel's first derivatives
        are those of its own steps (discretise, then optimise): one state per step is saved, and the stages are computed
        again. Second derivatives are computed by the reference.

    Raises:
        TypeError, ValueError: An argument has the wrong type, shape, dtype or device, or is out of range.
        BackendUnavailable: A backend requested by name cannot run.
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

    inputs = (h0, weight, bias, time_weight)
    name, function = _OPERATION.choose(backend, h0.device, inputs, h0.dtype, dim, weight.shape[0], len(times))
    if function is not None:
        return function(h0, weight, bias, time_weight, times, steps, activation)
    # If a backward pass may follow, the state after every step is written and kept for it.
    every_step = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    states = _OPERATION.kernel(*inputs, times, steps, every_step, activation, name)
    if not every_step:
        return states
    return torch.stack([states[step] for step in _written(times, steps, False)])


def _limit(backend: str, dtype: torch.dtype, dim: int, layers: int, times: int) -> str | None:
    if backend == "cpp":
        return None
    if dtype == torch.float64:
        return "it accepts float32, bfloat16 and float16, not float64"
    if dim % ODE_DIM_MULTIPLE != 0 or not ODE_DIM_MULTIPLE <= dim <= MAX_ODE_DIM or layers > MAX_ODE_LAYERS:
        return (
            f"it accepts D that is a multiple of {ODE_DIM_MULTIPLE} up to {MAX_ODE_DIM} and up to {MAX_ODE_LAYERS} "
            f"layers, got D = {dim} and {layers} layers"
        )
    return f"it accepts at most {MAX_ODE_TIMES} times, got {times}" if times > MAX_ODE_TIMES else None


# ---- Kernels ----


def _written(times: Sequence[float], steps: int, every_step: bool) -> list[int]:
    """Return the indices of the steps after which a state is written."""
    return [step for step, (_, _, ends) in enumerate(step_grid(times, steps)) if ends or every_step]


def _empty(args: Any) -> Tensor:
    return args.h0.new_empty((len(_written(args.times, args.steps, args.every_step)), *args.h0.shape))


def _compiled(args: Any) -> Tensor:
    out = _empty(args)
    h0, weight, bias, time_weight = (x.contiguous() for x in (args.h0, args.weight, args.bias, args.time_weight))
    module = compiled(args.backend)
    sizes = (*h0.shape, weight.shape[0])
    memory: dict[str, Tensor] = {}
    if args.backend == "cuda":
        needed = module.rk4_mlp_workspace_bytes(dtype_number(h0.dtype), *sizes)
        memory["workspace"] = h0.new_empty(needed, dtype=torch.uint8)
    launch(
        args.backend, "rk4_mlp", out, h0.dtype, h0, weight, bias, time_weight, *sizes,
        tuple(segments(args.times, args.steps)), args.every_step, module.ACTIVATIONS.index(args.activation),
        **memory,
    )  # fmt: skip
    return out


def _triton(args: Any) -> Tensor:
    from spigan.kernels.rk4_mlp import rk4_mlp as solve

    out = _empty(args)
    h0, weight, bias, time_weight = (x.contiguous() for x in (args.h0, args.weight, args.bias, args.time_weight))
    solve(out, h0, weight, bias, time_weight, tuple(segments(args.times, args.steps)), args.every_step, args.activation)
    return out


# ---- Derivatives ----

# Gradient with respect to an activation's input, from the gradient with respect to its output and the input.
_ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "lrelu": lambda grad, x: torch.ops.aten.leaky_relu_backward(grad, x, LRELU_SLOPE, False),
    "tanh": lambda grad, x: torch.ops.aten.tanh_backward(grad, torch.tanh(x)),
    "softplus": lambda grad, x: torch.ops.aten.softplus_backward(grad, x, 1, 20),
}


def _backward_kernel(args: Any) -> Gradients:
    """Compute the gradients of `rk4_mlp` from those of the states after every step [S, N, D]."""
    grad_states, states, h0, weight, bias, time_weight, times, steps, activation = args
    solve = Solve(
        *(states, h0, weight, bias, time_weight),
        [(t, dt) for t, dt, _ in step_grid(times, steps)],
        ACTIVATIONS[activation],
        _ACTIVATION_BACKWARD[activation],
    )
    # On a CPU, results stay those of the runs that were begun before there were batches.
    gradients = batched_gradients if h0.is_cuda else stepwise_gradients
    return gradients(grad_states, solve)


def _backward_fake(args: Any) -> tuple[Tensor, ...]:
    inputs = (args.h0, args.weight, args.bias, args.time_weight)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _setup_context(ctx: Any, args: Any, output: Tensor) -> None:
    *tensors, ctx.times, ctx.steps, ctx.every_step, ctx.activation, ctx.backend = args
    ctx.save_for_backward(*tensors, output)


def _reference_grads(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the gradients by the reference, with a graph for second derivatives."""
    # Views, because the inputs may be functions of each other, and each is to be differentiated only as an input.
    inputs = [x.view_as(x) for x in ctx.saved_tensors[:4]]
    needed = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
    h, weight, bias, time_weight = inputs
    field = partial(_field, weight, bias, time_weight, ctx.activation)
    every = []
    for t, dt, _ in step_grid(ctx.times, ctx.steps):
        h = rk4_step(field, h, t, dt)
        every.append(h)
    output = torch.stack([every[step] for step in _written(ctx.times, ctx.steps, ctx.every_step)])
    grads = iter(torch.autograd.grad(output, needed, grad_states, create_graph=True))
    return tuple(next(grads) if need else None for need in ctx.needs_input_grad[:4])


def _backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, states = ctx.saved_tensors
    times, steps, activation = ctx.times, ctx.steps, ctx.activation
    if torch.is_grad_enabled():
        return *_reference_grads(ctx, grad_states), *(None,) * 5
    if not ctx.every_step:  # the states between the requested times were not kept
        states = _OPERATION.kernel(*inputs, times, steps, True, activation, ctx.backend)
        every_grad = torch.zeros_like(states)
        for step, grad in zip(_written(times, steps, False), grad_states.unbind(0), strict=True):
            every_grad[step] = grad  # not indexed by a list, which would be copied from the host
        grad_states = every_grad
    return *_backward_operator(grad_states, states, *inputs, times, steps, activation), *(None,) * 5


_backward_operator = register_operator(
    "rk4_mlp_backward(Tensor grad_states, Tensor states, Tensor h0, Tensor weight, Tensor bias, Tensor time_weight, "
    "float[] times, SymInt steps, str activation) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_OPERATION = Operation(
    "rk4_mlp(Tensor h0, Tensor weight, Tensor bias, Tensor time_weight, float[] times, SymInt steps, bool every_step, "
    "str activation, str backend) -> Tensor",
    reference=rk4_mlp_reference,
    kernels={"cpp": _compiled, "triton": _triton, "cuda": _compiled},
    fake=_empty,
    limit=_limit,
    setup_context=_setup_context,
    backward=_backward,
)
