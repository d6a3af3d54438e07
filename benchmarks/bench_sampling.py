"""Benchmark sampling by the protocol of the paper's Table 2: the time of 100 images from noise.

Compares this project, on each backend and in each dtype, with its rivals, each with its own number of network
evaluations (NFE), and shows where the time goes.

pytest benchmarks/bench_sampling.py --benchmark-only
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan import SPIGAN, Sampler
from spigan.images import to_uint8
from spigan.models.load import load_model
from spigan.ops import BACKENDS, philox_normal
from spigan.ops.backends import why_unavailable
from spigan.sampling import count_evaluations

from .bench_synthesis import convolution_flop
from .measuring import DEVICE
from .peers import PEERS, Peer

GPU = DEVICE.type == "cuda"
BACKENDS_HERE = [b for b in BACKENDS if why_unavailable("modulated_conv2d", b, DEVICE) is None]
CHOICES = [*BACKENDS_HERE, *(["auto"] if GPU else [])]  # on a GPU, "auto" takes the faster backend for each layer
DTYPES = [torch.float32, torch.bfloat16]
PAPER = {"SPI-GAN": 0.05, "StyleGAN2": 0.04}  # seconds, Table 2
IMAGES_256 = 64 if GPU else 4


@cache
def model_of(preset: str, **changes: Any) -> SPIGAN:
    """Return a model with random weights; its time does not depend on what it has learned."""
    torch.manual_seed(0)
    config = spigan.preset(preset, data={"source": "digits"}).model.model_copy(update=changes)
    return SPIGAN(config).eval().requires_grad_(False).to(DEVICE)


@cache
def reference_images(preset: str, n: int, **changes: Any) -> Tensor:
    return Sampler(model_of(preset, **changes), backend="reference", batch_size=n, output="uint8")(range(n))


def flop(model: SPIGAN, n: int) -> float:
    """Return the FLOP of the mapping network and of the synthesis network's convolutions."""
    config = model.config
    evaluations = {"rk4": 4, "euler": 1}[config.ode_solver] * config.ode_steps
    mapping = config.mlp_layers if config.mapping == "mlp" else evaluations * config.ode_layers
    return n * (convolution_flop(model.generator) + 2.0 * mapping * config.dim_h**2)


def time_sampler(
    row: Any, group: str, name: str, preset: str, n: int, backend: str, dtype: torch.dtype, **changes: Any
) -> None:
    model = model_of(preset, **changes)
    sampler = Sampler(model, batch_size=n, dtype=dtype, backend=backend, output="uint8")
    expected = reference_images(preset, n, **changes)
    with count_evaluations(model) as evaluations:
        sampler(range(n))

    def check(images: Tensor) -> None:
        # Random weights give images of high contrast, so bfloat16 differs by a few of the 255 grey levels.
        difference = (images.int() - expected.int()).abs().float()
        assert difference.mean() < (4.0 if dtype == torch.bfloat16 else 0.05), difference.mean()

    row(
        group,
        name,
        lambda: sampler(range(n)),
        check=check,
        flop=flop(model, n),
        dtype=dtype,
        images=n,
        nfe=evaluations[0] // n,
        memory=True,
        paper_seconds=PAPER["StyleGAN2" if changes else "SPI-GAN"] if n == 100 and preset == "cifar10" else None,
    )


