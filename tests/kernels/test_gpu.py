"""Every backend on a CUDA device: values and gradients, streams, CUDA graphs, compilers and a second device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spigan.ops import BACKENDS, path_interpolate, philox_normal, rk4_mlp
from spigan.ops.backends import choose, describe, why_unavailable
from spigan.ops.rk4_mlp import ACTIVATIONS

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]


def over_backends(op: str) -> pytest.MarkDecorator:
    """Run the test on each backend that can run `op` on a CUDA device."""
    return pytest.mark.parametrize("backend", [b for b in BACKENDS if why_unavailable(op, b, CUDA) is None])


def test_kernels_are_chosen():
    for op in ("philox_normal", "path_interpolate", "rk4_mlp"):
        cannot_run = describe(CUDA)[op]["cannot_run"]
        assert choose(op, None, CUDA) in ("cuda", "triton"), f"neither of the kernels of {op} runs here: {cannot_run}"


# ---- philox_normal ----


@over_backends("philox_normal")
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0), (7, 13), (100_001,), (1000, 33)])
@pytest.mark.parametrize("offset", [0, 3, 2**32 + 1, 2**63 - 200_000])
def test_normals_are_those_of_the_cpu(backend, shape, offset, poisoned_memory):
    expected = philox_normal(shape, seed=12, offset=offset, backend="reference")
    single = philox_normal(shape, seed=12, offset=offset, device=CUDA, backend=backend)
    assert single.is_cuda and single.shape == shape
    torch.testing.assert_close(single.cpu(), expected, rtol=0, atol=1e-5)
    for dtype in HALF if backend == "triton" else [*HALF, torch.float64]:
        cast = philox_normal(shape, seed=12, offset=offset, device=CUDA, dtype=dtype, backend=backend)
        assert torch.equal(cast, single.to(dtype))


@over_backends("philox_normal")
def test_normals_of_several_seeds(backend):
    seeds = torch.tensor([0, 7, 2**63 - 1, 7])
    expected = philox_normal((4, 3, 11), seed=seeds, offset=6, backend="reference")
    actual = philox_normal((4, 3, 11), seed=seeds.to(CUDA), offset=6, backend=backend)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-5)
    strided = torch.stack((seeds, seeds), 1).to(CUDA)[:, 0]
    assert torch.equal(philox_normal((4, 3, 11), seed=strided, offset=6, backend=backend), actual)
    assert torch.equal(actual[1], actual[3])


@over_backends("philox_normal")
def test_more_numbers_than_32_bits_count(backend):
    count = 2**31 + 9
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 16e9:
        pytest.skip("it needs too much memory")
    for drawn in (
        philox_normal((count,), seed=3, device=CUDA, dtype=torch.bfloat16, backend=backend),
        philox_normal((2, count // 2), seed=torch.tensor([5, 3], device=CUDA), dtype=torch.bfloat16, backend=backend)[
            1
        ],
    ):
        tail = philox_normal((40,), seed=3, offset=drawn.numel() - 40, dtype=torch.bfloat16)
        torch.testing.assert_close(drawn[-40:].cpu(), tail, rtol=2**-7, atol=1e-5)


# ---- path_interpolate ----


def images(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape).to(dtype)


@over_backends("path_interpolate")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (16, 3, 32, 32), (5, 3, 33, 31), (2, 0, 3, 4)])
def test_path(backend, shape, x0_dtype, dtype, assert_accurate, poisoned_memory):
    x0, flips = images(*shape, dtype=x0_dtype), torch.arange(shape[0]) % 2 == 0
    for times, options in (
        ([0.3], {"seed": 2**40 + 1}),
        ([0.25, 0.5, 1.0], {"seed": 5, "offset": 2**32 + 3}),
        ([k / 8 for k in range(1, 9)], {"seed": 5, "offset": 2**62 + 2}),
        ([0.1, 1.0], {"noise": torch.randn(shape)}),
        ([0.1, 1.0], {"noise": torch.randn(shape).to(torch.bfloat16)}),
    ):
        for mask in (None, flips):
            on_gpu = {
                name: x.to(CUDA) if isinstance(x, Tensor) else x for name, x in (options | {"flips": mask}).items()
            }
            actual = path_interpolate(x0.to(CUDA), times, **on_gpu, dtype=dtype, backend=backend)
            options_cpu = options | {"flips": mask, "backend": "reference"}
            plain = path_interpolate(x0, times, **options_cpu, dtype=dtype)
            exact_x0 = x0.double() / 127.5 - 1 if x0_dtype == torch.uint8 else x0.double()
            exact = path_interpolate(exact_x0, times, **options_cpu, dtype=torch.float64)
            # 1e-5: the noise of two backends may differ by so much.
            slack = 2.0 if dtype in HALF else 2.0 + 1e-5 / torch.finfo(dtype).eps
            for a, p, e in zip(actual, plain, exact, strict=True):
                assert a.is_cuda
                assert_accurate(a.cpu(), p, e, slack)


@over_backends("path_interpolate")
@pytest.mark.parametrize("flips", [None, [True, False, True]])
def test_gradients_of_the_path(backend, flips):
    found = []
    for device, name in ((CUDA, backend), ("cpu", "reference")):
        torch.manual_seed(1)
        x0, noise = (x.to(device).requires_grad_() for x in (torch.rand(3, 2, 4, 5), torch.randn(3, 2, 4, 5)))
        mask = None if flips is None else torch.tensor(flips, device=device)
        x_T, i = path_interpolate(x0, [0.3, 1.0], noise=noise, flips=mask, backend=name)
        first = torch.autograd.grad(x_T.square().sum() + i.pow(3).sum(), (x0, noise), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x0, noise))
        found.append([g.detach().cpu() for g in (*first, *second)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@over_backends("path_interpolate")
def test_more_pixels_than_32_bits_count(backend):
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("it needs too much memory")
    shape = (2, 3, 19_000, 19_000)  # 2.17e9
    x0 = torch.randint(0, 256, (1, 1, 1, 19_000), dtype=torch.uint8, device=CUDA).expand(shape).contiguous()
    flips = torch.tensor([False, True], device=CUDA)
    x_T, i = path_interpolate(x0, [1.0], seed=3, flips=flips, dtype=torch.bfloat16, backend=backend)
    mirrored = x0[1, 2, -1].cpu().flip(0).float() / 127.5 - 1
    torch.testing.assert_close(i[0, 1, 2, -1].cpu().float(), mirrored, rtol=2**-8, atol=1e-6)
    row = philox_normal((19_000,), seed=3, offset=x0.numel() - 19_000)
    torch.testing.assert_close(x_T[1, 2, -1].cpu().float(), row, rtol=2**-7, atol=0.02)  # x_T is 0.0066 of the image


# ---- rk4_mlp ----


def problem(n: int, dim: int, layers: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    h0, weight = torch.randn(n, dim), scale * torch.randn(layers, dim, dim) / dim**0.5
    return [x.to(dtype) for x in (h0, weight, scale * torch.randn(layers, dim), scale * torch.randn(layers, dim))]


def check_states(
    assert_accurate: Callable[..., None], backend: str, inputs: list[Tensor], times: list[float], **options: object
) -> None:
    on_gpu = [x.to(CUDA) for x in inputs]
    actual = rk4_mlp(*on_gpu, times, **options, backend=backend)  # type: ignore[arg-type]
    plain = rk4_mlp(*on_gpu, times, **options, backend="reference")  # type: ignore[arg-type]
    # In float64 on the CPU; where that would take minutes, in float64 on the GPU.
    exact_on = CUDA if inputs[0].numel() * inputs[1].numel() > 1e9 else torch.device("cpu")
    exact_inputs = [x.to(exact_on).double() for x in inputs]
    exact = rk4_mlp(*exact_inputs, times, **options, backend="reference")  # type: ignore[arg-type]
    assert actual.is_cuda
    assert_accurate(actual.cpu(), plain.cpu(), exact.cpu())


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n", "dim", "layers", "times", "steps"),
    [
        (1, 16, 1, [1.0], 3),
        (3, 48, 2, [0.1, 0.6, 1.0], 4),
        (17, 64, 3, [0.5], 2),
        (65, 80, 2, [0.3, 1.0], 4),
        (130, 256, 5, [0.9], 1),
        (7, 1008, 2, [0.2, 1.0], 2),
    ],
)
def test_states(backend, n, dim, layers, times, steps, activation, dtype, assert_accurate, poisoned_memory):
    check_states(assert_accurate, backend, problem(n, dim, layers, dtype), times, steps=steps, activation=activation)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 3, 100, 4096])
@pytest.mark.parametrize(("dim", "layers", "steps"), [(512, 3, 4), (1024, 8, 1)])
def test_states_of_wide_layers(backend, n, dim, layers, steps, dtype, assert_accurate, poisoned_memory):
    check_states(assert_accurate, backend, problem(n, dim, layers, dtype), [0.4, 1.0], steps=steps)


@over_backends("rk4_mlp")
def test_many_times(backend, assert_accurate):
    check_states(assert_accurate, backend, problem(5, 64, 2, torch.float32), [k / 64 for k in range(1, 65)], steps=1)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_independent_and_views_allowed(backend, dtype):
    h0, weight, bias, time_weight = (x.to(CUDA) for x in problem(70, 64, 2, dtype))
    expected = rk4_mlp(h0, weight, bias, time_weight, [0.4, 1.0], backend=backend)
    assert expected.isfinite().all()
    beside = h0.clone()
    beside[::3] = torch.nan
    kept = [row for row in range(70) if row % 3]
    actual = rk4_mlp(beside, weight, bias, time_weight, [0.4, 1.0], backend=backend)
    assert torch.equal(actual[:, kept], expected[:, kept]) and actual[:, ::3].isnan().all()
    views = (
        torch.full((64, 140), torch.nan, dtype=dtype, device=CUDA).t()[::2].copy_(h0),
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.full((2, 128), torch.nan, dtype=dtype, device=CUDA)[:, 1::2].copy_(bias),
        time_weight.t().contiguous().t(),
    )
    strided = rk4_mlp(*views, [0.4, 1.0], backend=backend)
    if backend == "reference":  # cuBLAS may choose another order of sums
        torch.testing.assert_close(strided, expected, rtol=0.02, atol=0.02)
    else:
        assert torch.equal(strided, expected)


@over_backends("rk4_mlp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "dim", "layers"), [(0, 32, 2), (3, 48, 2), (40, 64, 3), (5, 512, 3)])
def test_gradients_of_the_states(backend, n, dim, layers, dtype, assert_accurate, poisoned_memory):
    inputs, found = problem(n, dim, layers, dtype, scale=0.7), []
    for device, name, cast in (
        (CUDA, backend, dtype),
        (CUDA, "reference", dtype),
        (torch.device("cpu"), "reference", torch.float64),
    ):
        leaves = [x.to(device, cast).requires_grad_() for x in inputs]
        output = rk4_mlp(*leaves, [0.3, 1.0], steps=2, backend=name)
        gradients = torch.autograd.grad(output, leaves, torch.full_like(output, 0.125))
        found.append([g.cpu() for g in gradients])
    for gradient in zip(*found, strict=True):
        assert_accurate(*gradient, 4.0)


@over_backends("rk4_mlp")
def test_second_derivatives_of_the_states(backend):
    inputs, found = problem(2, 16, 2, torch.float32, scale=0.7), []
    for device, name in ((CUDA, backend), ("cpu", "reference")):
        leaves = [x.to(device).requires_grad_() for x in inputs]
        output = rk4_mlp(*leaves, [0.3, 1.0], steps=2, backend=name)
        first = torch.autograd.grad(output.square().sum(), leaves[:2], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        found.append([g.cpu() for g in second])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-3, atol=2e-3 * e.abs().max().item())


# ---- Streams, graphs, compilers, devices ----


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

    def inputs() -> dict[str, list[Tensor]]:
        return {
            "philox_normal": [torch.randint(0, 2**62, (3,), device=device)],
            "path_interpolate": [images(3, 2, 5, 7).to(device), torch.rand(3, device=device) < 0.5],
            "rk4_mlp": [x.to(device) for x in problem(5, 48, 2, torch.float32)],
        }

    first, second = inputs(), inputs()
    functions = {"philox_normal": draw, "path_interpolate": path, "rk4_mlp": solve}
    return {op: (first[op], second[op], functions[op]) for op in functions}


CALLS = [
    (op, backend)
    for op in ("philox_normal", "path_interpolate", "rk4_mlp")
    for backend in BACKENDS
    if why_unavailable(op, backend, CUDA) is None
]
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


@over_backends("rk4_mlp")
def test_cuda_graph_with_a_backward_pass(backend):
    inputs = [x.to(CUDA).requires_grad_() for x in problem(5, 48, 2, torch.float32)]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(rk4_mlp(*inputs, [0.4, 1.0], steps=2, backend=backend).square().sum(), inputs)

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
        for x in inputs:
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
    else:
        leaves = [x.to(CUDA).requires_grad_() for x in problem(3, 16, 2, torch.float32)]
        arguments = (*leaves, [0.3, 1.0], 2, True, "silu", backend)
    torch.library.opcheck(getattr(torch.ops.spigan, op), arguments)
