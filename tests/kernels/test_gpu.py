"""Every backend on a CUDA device: values and gradients, streams, CUDA graphs, compilers and a second device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from spigan.ops import BACKENDS, fir_bias_act, modulated_conv2d, path_interpolate, philox_normal, rk4_mlp
from spigan.ops.backends import choose, describe, why_unavailable
from spigan.ops.layer_end import LayerEnd, finish_layer
from spigan.ops.rk4_mlp import ACTIVATIONS
from spigan.ops.upfirdn2d import fir_filter

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = DTYPES[1:]
OPERATIONS = ("philox_normal", "path_interpolate", "rk4_mlp", "fir_bias_act", "modulated_conv2d")


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """cuDNN's convolutions do not round float32 to TF32 (nor do matrix products, unless asked to)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def over_backends(op: str) -> pytest.MarkDecorator:
    """Run the test on each backend that can run `op` on a CUDA device."""
    return pytest.mark.parametrize("backend", [b for b in BACKENDS if why_unavailable(op, b, CUDA) is None])


def test_kernels_are_chosen():
    for op in OPERATIONS:
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


# ---- fir_bias_act ----

FIR = {
    "none": {},
    "blur": {"filter": fir_filter(), "padding": (1, 1), "fir_gain": 4.0},
    "up": {"filter": fir_filter(), "up": 2, "padding": (2, 1), "fir_gain": 4.0},
    "up, odd padding": {"filter": fir_filter(), "up": 2, "padding": (1, 2)},
    "down": {"filter": fir_filter(), "down": 2, "padding": (1, 1)},
    "up and down, cropped": {"filter": fir_filter([1.0, 2.0, 5.0]), "up": 2, "down": 2, "padding": (-1, 4)},
    "not symmetric": {"filter": fir_filter(torch.tensor([[1.0, 5.0], [4.0, -3.0]])), "padding": (0, 3)},
    "eight taps": {"filter": fir_filter(torch.arange(1.0, 9.0)), "up": 2, "padding": (5, 4)},
}
over_fir = pytest.mark.parametrize("fir", FIR.values(), ids=FIR)


def place(arguments: dict[str, object], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, object]:
    """Arguments with their tensors on a device, floating ones also in `dtype`."""
    return {
        name: v.to(device, dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
        for name, v in arguments.items()
    }


def result_size(fir: dict[str, object], height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"):
        arguments = place(fir, torch.device("meta"))
        shape = fir_bias_act(torch.empty(1, 1, height, width), **arguments, backend="reference").shape  # type: ignore[arg-type]
    return shape[2], shape[3]


def check_accuracy(
    assert_accurate: Callable[..., None],
    function: Callable[..., Tensor],
    arguments: dict[str, object],
    backend: str,
    slack: float = 2.0,
) -> None:
    """A function of keyword arguments on the GPU against its reference there and in float64 on the CPU."""
    actual = function(**place(arguments, CUDA), backend=backend)
    plain = function(**place(arguments, CUDA), backend="reference")
    exact = function(**place(arguments, torch.device("cpu"), torch.float64), backend="reference")
    assert actual.is_cuda
    if "noise_seed" in arguments:
        slack += 1e-5 / torch.finfo(actual.dtype).eps  # the noise of two backends may differ by so much
    assert_accurate(actual.cpu(), plain.cpu(), exact, slack)


@over_backends("fir_bias_act")
@over_fir
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "channels", "height", "width"),
    [(2, 1, 5, 3), (3, 3, 32, 32), (2, 37, 9, 11), (3, 64, 17, 19), (1, 512, 8, 8)],
)
def test_layer_ends(backend, n, channels, height, width, dtype, fir, assert_accurate, poisoned_memory):
    size = result_size(fir, height, width)
    x, add = torch.randn(n, channels, height, width).to(dtype), torch.randn(n, channels, *size).to(dtype)
    factor, bias, noise = torch.randn(n, channels), torch.randn(channels), torch.randn(n, 1, *size)
    lrelu = {"activation": "lrelu", "gain": 2**0.5}
    for options in (
        {},
        {"add": add},
        {"factor": factor, "bias": bias, **lrelu, "clamp": 0.8},
        {"noise": noise, "noise_strength": torch.tensor(0.3), "bias": torch.randn(n, channels), **lrelu},
        {"factor": factor, "noise": noise[:1], "add": add, "clamp": 0.5},
        {"noise_seed": 2**40 + 1, "noise_strength": torch.tensor(-0.5), **lrelu},
    ):
        check_accuracy(assert_accurate, fir_bias_act, {"x": x, **fir, **options}, backend)


