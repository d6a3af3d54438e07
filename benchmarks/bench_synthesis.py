"""Benchmark whole synthesis networks without gradients: cifar10 against alternatives, and the 256-pixel network.

pytest benchmarks/bench_synthesis.py --benchmark-only
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan.models import synthesis
from spigan.models.generator import Generator
from spigan.ops import BACKENDS, use_backend
from spigan.ops.backends import why_unavailable

from .conftest import grouped_modulated_conv2d
from .measuring import DEVICE

BACKENDS_HERE = [b for b in BACKENDS if why_unavailable("modulated_conv2d", b, DEVICE) is None]
DTYPES = [torch.float32, torch.bfloat16]


@cache
def network(preset: str) -> Generator:
    torch.manual_seed(0)
    config = spigan.preset(preset, data={"source": "digits"}).model
    return Generator(
        config.resolution, dim_h=config.dim_h, channel_base=config.channel_base, channel_max=config.channel_max
    ).to(DEVICE).eval().requires_grad_(False)  # fmt: skip


def latents(preset: str, batch: int) -> Tensor:
    return torch.randn(batch, network(preset).dim_h, generator=torch.Generator().manual_seed(1)).to(DEVICE)


@cache
def reference_images(preset: str, batch: int) -> Tensor:
    with torch.no_grad(), use_backend("reference"):
        return network(preset)(latents(preset, batch))


def convolution_flop(generator: Generator) -> float:
    """Return the FLOP of the convolutions for one image, by their definition."""
    flop = 0.0
    for resolution, block in zip(generator.block_resolutions, generator.blocks, strict=True):
        flop += 2.0 * resolution**2 * (block.conv1.weight.numel() + block.torgb.weight.numel())
        if not block.is_first:
            flop += 2.0 * (resolution / 2) ** 2 * block.conv0.weight.numel()
    return flop


def largest_layer(generator: Generator, dtype: torch.dtype) -> int:
    """Return the bytes of the input and output of the largest layer, for one image."""
    sizes = [(block.conv1.weight.shape[0], block.conv1.noise_const.numel()) for block in generator.blocks]
    return max(2 * channels * pixels * dtype.itemsize for channels, pixels in sizes)


def time_network(row: Any, monkeypatch: Any, preset: str, batch: int, dtype: torch.dtype, implementation: str) -> None:
    generator = network(preset)
    h = latents(preset, batch)

    def synthesize(forward: Any = generator, half: bool = dtype == torch.bfloat16) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=half):
            return forward(h)

    expected = reference_images(preset, batch)
    forward: Any = generator
    if implementation == "torch.compile":
        torch.compiler.reset()
        forward = torch.compile(generator)
    elif implementation == "grouped":
        monkeypatch.setattr(synthesis, "modulated_conv2d", grouped_modulated_conv2d_of_layer)
    with use_backend(implementation if implementation in BACKENDS else "reference"):
        row(
            f"synthesis, {preset}, {batch} images, {str(dtype)[6:]}",
            implementation,
            lambda: synthesize(forward),
            expected=expected,
            tolerance=(4e-2 if dtype == torch.bfloat16 else 1e-4) * expected.abs().max().item(),
            flop=convolution_flop(generator) * batch,
            images=batch,
            dtype=dtype,
            layer_bytes=largest_layer(generator, dtype) * batch,
        )


def grouped_modulated_conv2d_of_layer(*args: Any, noise_seed: Tensor | None = None, **kwargs: Any) -> Tensor:
    return grouped_modulated_conv2d(*args, **kwargs)


@pytest.mark.parametrize("implementation", [*BACKENDS_HERE, "torch.compile", "grouped"])
@pytest.mark.parametrize("batch", [1, 16, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@torch.no_grad()
def test_cifar10(row: Any, monkeypatch: Any, dtype: torch.dtype, batch: int, implementation: str) -> None:
    if implementation == "torch.compile" and DEVICE.type == "cpu" and batch == 16:
        pytest.skip("compiled for 1 and 100 images only: compiling takes longer than all the rest")
    time_network(row, monkeypatch, "cifar10", batch, dtype, implementation)


@pytest.mark.parametrize("implementation", BACKENDS_HERE)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@torch.no_grad()
def test_celebahq256(row: Any, monkeypatch: Any, dtype: torch.dtype, implementation: str) -> None:
    time_network(row, monkeypatch, "celebahq256", 64 if DEVICE.type == "cuda" else 4, dtype, implementation)
