"""Discriminator: time, minibatch standard deviation against NumPy, first and second derivatives."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spigan.models import Discriminator
from spigan.models.discriminator import minibatch_std, sinusoidal_embedding


def make(resolution: int = 16, img_channels: int = 3, **changes: Any) -> Discriminator:
    """A tiny discriminator whose every parameter matters."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"channel_base": 128, "channel_max": 6, "time_dim": 8}
    discriminator = Discriminator(resolution, img_channels, **settings | changes)
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return discriminator


def images(n: int = 4, resolution: int = 16, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, channels, resolution, resolution, generator=generator, dtype=dtype)


@pytest.mark.parametrize("resolution", [8, 16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_logit_for_each_image(resolution: int, channels: int) -> None:
    logits = make(resolution, channels)(images(3, resolution, channels), 0.5)
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all() and logits.std() > 0


def test_time_changes_the_logit() -> None:
    discriminator, img = make(), images()
    logits = [discriminator(img, t) for t in (0.0, 0.5, 0.51, 1.0)]
    for a, b in pairwise(logits):
        assert ((a - b).abs() > 1e-4).all()
    assert torch.equal(discriminator(img), logits[-1])  # clean images by default


def test_time_as_number_scalar_tensor_or_one_for_each_image() -> None:
    discriminator, img = make(mbstd_group=1), images()
    expected = discriminator(img, 0.25)
    for t in (torch.tensor(0.25), torch.full((4,), 0.25), torch.full((4,), 0.25, dtype=torch.float64)):
        assert torch.equal(discriminator(img, t), expected)
    times = torch.tensor([0.1, 0.25, 0.7, 1.0])
    mixed = discriminator(img, times)
    for i, t in enumerate(times.tolist()):
        torch.testing.assert_close(mixed[i], discriminator(img, t)[i])


@pytest.mark.parametrize("block", [0, 1])
def test_time_enters_every_block(block: int) -> None:
    discriminator, img = make(), images()
    with torch.no_grad():
        for i, other in enumerate(discriminator.blocks):
            if i != block:
                other.time.weight.zero_()
    assert (discriminator(img, 0.2) - discriminator(img, 0.9)).abs().max() > 1e-5


def test_without_time_conditioning() -> None:
    discriminator, img = make(time_conditioning=False), images()
    assert not [name for name, _ in discriminator.named_parameters() if "time" in name]
    assert [name for name, _ in make().named_parameters() if "time" in name]
    assert torch.equal(discriminator(img, 0.1), discriminator(img, 1.0))


def test_sinusoidal_embedding() -> None:
    t = np.array([0.0, 0.3, 1.0])
    angles = 1000 * t[:, None] * 10000.0 ** (-np.arange(4) / 4)
    embedded = sinusoidal_embedding(torch.from_numpy(t), 8)
    assert embedded.dtype == torch.float32
    np.testing.assert_allclose(embedded, np.concatenate([np.cos(angles), np.sin(angles)], axis=1), atol=2e-4)


@pytest.mark.parametrize(
    ("n", "group_size", "group"), [(8, 4, 4), (6, 4, 3), (9, 4, 3), (5, 4, 1), (2, 4, 2), (1, 4, 1), (32, 32, 32)]
)
def test_minibatch_std_against_numpy(n: int, group_size: int, group: int) -> None:
    x = images(n, 8).numpy()
    # As in StyleGAN2: a group holds images i, i + M, i + 2M, ... of the M groups.
    count = n // group
    expected = np.empty((n, 1, 8, 8))
    for j in range(count):
        members = [j + k * count for k in range(group)]
        std = np.sqrt(x[members].astype(np.float64).var(axis=0) + 1e-8).mean()
        expected[members] = std
    y = minibatch_std(torch.from_numpy(x), group_size)
    assert torch.equal(y[:, :3], torch.from_numpy(x))
    np.testing.assert_allclose(y[:, 3:], expected, rtol=1e-5)
    if group > 1:
        assert y[:, 3].min() > 0.1


def test_minibatch_std_of_half_precision_is_computed_in_float32() -> None:
    # In float16 itself the variance 2.4e-8 would round to 0 or 6e-8, and the 1e-8 that is added to it to 0.
    x = torch.zeros(2, 1, 4, 4, dtype=torch.float16)
    x[1] = 2.0**-11.7
    expected = math.sqrt((x[1, 0, 0, 0].item() / 2) ** 2 + 1e-8)
    assert minibatch_std(x, 2)[:, 1].unique().item() == pytest.approx(expected, rel=1e-3)


def test_images_of_a_group_see_each_other() -> None:
    img = images(2)
    alone, together = make(mbstd_group=1), make(mbstd_group=2)
    changed = torch.stack([img[0], -img[1]])
    assert torch.equal(alone(img)[0], alone(changed)[0])
    assert not torch.equal(together(img)[0], together(changed)[0])


@pytest.mark.parametrize("n", [1, 5])
def test_any_number_of_images(n: int) -> None:
    assert make()(images(n)).shape == (n,)


def test_gradients_reach_every_parameter() -> None:
    discriminator, img = make(), images().requires_grad_(True)
    discriminator(img, torch.tensor([0.1, 0.4, 0.7, 1.0])).square().sum().backward()
    for name, value in (*discriminator.named_parameters(), ("img", img)):
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


@pytest.mark.slow
def test_gradients_and_second_derivatives_are_right() -> None:
    discriminator = make(8, 1, channel_max=2).double()
    img = images(2, 8, 1, torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: discriminator(x, 0.3), img)
    assert torch.autograd.gradgradcheck(lambda x: discriminator(x, 0.3), img)


def r1_gradients(discriminator: Discriminator, autocast: bool) -> Tensor:
    """Gradient of the R1 penalty in all weights, as one vector."""
    discriminator.zero_grad()
    img = images(8).requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = discriminator(img, 0.5)
    (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    assert gradient.dtype == torch.float32
    gradient.square().sum((1, 2, 3)).mean().backward()
    weights = {name: p for name, p in discriminator.named_parameters() if name.endswith("weight")}
    for name, p in weights.items():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
    return torch.cat([p.grad.flatten() for p in weights.values() if p.grad is not None])


def test_r1_in_float32_and_bfloat16() -> None:
    discriminator = make()
    exact, rounded = r1_gradients(discriminator, False), r1_gradients(discriminator, True)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.1


def test_bfloat16_autocast_is_close() -> None:
    discriminator, img = make(64), images(8, 64)
    expected = discriminator(img, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(img, 0.5)
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - expected).abs().max() / expected.abs().max() < 0.05


def test_layers_keep_unit_variance_at_the_start() -> None:
    """Equalised learning rate and the residual blocks' factor sqrt(1/2): no layer shrinks or blows up the signal."""
    torch.manual_seed(0)
    discriminator = Discriminator(32, 3, channel_base=512, channel_max=32)
    sizes: list[float] = []
    for block in discriminator.blocks:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(output.std().item()))
    logits = discriminator(images(16, 32), 0.5)
    assert len(sizes) == 3
    assert all(0.3 < size < 2.0 for size in sizes), sizes
    assert math.isfinite(logits.std().item()) and 0.05 < logits.std() < 5.0


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 8, 8), (2, 3, 16, 8)])
def test_image_of_wrong_shape(shape: tuple[int, ...]) -> None:
    expected = f"img must have shape [N, 3, 16, 16], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()(torch.randn(shape))


@pytest.mark.parametrize("shape", [(3,), (1,), (4, 1)])
def test_times_of_wrong_shape(shape: tuple[int, ...]) -> None:
    expected = f"t must be a time or one for each of 4 images, got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()(images(), torch.ones(shape))


def test_resolution_refused() -> None:
    with pytest.raises(ValueError, match="power of two from 8 to 1024, got 20"):
        Discriminator(20)
