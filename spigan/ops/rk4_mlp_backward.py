"""First derivatives of `rk4_mlp` in plain PyTorch.

Most of the time goes into matrix products, and the library's are the fastest. The stages of each step are computed
again from the state before it. Gradients of half types are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS_AT_A_TIME = 16
"""Steps whose stages `batched_gradients` holds at a time, which bounds its memory."""


class Solve(NamedTuple):
    """A solve to be differentiated.

    Attributes:
        states: [S, N, D] states after every step.
        h0: [N, D].
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D].
        steps: (start, length) of the S steps.
        activation: between the layers.
        activation_backward: gradient with respect to an activation's input, from the gradient with respect to its
            output and the input.
    """

    states: Tensor
    h0: Tensor
    weight: Tensor
    bias: Tensor
    time_weight: Tensor
    steps: Sequence[tuple[float, float]]
    activation: Callable[[Tensor], Tensor]
    activation_backward: Callable[[Tensor, Tensor], Tensor]

    @property
    def exact(self) -> torch.dtype:
        """The dtype of sums."""
        return torch.promote_types(self.h0.dtype, torch.float32)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of h0, weight, bias and time_weight."""


def stepwise_gradients(grad_states: Tensor, solve: Solve) -> Gradients:
    """Compute the gradients step by step, from those of the states after every step [S, N, D]."""
    states, h0, weight, bias, time_weight, steps, act, act_backward = solve
    dtype, exact, layers = h0.dtype, solve.exact, weight.shape[0]
    grad_weight, grad_bias, grad_time = (torch.zeros_like(x, dtype=exact) for x in (weight, bias, time_weight))
    grad_h = torch.zeros_like(h0, dtype=exact)
    for step, (t, dt) in reversed(list(enumerate(steps))):
        grad_h = grad_h + grad_states[step]
        h = (states[step - 1] if step else h0).to(exact)
        nodes = [(t, 0.0), (t + dt / 2, dt / 2), (t + dt / 2, dt / 2), (t + dt, dt)]  # of the four stages: time, length
        inputs: list[list[Tensor]] = [[] for _ in range(layers)]  # [layer][stage] input of the layer
        before: list[list[Tensor]] = [[] for _ in range(layers)]  # [layer][stage] input of its activation
        k = torch.zeros_like(h)
        for time, length in nodes:
            x = (h + length * k).to(dtype)
            for layer in range(layers):
                inputs[layer].append(x)
                x = F.linear(x, weight[layer], bias[layer] + time * time_weight[layer])
                before[layer].append(x)
                x = act(x) if layer < layers - 1 else x
            k = x.to(exact)
        # Backwards through k4, ..., k1; the stage after stage s starts at h + length k_s.
        grads: list[list[Tensor]] = [[] for _ in range(layers)]  # [layer][stage, last first]
        grad_k, grad_start = (dt / 6) * grad_h, grad_h
        for stage in reversed(range(4)):
            grad = grad_k.to(dtype)
            for layer in reversed(range(layers)):
                if layer < layers - 1:
                    grad = act_backward(grad, before[layer][stage])
                grads[layer].append(grad)
                grad = grad @ weight[layer]
            grad_x = grad.to(exact)
            grad_start = grad_start + grad_x
            grad_k = (dt / (6 if stage == 1 else 3)) * grad_h + nodes[stage][1] * grad_x
        for layer in range(layers):
            grad = torch.cat(grads[layer][::-1])  # [4 N, D]
            grad_weight[layer] += grad.t() @ torch.cat(inputs[layer])
            per_stage = grad.view(4, *h0.shape).sum(1, dtype=exact)
            grad_bias[layer] += per_stage.sum(0)
            grad_time[layer] += sum(time * per_stage[stage] for stage, (time, _) in enumerate(nodes))
        grad_h = grad_start
    return grad_h.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype), grad_time.to(dtype)


