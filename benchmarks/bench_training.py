"""Benchmark training: iterations of Algorithm 1, and forward and backward passes of networks and penalties.

pytest benchmarks/bench_training.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import spigan
from spigan.images import save_png
from spigan.models.discriminator import Discriminator
from spigan.models.generator import Generator
from spigan.ops import BACKENDS, use_backend
from spigan.ops.backends import why_unavailable
from spigan.training.trainer import Trainer

from .measuring import DEVICE

BACKENDS_HERE = [b for b in BACKENDS if why_unavailable("fir_bias_act", b, DEVICE) is None]
PRESET, BATCH = ("cifar10", 64) if DEVICE.type == "cuda" else ("cifar10-small", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of noise images; the time does not depend on what they show."""
    path = tmp_path_factory.mktemp("images")
    for number, image in enumerate(torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8)):
        save_png(image, path / f"{number}.png", durable=False)
    return path


@pytest.mark.parametrize("implementation", BACKENDS_HERE)
@pytest.mark.parametrize("intervals", [1, 2, 4])
def test_iterations(row: Any, folder: Path, tmp_path: Path, intervals: int, implementation: str) -> None:
    """Time one D iteration plus one G iteration, without lazy R1 (every sixteenth), which is timed separately below."""
    config = spigan.preset(PRESET, data={"source": str(folder)}, batch=BATCH, intervals=intervals)

    def start(backend: str) -> Callable[[], Tensor]:
        trainer = Trainer(config, tmp_path / backend, progress=False)
        images = torch.stack(list(trainer.dataset))

        def iterate() -> Tensor:
            with use_backend(backend):
                trainer.train_iteration(images)
                trainer.train_iteration(images)
            means = trainer.state.statistics.take_means()
            return torch.tensor([means["loss_d"], means["loss_g"]])

        return iterate

    expected = start("reference")()
    (tmp_path / "reference").rename(tmp_path / "expected")
    row(
        f"D and G iteration, {PRESET}, batch {BATCH}, K = {intervals}, {config.precision}",
        implementation,
        start(implementation),
        expected=expected,
        tolerance=5e-2,
        images=BATCH,
    )


@pytest.mark.parametrize("implementation", [*BACKENDS_HERE, "torch.compile"])
@pytest.mark.parametrize("step", ["generator and discriminator", "path length", "R1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_training_step(row: Any, dtype: torch.dtype, step: str, implementation: str) -> None:
    if implementation == "torch.compile" and step != "generator and discriminator":
        pytest.skip("torch.compile has no second derivatives")
    if implementation == "torch.compile" and dtype == torch.float32 and DEVICE.type == "cpu":
        pytest.skip("compiled in the preset's dtype only: compiling takes longer than all the rest")
    config = spigan.preset(PRESET, data={"source": "digits"}).model
    torch.manual_seed(0)
    widths = {"channel_base": config.channel_base, "channel_max": config.channel_max}
    generator = Generator(config.resolution, dim_h=config.dim_h, **widths).to(DEVICE).train()
    discriminator = Discriminator(config.resolution, **widths).to(DEVICE).train()
    h = torch.randn(BATCH, config.dim_h, device=DEVICE, requires_grad=True)
    real = torch.randn(BATCH, 3, config.resolution, config.resolution, device=DEVICE, requires_grad=True)
    parameters = [*generator.parameters(), *discriminator.parameters(), h]
    networks: tuple[Any, Any] = (generator, discriminator)
    if implementation == "torch.compile":
        torch.compiler.reset()
        networks = (torch.compile(generator), torch.compile(discriminator))

    def loss(generate: Any = networks[0], discriminate: Any = networks[1]) -> Tensor:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            if step == "R1":
                (gradient,) = torch.autograd.grad(discriminate(real, 0.5).sum(), real, create_graph=True)
                return gradient.square().sum((1, 2, 3)).mean()
            fake = generate(h, "const")
            if step == "path length":
                (gradient,) = torch.autograd.grad((fake * real).sum(), h, create_graph=True)
                return gradient.square().sum(1).sqrt().mean()
            return F.softplus(discriminate(fake, 0.5)).mean() + F.softplus(-discriminate(real, 0.5)).mean()

    def gradients(*networks: Any) -> Tensor:
        """Return the gradients of all parameters as one vector."""
        found = torch.autograd.grad(loss(*networks), parameters, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    with use_backend("reference"):
        expected = gradients(generator, discriminator)
    with use_backend(implementation if implementation in BACKENDS else "reference"):
        scale = expected.abs().max().item()
        row(
            f"{step}, {PRESET}, batch {BATCH}, {str(dtype)[6:]}",
            implementation,
            gradients,
            expected=expected,
            tolerance=(1e-1 if dtype == torch.bfloat16 else 1e-3) * scale,
        )
