"""modulated_conv2d on every backend of a CUDA device: values and gradients."""

from __future__ import annotations

import pytest
import torch
from gpu import CUDA, DTYPES, check_accuracy, over_backends, place

from spigan.ops import modulated_conv2d
from spigan.ops.upfirdn2d import fir_filter

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


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


@over_backends("modulated_conv2d")
@pytest.mark.parametrize("up", [1, 2])
def test_float32_follows_cudnn(backend, up):
    """With TF32 allowed, every backend rounds factors, and by no more than plain PyTorch does."""
    arguments = {name: v for name, v in layer(2, (512, 512), 3, 16, up, torch.float32).items() if "noise" not in name}
    exact = modulated_conv2d(**place(arguments, torch.device("cpu"), torch.float64), backend="reference")  # type: ignore[arg-type]

    def error(name: str, allowed: bool) -> float:
        torch.backends.cudnn.allow_tf32 = allowed  # the fixture of this folder restores it
        result = modulated_conv2d(**place(arguments, CUDA), backend=name)  # type: ignore[arg-type]
        return (result.cpu() - exact).abs().max().item()

    assert 8 * error(backend, False) < error(backend, True) < 2 * error("reference", True)
