"""Benchmark the mapping network's ODE (D = 512, L = 3, 4 Runge-Kutta steps): kernels, reference and alternatives.

pytest benchmarks/bench_rk4_mlp.py --benchmark-only

torchdiffeq's "rk4" is the 3/8 rule: it has the same order and number of evaluations, but gives different numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from spigan.ops import BACKENDS, rk4_mlp
from spigan.ops.backends import why_unavailable
from spigan.ops.rk4_mlp import mlp_vector_field

from .measuring import DEVICE

DIM, LAYERS, STEPS = 512, 3, 4
BATCHES = (1, 4, 8, 100, 4096) if DEVICE.type == "cuda" else (1, 4, 8, 100)
KERNELS = [b for b in BACKENDS if b != "reference" and why_unavailable("rk4_mlp", b, DEVICE) is None]
RIVALS = ["reference", "torch.compile", "torchdiffeq", *(["CUDA graph of reference"] if DEVICE.type == "cuda" else [])]


def _problem(batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)

    return (
        draw(batch, DIM, scale=1.0),
        draw(LAYERS, DIM, DIM, scale=DIM**-0.5),
        draw(LAYERS, DIM, scale=0.1),
        draw(LAYERS, DIM, scale=0.1),
    )


def _reference(*inputs: Tensor) -> Tensor:
    return rk4_mlp(*inputs, [1.0], steps=STEPS, backend="reference")


_compiled = torch.compile(_reference)


def _torchdiffeq(h0: Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor) -> Tensor:
    grid = torch.tensor([0.0, 1.0], dtype=h0.dtype, device=h0.device)
    return odeint(
        lambda t, h: mlp_vector_field(h, t, weight, bias, time_weight, "silu"),
        h0,
        grid,
        method="rk4",
        options={"step_size": 1.0 / STEPS},
    )[1:]


def _replay(inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Capture the reference in a CUDA graph, and return a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _reference(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _reference(*inputs)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("implementation", [*RIVALS, *KERNELS])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@torch.no_grad()
def test_forward(row: Any, dtype: torch.dtype, batch: int, implementation: str) -> None:
    if dtype != torch.float32 and implementation in ("torch.compile", "torchdiffeq"):
        pytest.skip("torch.compile and torchdiffeq are timed in float32 only")
    inputs = _problem(batch, dtype)
    functions: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: _reference(*inputs),
        "torch.compile": lambda: _compiled(*inputs),
        "torchdiffeq": lambda: _torchdiffeq(*inputs),
    }
    if implementation == "CUDA graph of reference":
        function = _replay(inputs)
    else:
        function = functions.get(implementation, lambda: rk4_mlp(*inputs, [1.0], steps=STEPS, backend=implementation))
    exact = _reference(*(x.double() for x in inputs))
    # |h| is about 4. torchdiffeq solves the same equation with other coefficients.
    tolerance = 0.2 if dtype == torch.bfloat16 else 1e-2 if implementation == "torchdiffeq" else 1e-4
    row(
        f"rk4_mlp, D = {DIM}, L = {LAYERS}, {STEPS} steps, batch {batch}, {str(dtype)[6:]}",
        implementation,
        function,
        expected=exact,
        tolerance=tolerance,
        flop=2 * 4 * STEPS * LAYERS * DIM * DIM * batch,
        moved=(LAYERS * DIM * DIM + 2 * batch * DIM) * dtype.itemsize,
        dtype=dtype,
        products="matrix",
    )


@pytest.mark.parametrize("implementation", ["reference", *KERNELS])
@pytest.mark.parametrize("batch", [8, 64])
def test_forward_and_backward(row: Any, batch: int, implementation: str) -> None:
    inputs = tuple(x.requires_grad_() for x in _problem(batch, torch.float32))

    def step(inputs: tuple[Tensor, ...] = inputs, backend: str = implementation) -> Tensor:
        states = rk4_mlp(*inputs, [0.5, 1.0], steps=STEPS, backend=backend)
        return torch.autograd.grad(states.square().sum(), inputs)[1]

    exact = step(tuple(x.detach().double().requires_grad_() for x in inputs), "reference")
    row(
        f"rk4_mlp, D = {DIM}, L = {LAYERS}, {STEPS} steps, batch {batch}, forward and backward",
        implementation,
        step,
        expected=exact,
        tolerance=1e-4 * exact.abs().max().item(),
        flop=3 * 2 * 4 * STEPS * LAYERS * DIM * DIM * batch,
        products="matrix",
    )
