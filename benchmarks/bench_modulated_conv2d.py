"""Benchmark every layer of the synthesis networks of cifar10 and celebahq256.

Compares this project's layer, the convolution algorithms that it chooses from on a CPU, and a grouped convolution with
separate weights for each image, as StyleGAN2 is often written.

pytest benchmarks/bench_modulated_conv2d.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan.models.layers import channels_at
from spigan.ops import BACKENDS, modulated_conv2d
from spigan.ops.backends import why_unavailable
from spigan.ops.demodulation import demodulation
from spigan.ops.frozen_layer import frozen_modulated_conv2d
from spigan.ops.layer_end import LayerEnd
from spigan.ops.layer_weights import prepare_weight
from spigan.ops.upfirdn2d import fir_filter

from .conftest import grouped_modulated_conv2d
from .measuring import DEVICE

IMPLEMENTATIONS = [
    *(b for b in BACKENDS if why_unavailable("modulated_conv2d", b, DEVICE) is None),
    "torch.compile",
    "grouped",
]
DTYPES = [torch.float32, torch.bfloat16]
# Convolution algorithms, with weights prepared beforehand, as the generator keeps them; `weight_form` chooses one.
FORMS = ["direct", "winograd", "products"] if DEVICE.type == "cpu" else []


def layers() -> dict[str, tuple[int, int, int, int, int]]:
    """Return (kernel, up, in channels, out channels, input size) of each distinct layer of both networks, by name."""
    found = {}
    for name in ("cifar10", "celebahq256"):
        config = (spigan.preset(name, data={"source": "digits"})).model
        width_in = None
        for log2 in range(2, config.resolution.bit_length()):
            size = 2**log2
            width = channels_at(size, config.channel_base, config.channel_max)
            if width_in is not None:
                found[f"{size}x{size}, {width_in} to {width}, up 2"] = (3, 2, width_in, width, size // 2)
            found[f"{size}x{size}, {width}"] = (3, 1, width, width, size)
            found[f"{size}x{size}, {width}, ToRGB"] = (1, 1, width, 3, size)
            width_in = width
    return found


LAYERS = layers()
# On a CPU, it takes long to compile a function for each size, so only the largest layer of each kind is compiled.
COMPILED_ON_CPU = (
    "32x32, 512",
    "32x32, 512 to 512, up 2",
    "32x32, 512, ToRGB",
    "256x256, 64",
    "256x256, 128 to 64, up 2",
)


def batch_of(channels: int, size: int) -> int:
    """Return how many images give a layer about 2^25 output values on a GPU or 2^21 on a CPU, from 1 to 100."""
    values = 2**25 if DEVICE.type == "cuda" else 2**21
    return max(1, min(100, values // (channels * size * size)))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *(f"form {form}" for form in FORMS)])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@torch.no_grad()
def test_modulated_conv2d(row: Any, dtype: torch.dtype, name: str, implementation: str) -> None:
    if implementation == "torch.compile" and DEVICE.type == "cpu" and name not in COMPILED_ON_CPU:
        pytest.skip("compiled for the largest layers only: compiling takes longer than all the rest")
    kernel, up, channels_in, channels_out, size = LAYERS[name]
    form = implementation.removeprefix("form ")
    possible = {
        "winograd": kernel == 3 and up == 1 and dtype == torch.float32,
        "products": up == 2,
        "direct": kernel == 3,
    }
    if not possible.get(form, True):
        pytest.skip("this form does not apply to this layer")
    n = batch_of(max(channels_in, channels_out), up * size)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x = draw(n, channels_in, size, size).to(dtype, memory_format=torch.channels_last)
    weight, style = draw(channels_out, channels_in, kernel, kernel), 1.0 + 0.5 * draw(n, channels_in)
    options: dict[str, Any] = {"up": up, "bias": draw(channels_out), "clamp": 256.0}
    if kernel == 1:
        options |= {"demodulate": False}
        style = style / channels_in**0.5
    else:
        options |= {"noise": draw(1, 1, up * size, up * size), "activation": "lrelu", "gain": 2**0.5}

    def layer(x: Tensor, backend: str) -> Tensor:
        return modulated_conv2d(x, weight, style, **options, backend=backend)

    def run() -> Tensor:
        if form in FORMS:
            images = x.permute(0, 2, 3, 1)
            result, _ = frozen_modulated_conv2d(
                "cpp", images, prepared, end, style=style, up=up, padding=1, filter=filter
            )
            return result.permute(0, 3, 1, 2)
        if implementation == "torch.compile":
            return compiled(x, "reference")
        if implementation == "grouped":
            return grouped_modulated_conv2d(x, weight, style, **options)
        return layer(x, implementation)

    if form in FORMS:
        prepared = prepare_weight(weight, form, dtype, "cpp")
        filter = fir_filter()
        end = LayerEnd(
            factor=demodulation(weight, style), **{name: value for name, value in options.items() if name != "up"}
        )
    compiled = torch.compile(layer)
    if implementation == "torch.compile":
        torch.compiler.reset()
    expected = layer(x.float(), "reference")
    row(
        f"{name}, {n} images, {str(dtype)[6:]}",
        implementation,
        run,
        expected=expected,
        tolerance=(2e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max().item(),
        # By definition of the convolution: a stride-2 transposed convolution has the products that its input needs.
        flop=2.0 * n * size * size * channels_in * channels_out * kernel**2,
        moved=(x.numel() + n * channels_out * (up * size) ** 2 + weight.numel()) * dtype.itemsize,
        dtype=dtype,
    )