@over_backends("fir_bias_act")
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_ends_of_views_and_of_nothing(backend, dtype, assert_accurate):
    x, factor = torch.randn(3, 16, 12, 10).to(dtype), torch.randn(3, 32)[:, ::2]
    channels_last = x.to(memory_format=torch.channels_last)
    # Off the alignment that wide loads need.
    shifted = torch.cat((x.new_zeros(1), channels_last.permute(0, 2, 3, 1).flatten()))[1:]
    views = [x.transpose(2, 3), x[:, :, 1:, ::2], channels_last[:, 3:], x[:0], channels_last]
    views.append(shifted.view(3, 12, 10, 16).permute(0, 3, 1, 2))
    for fir in (FIR["none"], FIR["up"]):
        for view in views:
            n, channels = view.shape[:2]
            arguments = {"x": view, "factor": factor[:n, :channels], "activation": "lrelu", **fir}
            check_accuracy(assert_accurate, fir_bias_act, arguments, backend)
    aligned = fir_bias_act(channels_last.to(CUDA), bias=torch.ones(16, device=CUDA), clamp=1.0, backend=backend)
    memory = torch.empty(1 + x.numel(), dtype=dtype, device=CUDA)  # .to(CUDA) above aligned what it copied
    on_gpu = memory[1:].copy_(shifted).view(3, 12, 10, 16).permute(0, 3, 1, 2)
    assert torch.equal(fir_bias_act(on_gpu, bias=torch.ones(16, device=CUDA), clamp=1.0, backend=backend), aligned)


@over_backends("fir_bias_act")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("colors", [1, 3, 4])
@pytest.mark.parametrize("channels", [5, 32, 64, 520])
def test_colors_of_a_layer(backend, channels, colors, dtype, assert_accurate, poisoned_memory):
    """What the layers of the networks use beside `fir_bias_act`: `next_factor`, `rgb`, and a result in place."""
    if backend == "reference":
        pytest.skip("it has no such parts")
    n, height, width = 2, 7, 6
    x = torch.randn(n, height, width, channels).to(dtype)
    wide = {"factor": torch.randn(n, channels), "bias": torch.randn(channels), "next_factor": torch.randn(n, channels)}
    weight = torch.randn(n, colors, channels)

    def expected(compute: torch.dtype) -> tuple[Tensor, Tensor]:
        t = {name: value.to(compute) for name, value in wide.items()}
        v = x.to(compute) * t["factor"][:, None, None] + t["bias"]
        v = (1.5 * torch.where(v < 0, 0.2 * v, v)).clamp(-2.0, 2.0)
        return v * t["next_factor"][:, None, None], torch.einsum("nhwc,nrc->nhwr", v, weight.to(compute))

    (out_plain, rgb_plain), (out_exact, rgb_exact) = expected(torch.float32), expected(torch.float64)
    for keep in (True, False):
        out, rgb = x.to(CUDA), torch.full((n, height, width, colors), torch.nan, device=CUDA)
        end = LayerEnd(
            **place(wide, CUDA), activation="lrelu", gain=1.5, clamp=2.0, rgb_weight=weight.to(CUDA)
        )  # fmt: skip
        finish_layer(backend, out if keep else None, out, end, rgb=rgb)
        assert_accurate(rgb.cpu(), rgb_plain, rgb_exact)
        if keep:
            assert_accurate(out.cpu(), out_plain.to(dtype), out_exact)
        else:
            assert torch.equal(out.cpu(), x)


