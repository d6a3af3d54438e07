"""rk4_mlp as torch.library, torch.compile and torch.export see it."""

from __future__ import annotations

import pytest
import torch

from spigan.ops import BACKENDS, rk4_mlp
from spigan.ops.backends import why_unavailable

RUNNING = [b for b in BACKENDS if why_unavailable("rk4_mlp", b, torch.device("cpu")) is None]
KERNELS = [b for b in RUNNING if b != "reference"]


def problem(n=3, dim=5, layers=3, dtype=torch.float32):
    """h0, weight, bias, time_weight."""
    shapes = (n, dim), (layers, dim, dim), (layers, dim), (layers, dim)
    return tuple((torch.randn(shape) / dim**0.5).to(dtype) for shape in shapes)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype", "needed", "activation"),
    [
        ((3, 5, 3), torch.float32, (True, True, True, True), "silu"),
        ((2, 4, 1), torch.float64, (False, True, False, False), "tanh"),
        ((0, 4, 2), torch.float32, (True, False, True, False), "softplus"),
        ((2, 3, 2), torch.bfloat16, (False, False, False, False), "lrelu"),
    ],
)
def test_opcheck(shape, dtype, needed, activation, every_step, backend):
    inputs = [x.requires_grad_(need) for x, need in zip(problem(*shape, dtype), needed, strict=True)]
    torch.library.opcheck(torch.ops.spigan.rk4_mlp, (*inputs, [0.3, 1.0], 2, every_step, activation, backend))


@pytest.mark.parametrize(("shape", "dtype"), [((3, 5, 3), torch.float32), ((0, 4, 1), torch.float64)])
def test_opcheck_of_the_backward_pass(shape, dtype):
    inputs = problem(*shape, dtype)
    states = rk4_mlp(*inputs, [0.5, 1.0], steps=2, backend="reference")
    arguments = (torch.randn_like(states), states, *inputs, [0.5, 1.0], 2, "silu")
    torch.library.opcheck(torch.ops.spigan.rk4_mlp_backward, arguments)


@pytest.mark.parametrize("backend", RUNNING)
def test_stays_whole_under_compile(backend):
    h0, *parameters = (x.requires_grad_() for x in problem(layers=2))

    def solve(*tensors):
        return rk4_mlp(*tensors, [0.3, 1.0], steps=1, backend=backend)

    compiled = torch.compile(solve, backend="aot_eager", fullgraph=True, dynamic=backend in KERNELS)
    # Tracing the reference for any batch takes many seconds.
    for n in (3, 8, 5) if backend in KERNELS else (3,):
        inputs = [torch.randn(n, 5, requires_grad=True), *parameters]
        actual, expected = compiled(*inputs), solve(*inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        upstream = torch.randn_like(expected)
        for a, b in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(h0, *parameters), solve(h0, *parameters), rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_stays_whole_under_inductor(backend):
    inputs = [x.requires_grad_() for x in problem()]

    def solve(*tensors):
        return 2 * rk4_mlp(*tensors, [0.3, 1.0], steps=2, backend=backend).tanh()

    actual, expected = torch.compile(solve, fullgraph=True)(*inputs), solve(*inputs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", RUNNING)
def test_exports(backend):
    class Solve(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ParameterList(problem()[1:])

        def forward(self, h0):
            return rk4_mlp(h0, *self.parts, [0.5, 1.0], steps=2, backend=backend)

    module = Solve()
    batch = torch.export.Dim("batch", min=1, max=100)
    program = torch.export.export(module, (torch.randn(3, 5),), dynamic_shapes={"h0": {0: batch}})
    for n in (1, 3, 8):
        h0 = torch.randn(n, 5)
        torch.testing.assert_close(program.module()(h0), module(h0), rtol=0, atol=1e-6)
    uses_kernel = any("spigan.rk4_mlp" in str(node.target) for node in program.graph.nodes)
    assert uses_kernel == (backend in KERNELS)
