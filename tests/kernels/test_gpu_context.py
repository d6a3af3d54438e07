"""Every backend on a CUDA device: streams, CUDA graphs, compilers and a second device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu import CUDA, OPERATIONS, images, over_backends, problem
from torch import Tensor

from spigan.ops import BACKENDS, fir_bias_act, modulated_conv2d, path_interpolate, philox_normal, rk4_mlp
from spigan.ops.backends import choose, describe, why_unavailable

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


def test_kernels_are_chosen():
    for op in OPERATIONS:
        cannot_run = describe(CUDA)[op]["cannot_run"]
        assert choose(op, None, CUDA) in ("cuda", "triton"), f"neither of the kernels of {op} runs here: {cannot_run}"


def operations(
    device: torch.device = CUDA,
) -> dict[str, tuple[list[Tensor], list[Tensor], Callable[..., list[Tensor]]]]:
    """For each operation: its input tensors, others of the same shapes, and a function of them and of the backend."""

    def draw(seeds: Tensor, backend: str) -> list[Tensor]:
        return [philox_normal((3, 4, 5), seed=seeds, offset=2, backend=backend)]

    def path(x0: Tensor, flips: Tensor, backend: str) -> list[Tensor]:
        return [*path_interpolate(x0, [0.3, 1.0], seed=7, flips=flips, backend=backend)]

    def solve(h0: Tensor, weight: Tensor, bias: Tensor, time_weight: Tensor, backend: str) -> list[Tensor]:
        return [rk4_mlp(h0, weight, bias, time_weight, [0.4, 1.0], steps=2, backend=backend)]

    def end_layer(x: Tensor, filter: Tensor, factor: Tensor, seed: Tensor, bias: Tensor, backend: str) -> list[Tensor]:
        end = {"factor": factor, "noise_seed": seed, "bias": bias, "activation": "lrelu", "clamp": 2.0}
        return [
            fir_bias_act(x, **end, backend=backend),
            fir_bias_act(x, filter=filter, up=2, padding=(2, 1), **end, backend=backend),
        ]

    def convolve(x: Tensor, weight: Tensor, style: Tensor, filter: Tensor, seed: Tensor, backend: str) -> list[Tensor]:
        options = {"resample_filter": filter, "noise_seed": seed, "activation": "lrelu", "backend": backend}
        return [modulated_conv2d(x, weight, style, up=up, **options) for up in (1, 2)]

    def inputs() -> dict[str, list[Tensor]]:
        seed = torch.randint(0, 2**62, (), device=device)
        maps, factor, filter = (torch.randn(s, device=device) for s in ((2, 8, 6, 5), (2, 8), (4, 4)))
        return {
            "fir_bias_act": [maps, filter, factor, seed, torch.randn(8, device=device)],
            "modulated_conv2d": [maps, torch.randn(16, 8, 3, 3, device=device), factor, 1.0 + filter.abs(), seed],
            "philox_normal": [torch.randint(0, 2**62, (3,), device=device)],
            "path_interpolate": [images(3, 2, 5, 7).to(device), torch.rand(3, device=device) < 0.5],
            "rk4_mlp": [x.to(device) for x in problem(5, 48, 2, torch.float32)],
        }

    first, second = inputs(), inputs()
    functions = {
        "philox_normal": draw,
        "path_interpolate": path,
        "rk4_mlp": solve,
        "fir_bias_act": end_layer,
        "modulated_conv2d": convolve,
    }
    return {op: (first[op], second[op], functions[op]) for op in functions}


CALLS = [(op, backend) for op in OPERATIONS for backend in BACKENDS if why_unavailable(op, backend, CUDA) is None]
over_calls = pytest.mark.parametrize(("op", "backend"), CALLS)


def compiler(backend: str) -> str:
    """inductor for kernels; of the reference it would make hundreds of kernels, which takes half a minute."""
    return "aot_eager" if backend == "reference" else "inductor"


def assert_results(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@over_calls
def test_runs_on_the_current_stream(op, backend):
    inputs, others, function = operations()[op]
    expected = function(*others, backend)  # also compiles what is compiled at the first call
    assert not torch.equal(expected[0], function(*inputs, backend)[0])
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # tens of milliseconds, in which another stream would read the old inputs
        for x, other in zip(inputs, others, strict=True):
            x.copy_(other)
        actual = function(*inputs, backend)
    stream.synchronize()
    assert_results(actual, expected)


@over_calls
def test_cuda_graph(op, backend):
    inputs, others, function = operations()[op]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*inputs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*inputs, backend)
    for values in (others, [x.clone() for x in inputs]):
        for x, value in zip(inputs, values, strict=True):
            x.copy_(value)
        for result in captured:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_results(captured, function(*values, backend))


@pytest.mark.parametrize(("op", "backend"), [call for call in CALLS if call[0] in OPERATIONS[2:]])
def test_cuda_graph_with_a_backward_pass(op, backend):
    inputs, _, function = operations()[op]
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    if op != "rk4_mlp":
        filter = next(x for x in leaves if x.shape == (4, 4))
        leaves = [x for x in leaves if x is not filter.requires_grad_(False)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(sum(y.square().sum() for y in function(*inputs, backend)), leaves)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    for a, e in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@over_calls
def test_stays_whole_under_compile(op, backend):
    inputs, others, function = operations()[op]
    compiled = torch.compile(function, fullgraph=True, backend=compiler(backend))
    for values in (inputs, others):
        assert_results(compiled(*values, backend), function(*values, backend))
    torch.compiler.reset()


@over_backends("rk4_mlp")
def test_gradients_stay_whole_under_compile(backend):
    leaves = [x.to(CUDA).requires_grad_() for x in problem(5, 48, 2, torch.float32)]

    def solve(*tensors: Tensor) -> Tensor:
        return rk4_mlp(*tensors, [0.4, 1.0], steps=1, backend=backend).square()

    compiled = torch.compile(solve, fullgraph=True, backend=compiler(backend))
    found = [torch.autograd.grad(function(*leaves).sum(), leaves) for function in (compiled, solve)]
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@over_calls
def test_second_device(op, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    second = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    inputs, _, function = operations(second)[op]
    expected = function(*(x.cpu() for x in inputs), "reference")
    actual = function(*inputs, backend)
    assert all(x.device == second for x in actual) and torch.cuda.current_device() == 0
    torch.cuda.synchronize(second)
    assert_results([x.cpu() for x in actual], expected)


@over_calls
def test_opcheck(op, backend):
    if backend == "reference":
        pytest.skip("no operator")
    if op == "philox_normal":
        arguments = (torch.tensor([1, 2], device=CUDA), 5, 3, torch.bfloat16, backend)
    elif op == "path_interpolate":
        x0 = torch.rand(2, 3, 4, 5, device=CUDA, requires_grad=True)
        arguments = (x0, None, torch.tensor([True, False], device=CUDA), [0.3], 0.3, 0.9, 7, 2, torch.float32, backend)
    elif op == "rk4_mlp":
        leaves = [x.to(CUDA).requires_grad_() for x in problem(3, 16, 2, torch.float32)]
        arguments = (*leaves, [0.3, 1.0], 2, True, "silu", backend)
    elif op == "fir_bias_act":
        x, filter, factor, seed, bias = operations()[op][0]
        leaves = [t.requires_grad_() for t in (x, factor, bias)]
        fir = ([12, 10], 2, 1, 2, True, 4.0)
        arguments = (x, filter, factor, None, None, seed.view(1), bias, None, *fir, "lrelu", 1.5, 1.0, backend)
    else:
        x, weight, style, filter, seed = operations()[op][0]
        arguments = (x, weight, style, None, None, seed.view(1), None, filter, True, 2, 1, "lrelu", 1.5, 1.0, backend)
    torch.library.opcheck(getattr(torch.ops.spigan, op), arguments)