@over_backends("fir_bias_act")
@pytest.mark.parametrize("fir", [FIR["none"], FIR["blur"], FIR["up"], FIR["down"]], ids=["none", "blur", "up", "down"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "channels", "height", "width"), [(2, 3, 20, 17), (3, 64, 33, 32), (2, 520, 5, 4)])
def test_gradients_of_layer_ends(backend, n, channels, height, width, dtype, fir, assert_accurate, poisoned_memory):
    # All pixels of a channel have one sign, and every third channel is far beyond the clamp: rounding decides nowhere
    # on which side of a kink a value is.
    sign = torch.randn(n, channels).sign()
    beyond = 200.0 * (torch.arange(channels) % 3 == 2)
    size = result_size(fir, height, width)
    inputs = {
        "x": (sign[:, :, None, None] * (0.5 + torch.rand(n, channels, height, width))).to(dtype),
        "factor": 0.5 + torch.rand(n, channels),
        "noise": 0.1 * torch.rand(n, 1, *size),
        "noise_strength": torch.tensor(0.5),
        "bias": sign * (0.3 + 0.1 * torch.rand(n, channels) + beyond),
    }
    weight, found = torch.randn(n, channels, *size).to(dtype), []
    for device, name, cast in (
        (CUDA, backend, None),
        (CUDA, "reference", None),
        (torch.device("cpu"), "reference", torch.float64),
    ):
        leaves = {k: v.detach().requires_grad_() for k, v in place(inputs, device, cast).items()}
        y = fir_bias_act(**leaves, **place(fir, device), activation="lrelu", gain=1.5, clamp=20.0, backend=name)
        found.append([g.cpu() for g in torch.autograd.grad(y, list(leaves.values()), weight.to(y))])
    for gradient in zip(*found, strict=True):
        assert_accurate(*gradient, 4.0)


@over_backends("fir_bias_act")
@pytest.mark.parametrize("fir", [FIR["none"], FIR["up"], FIR["down"]], ids=["none", "up", "down"])
def test_second_derivatives_of_layer_ends(backend, fir):
    inputs = {"x": torch.randn(2, 8, 6, 7), "factor": torch.randn(2, 8), "bias": torch.randn(8)}
    found = []
    for device, name, dtype in ((CUDA, backend, torch.float32), (torch.device("cpu"), "reference", torch.float64)):
        leaves = {k: v.detach().requires_grad_() for k, v in place(inputs, device, dtype).items()}
        y = fir_bias_act(**leaves, **place(fir, device), activation="lrelu", gain=1.5, backend=name)
        first = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()))
        found.append([g.double().cpu() for g in second])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4 * e.abs().max().item())


@over_backends("fir_bias_act")
def test_more_channels_of_pixels_than_32_bits_count(backend):
    if backend == "reference" or torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("it needs too much memory")
    shape = (2, 4100, 4100, 64)  # 2.15e9
    x = torch.empty(shape, dtype=torch.bfloat16, device=CUDA).normal_().permute(0, 3, 1, 2)
    bias = torch.randn(64, device=CUDA)
    for fir in (FIR["none"], {"filter": fir_filter(), "padding": (2, 1)}):
        options = {**place(fir, CUDA), "bias": bias, "activation": "lrelu"}
        y = fir_bias_act(x, **options, backend=backend)
        corner = fir_bias_act(x[1:, :, -16:, -16:].float(), **options, backend="reference")
        torch.testing.assert_close(y[1:, :, -8:, -8:].float(), corner[:, :, -8:, -8:], rtol=2**-8, atol=1e-5)
        del y
    grad = torch.ones(1, dtype=torch.bfloat16, device=CUDA).expand(shape).permute(0, 3, 1, 2)
    leaf = x.requires_grad_()
    (found,) = torch.autograd.grad(fir_bias_act(leaf, activation="lrelu", backend=backend), leaf, grad)
    slope = torch.where(x.detach()[1:, :, -8:, -8:] > 0, 1.0, 0.2).to(torch.bfloat16)
    torch.testing.assert_close(found[1:, :, -8:, -8:], slope, rtol=2**-8, atol=0)