def batched_gradients(grad_states: Tensor, solve: Solve) -> Gradients:
    """Compute the same as `stepwise_gradients` in fewer calls, which a GPU's host needs most of the time for.

    The saved states make the steps independent of each other: each stage of all steps is computed again at once, and
    one product of all stages of all steps gives the gradient of all weights. Only the gradients of the states follow
    each other. Sums are taken in another order than step by step.
    """
    dtype, exact = solve.h0.dtype, solve.exact
    starts = torch.cat([solve.h0[None], solve.states[:-1]])
    grad_h = torch.zeros_like(solve.h0, dtype=exact)
    totals: tuple[Tensor, ...] | None = None
    for first in reversed(range(0, len(solve.steps), STEPS_AT_A_TIME)):
        part = slice(first, first + STEPS_AT_A_TIME)
        steps = solve.steps[part]
        # Not copied from the host: the copy would wait for the GPU, and a CUDA graph would keep the host's address.
        nodes = [t + share * dt for share in (0.0, 0.5, 0.5, 1.0) for t, dt in steps]  # [4 S] times of the stages
        one = grad_h.new_ones(())
        numbers = [*nodes, *(dt for _, dt in steps)]
        times, dt = torch.stack(torch._foreach_mul([one] * len(numbers), numbers)).split([len(nodes), len(steps)])
        inputs, before = _stages(starts[part], times, dt, solve)
        grad_h, grads = _state_gradients(grad_h, grad_states[part], before, solve, steps)
        grad_weight = torch.bmm(grads.mT, inputs).to(exact)
        per_stage = grads.unflatten(1, (len(nodes), len(grad_h))).sum(2, dtype=exact)  # [L, 4 S, D]
        sums = grad_weight, per_stage.sum(1), (per_stage * times[:, None]).sum(1)
        totals = sums if totals is None else tuple(total + more for total, more in zip(totals, sums, strict=True))
    assert totals is not None
    grad_weight, grad_bias, grad_time = totals
    return grad_h.to(dtype), grad_weight.to(dtype), grad_bias.to(dtype), grad_time.to(dtype)


def _stages(starts: Tensor, times: Tensor, dt: Tensor, solve: Solve) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Compute the four stages of S steps from the states before them.

    Args:
        starts: [S, N, D] states before the steps.
        times: [4 S] times of the stages.
        dt: [S] lengths of the steps.
        solve: the solve.

    Returns:
        [L, 4 S N, D] inputs of the layers, by stage and step; and what comes before the activations: at
        index stage L + layer, S tensors [N, D].
    """
    _, _, weight, bias, time_weight, _, act, _ = solve
    dtype, exact, layers = solve.h0.dtype, solve.exact, len(weight)
    h, dt = starts.to(exact), dt[:, None, None]
    rows = time_weight.to(exact)[:, None, None] * times.view(4, 1, -1, 1, 1) + bias.to(exact)[:, None, None]
    biases = rows.to(dtype).flatten(0, 1).unbind(0)  # [4 L] of [S, 1, D]
    matrices = weight.mT.unbind(0)
    inputs: list[list[Tensor]] = [[] for _ in range(layers)]
    before: list[tuple[Tensor, ...]] = []
    k = h
    for stage, length in enumerate((0.0, 0.5, 0.5, 1.0)):
        x = (torch.addcmul(h, k, dt, value=length) if stage else h).to(dtype).flatten(0, 1)  # [S N, D]
        for layer in range(layers):
            inputs[layer].append(x)
            y = torch.mm(x, matrices[layer]).view(h.shape).add_(biases[stage * layers + layer])
            before.append(y.unbind(0))
            x = act(y).flatten(0, 1) if layer < layers - 1 else x
        k = y.to(exact)
    return torch.cat([x for each in inputs for x in each]).unflatten(0, (layers, 4 * len(x))), before


def _state_gradients(
    grad_h: Tensor,
    grad_states: Tensor,
    before: list[tuple[Tensor, ...]],
    solve: Solve,
    steps: Sequence[tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """Go backwards through S steps.

    Args:
        grad_h: [N, D] gradient of the state after the last step, from what follows.
        grad_states: [S, N, D] gradients of the states after the steps.
        before: inputs of the activations; see `_stages`.
        solve: the solve.
        steps: (start, length) of the steps.

    Returns:
        [N, D] gradient of the state before the first step, and [L, 4 S N, D] gradients of the layers' outputs, by
        stage and step.
    """
    dtype, exact, layers = solve.h0.dtype, solve.exact, len(solve.weight)
    matrices = solve.weight.unbind(0)
    upstream = grad_states.unbind(0)
    grads: dict[tuple[int, int, int], Tensor] = {}
    for step in reversed(range(len(steps))):
        dt = steps[step][1]
        grad_h = grad_h + upstream[step]
        sixth = grad_h * (dt / 6)
        third = sixth * 2
        grad_k = sixth
        for stage in reversed(range(4)):
            grad = grad_k.to(dtype)
            for layer in reversed(range(layers)):
                if layer < layers - 1:
                    grad = solve.activation_backward(grad, before[stage * layers + layer][step])
                grads[layer, stage, step] = grad
                grad = torch.mm(grad, matrices[layer])
            grad_x = grad.to(exact)
            grad_h = grad_h + grad_x
            if stage > 0:
                length = dt if stage == 3 else dt / 2
                grad_k = torch.add(sixth if stage == 1 else third, grad_x, alpha=length)
    ordered = [grads[key] for key in sorted(grads)]
    return grad_h, torch.cat(ordered).unflatten(0, (layers, 4 * len(steps) * len(grad_h)))
