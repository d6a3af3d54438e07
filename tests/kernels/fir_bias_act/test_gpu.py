"""fir_bias_act on every backend of a CUDA device: values and gradients."""

from __future__ import annotations

import pytest
import torch
from gpu import CUDA, DTYPES, check_accuracy, over_backends, place
from torch import Tensor

from spigan.ops import fir_bias_act
from spigan.ops.layer_end import LayerEnd, finish_layer
from spigan.ops.upfirdn2d import fir_filter

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


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


def result_size(fir: dict[str, object], height: int, width: int) -> tuple[int, int]:
    with torch.device("meta"):
        arguments = place(fir, torch.device("meta"))
        shape = fir_bias_act(torch.empty(1, 1, height, width), **arguments, backend="reference").shape  # type: ignore[arg-type]
    return shape[2], shape[3]


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