# ---- modulated_conv2d ----


def layer(n: int, channels: tuple[int, int], kernel: int, size: int, up: int, dtype: torch.dtype) -> dict[str, object]:
    i, o = channels
    return {
        "x": torch.randn(n, i, size, size).to(dtype),
        "weight": torch.randn(o, i, kernel, kernel),
        "style": 1.0 + 0.5 * torch.randn(n, i),
        "noise": torch.randn(n, 1, up * size, up * size),
        "noise_strength": torch.tensor(0.3),
        "bias": torch.randn(o),
        "resample_filter": fir_filter(),
        "up": up,
    }


def convolution_slack(dtype: torch.dtype) -> float:
    """float32: room for the library's algorithms, of which it chooses one by shape and layout, as Winograd's."""
    return 50.0 if dtype == torch.float32 else 4.0


over_layers = pytest.mark.parametrize(
    ("n", "channels", "kernel", "size", "up"),
    [
        (2, (16, 32), 3, 8, 1),
        (3, (37, 5), 3, 7, 1),
        (2, (16, 3), 1, 9, 1),  # ToRGB
        (2, (24, 40), 1, 4, 2),
        (3, (64, 48), 3, 8, 2),
        (1, (37, 5), 3, 5, 2),
        (2, (512, 512), 3, 16, 1),
        (2, (512, 256), 3, 8, 2),
    ],
)


@over_backends("modulated_conv2d")
@over_layers
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers(backend, n, channels, kernel, size, up, dtype, assert_accurate, poisoned_memory):
    arguments = layer(n, channels, kernel, size, up, dtype)
    end = {"activation": "lrelu", "gain": 2**0.5, "clamp": 2.0}
    check_accuracy(assert_accurate, modulated_conv2d, arguments | end, backend, convolution_slack(dtype))
    drawn = {name: v for name, v in arguments.items() if name != "noise"} | {"noise_seed": torch.tensor(2**33 + 5)}
    check_accuracy(assert_accurate, modulated_conv2d, drawn | end, backend, convolution_slack(dtype))
    plain = {name: arguments[name] for name in ("x", "weight", "style", "up")} | {"demodulate": False, "gain": 0.1}
    check_accuracy(assert_accurate, modulated_conv2d, plain, backend, convolution_slack(dtype))


@over_backends("modulated_conv2d")
@over_layers
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_layers(backend, n, channels, kernel, size, up, dtype, assert_accurate, poisoned_memory):
    arguments, found = layer(n, channels, kernel, size, up, dtype), []
    names = ("x", "weight", "style", "noise", "noise_strength", "bias")
    weight = torch.randn(n, channels[1], up * size, up * size).to(dtype)
    for device, name, cast in (
        (CUDA, backend, None),
        (CUDA, "reference", None),
        (torch.device("cpu"), "reference", torch.float64),
    ):
        placed = place(arguments, device, cast)
        leaves = {k: placed[k].detach().requires_grad_() for k in names}  # type: ignore[attr-defined]
        y = modulated_conv2d(**{**placed, **leaves}, gain=1.5, backend=name)  # type: ignore[arg-type]
        found.append([g.cpu() for g in torch.autograd.grad(y, list(leaves.values()), weight.to(y))])
    for gradient in zip(*found, strict=True):
        assert_accurate(*gradient, convolution_slack(dtype))


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