@pytest.mark.parametrize("backend", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n", [100, 16, 1])
def test_cifar10(row: Any, n: int, dtype: torch.dtype, backend: str) -> None:
    name = f"SPI-GAN, {backend}, {str(dtype)[6:]}"
    time_sampler(row, f"{n} image{'s' * (n > 1)}, 3 x 32 x 32", name, "cifar10", n, backend, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_stylegan2(row: Any, dtype: torch.dtype) -> None:
    """Time the same generator with StyleGAN2's mapping network."""
    name = f"StyleGAN2, {BACKENDS_HERE[-1]}, {str(dtype)[6:]}"
    time_sampler(row, "100 images, 3 x 32 x 32", name, "cifar10", 100, BACKENDS_HERE[-1], dtype, mapping="mlp")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", CHOICES)
def test_celebahq256(row: Any, backend: str, dtype: torch.dtype) -> None:
    name = f"SPI-GAN, {backend}, {str(dtype)[6:]}"
    time_sampler(row, f"{IMAGES_256} images, 3 x 256 x 256", name, "celebahq256", IMAGES_256, backend, dtype)


@pytest.mark.parametrize("peer", [*PEERS["cifar10"], *PEERS["celebahq256"]], ids=lambda p: f"{p.name} {p.resolution}")
def test_peer(row: Any, peer: Peer) -> None:
    """Time a part of the chain and, on a CPU, of the batch: all evaluations and images take the same time."""
    images = 100 if peer.resolution == 32 else IMAGES_256
    batch = images if GPU else (25 if peer.resolution == 32 else 1)
    evaluations = min(peer.nfe, 4 if GPU else 1)
    network = peer.network(DEVICE, torch.bfloat16)

    def check(result: Tensor) -> None:
        # There is no second implementation to compare with; test_peers.py checks the networks' sizes and the samplers.
        assert result.shape == (batch, 3, peer.resolution, peer.resolution) and result.isfinite().all()

    row(
        f"{images} images, 3 x {peer.resolution} x {peer.resolution}",
        f"{peer.name}, bfloat16",
        lambda: peer.sample(network, batch, evaluations=evaluations),
        check=check,
        flop=peer.flop() * batch * evaluations,
        dtype=torch.bfloat16,
        images=images,
        nfe=peer.nfe,
        share=batch / images * evaluations / peer.nfe,
        paper_seconds=peer.paper_seconds,
    )


@pytest.mark.parametrize("intervals", [1, 2, 4])
def test_intervals(row: Any, intervals: int) -> None:
    """K only affects training: sampling solves to h(1) and evaluates the generator once for every K."""
    config = spigan.preset("cifar10", data={"source": "digits"}, intervals=intervals)
    assert config.model == model_of("cifar10").config
    dtype = torch.bfloat16
    time_sampler(row, "16 images, by K", f"K = {intervals}", "cifar10", 16, BACKENDS_HERE[-1], dtype)


@pytest.mark.parametrize("n", [100, 1000, 10_000])
def test_number_of_images(row: Any, n: int) -> None:
    """Time grows with n; memory only grows with the result. On a CPU, the bundled digits keep the time to seconds."""
    model = model_of("cifar10") if GPU else load_model()
    sampler = Sampler(model, batch_size=100, dtype=torch.bfloat16, output="uint8")
    first = sampler(range(n - 100, n))

    def check(images: Tensor) -> None:
        assert len(images) == n
        torch.testing.assert_close(images[-100:].int(), first.int(), atol=0, rtol=0)

    row(
        f"{'cifar10' if GPU else 'digits'}, by number",
        f"{n} images",
        lambda: sampler(range(n)),
        check=check,
        images=n,
        memory=True,
    )


@cache
@torch.inference_mode()
def stages_of(dtype: torch.dtype) -> tuple[dict[str, Callable[[], Any]], dict[str, Tensor]]:
    """Return a function for each stage of making 100 images, and the result of each."""
    model = model_of("cifar10")
    seeds = torch.arange(100, device=DEVICE)
    z = philox_normal((100, *model.config.z_shape), seed=seeds)
    h = model.mapping(z)

    def synthesize(h: Tensor = h) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model.generator(h, "const")

    images = synthesize()
    whole = to_uint8(images)
    sampler = Sampler(model, batch_size=100, dtype=dtype, output="uint8")
    functions = {
        "noise": lambda: philox_normal(z.shape, seed=seeds),
        "mapping": lambda: model.mapping(z),
        "synthesis": synthesize,
        "convert": lambda: to_uint8(images),
        "the four in one call": lambda: to_uint8(synthesize(model.mapping(philox_normal(z.shape, seed=seeds)))),
        "sampler": lambda: sampler(range(100)),
        "spigan.sample": lambda: spigan.sample(100, model=model, dtype=dtype),
    }

    results = {"noise": z, "mapping": h, "synthesis": images, "convert": whole, "sampler": whole}
    return functions, results | {"the four in one call": whole, "spigan.sample": whole / 255.0}


STAGES = ("noise", "mapping", "synthesis", "convert", "the four in one call", "sampler", "spigan.sample")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@torch.inference_mode()
def test_where_the_time_goes(row: Any, stage: str, dtype: torch.dtype) -> None:
    """Time each stage; the time that `sampler` and `spigan.sample` need beyond the four stages is overhead."""
    functions, results = stages_of(dtype)
    row(
        f"where the time goes, 100 images, {str(dtype)[6:]}",
        stage,
        functions[stage],
        expected=results[stage],
        tolerance={"the four in one call": 1.0, "sampler": 1.0, "spigan.sample": 0.6 / 255}.get(stage, 1e-5),
    )
