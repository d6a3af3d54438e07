"""Generator: shapes, noise, latents of each layer, derivatives, precision. Its values: tests/test_interop.py."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan import DataConfig, TrainConfig, preset
from spigan.models import SPIGAN, Discriminator, Generator
from spigan.presets import preset_fields, preset_names

DIM = 12


def make(resolution: int = 16, img_channels: int = 3, **changes: Any) -> Generator:
    """A tiny generator whose every parameter matters (noise strengths begin as zeros)."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"dim_h": DIM, "channel_base": 128, "channel_max": 6}
    generator = Generator(resolution, img_channels, **settings | changes)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
            elif name.endswith("bias") and "affine" not in name:
                parameter.normal_(std=0.2)
    return generator.eval()


def latents(n: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize(("resolution", "num_ws"), [(8, 4), (16, 6), (32, 8), (64, 10)])
@pytest.mark.parametrize("img_channels", [1, 3])
def test_shape_at_every_resolution(resolution: int, num_ws: int, img_channels: int) -> None:
    generator = make(resolution, img_channels)
    assert generator.num_ws == num_ws
    image = generator(latents())
    assert image.shape == (2, img_channels, resolution, resolution)
    assert image.dtype == torch.float32
    assert image.isfinite().all()
    assert not torch.allclose(image[0], image[1])


def test_1024_pixels() -> None:
    generator = Generator(1024, 3, dim_h=4, channel_base=1, channel_max=2)
    assert generator.num_ws == 18
    with torch.no_grad():
        assert generator(torch.randn(1, 4)).shape == (1, 3, 1024, 1024)


@pytest.mark.parametrize("resolution", [4, 24, 2048])
def test_resolution_refused(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 to 1024, got {resolution}"):
        Generator(resolution)


def test_noise_modes() -> None:
    generator, h = make(), latents()
    const, none = generator(h, "const"), generator(h, "none")
    assert torch.equal(const, generator(h, "const"))
    assert torch.equal(none, generator(h, "none"))
    random = [generator(h, "random") for _ in range(2)]
    for a, b in ((const, none), (const, random[0]), (none, random[0]), (random[0], random[1])):
        assert (a - b).abs().max() > 1e-2
    # The stored noise is the same for every image, drawn noise is not.
    same = h[:1].expand(2, -1)
    first, second = generator(same, "const")
    assert (first - second).abs().max() < 1e-5
    first, second = generator(same, "random")
    assert (first - second).abs().max() > 1e-2


def test_default_noise_follows_the_mode() -> None:
    generator, h = make(), latents()
    assert torch.equal(generator.eval()(h), generator(h, "const"))
    torch.manual_seed(1)
    drawn = generator.train()(h)
    torch.manual_seed(1)
    assert torch.equal(drawn, generator(h, "random"))


@pytest.mark.parametrize("grad", [False, True])
def test_given_noise(grad: bool) -> None:
    """`draw_noise` is what "random" draws; any rows of it make any images of a batch."""
    generator, h = make(), latents()
    with torch.set_grad_enabled(grad):
        torch.manual_seed(1)
        random = generator(h, "random")
        torch.manual_seed(1)
        noise = generator.draw_noise(len(h), h.device)
        state = torch.get_rng_state()
        torch.testing.assert_close(generator(h, noise), random, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(generator(h[1:2], [x[1:2] for x in noise]), random[1:2], rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), state)
        assert (generator(h, [x.flip(0) for x in noise]) - random).abs().max() > 1e-2


def test_given_noise_of_wrong_shape() -> None:
    generator, h = make(), latents()
    noise = generator.draw_noise(len(h))
    for wrong in (noise[:-1], [x[:, 0] for x in noise], generator.draw_noise(len(h) + 1), noise[::-1]):
        with pytest.raises(ValueError, match=r"noise must be \[N or 1, 1, H, W\] for layers of the sizes"):
            generator(h, wrong)


def test_one_latent_for_each_layer() -> None:
    generator, h = make(), latents()
    each = h[:, None].expand(-1, generator.num_ws, -1)
    expected = generator(h)
    assert torch.equal(generator(each), expected)
    for layer in range(generator.num_ws):
        changed = each.clone()
        changed[:, layer] += 1.0
        assert (generator(changed) - expected).abs().max() > 1e-3, f"layer {layer} takes no latent"


def test_torgb_shares_the_latent_of_the_next_layer() -> None:
    """Where the first convolution of the 8x8 block ignores its latent, that latent still moves the 4x4 image."""
    generator, h = make(), latents()
    each = h[:, None].repeat(1, generator.num_ws, 1)
    changed = each.clone()
    changed[:, 1] += 1.0
    with torch.no_grad():
        generator.b8.conv0.affine.weight.zero_()
    assert (generator(changed) - generator(each)).abs().max() > 1e-3
    with torch.no_grad():
        generator.b4.torgb.affine.weight.zero_()
    assert torch.equal(generator(changed), generator(each))


@pytest.mark.parametrize("noise", ["random", "const", "none"])
def test_gradients_reach_every_parameter(noise: str) -> None:
    generator = make().train()
    h = latents().requires_grad_(True)
    image = generator(h, noise)
    (image * torch.randn(image.shape)).sum().backward()
    for name, value in (*generator.named_parameters(), ("h", h)):
        if noise == "none" and name.endswith("noise_strength"):
            assert value.grad is None, name
            continue
        assert value.grad is not None and value.grad.isfinite().all(), name
        assert value.grad.abs().max() > 0, name


@pytest.mark.slow
def test_gradients_and_second_derivatives_are_right() -> None:
    generator = make(8, 1, channel_max=2).double()
    h = latents(1, torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda h: generator(h, "const"), h)
    assert torch.autograd.gradgradcheck(lambda h: generator(h, "const"), h)


def test_path_length_penalty_trains_the_generator() -> None:
    generator = make()
    h = latents()[:, None].repeat(1, generator.num_ws, 1).requires_grad_(True)
    image = generator(h, "random")
    y = torch.randn_like(image) / image.shape[-1]
    (jacobian,) = torch.autograd.grad((image * y).sum(), h, create_graph=True)
    jacobian.square().sum(2).mean(1).sqrt().mean().backward()
    assert h.grad is not None and h.grad.isfinite().all() and h.grad.abs().max() > 0
    for name, parameter in generator.named_parameters():
        if name.endswith(".weight"):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name


def test_bfloat16_autocast_is_close_and_accumulates_in_float32() -> None:
    generator, h = make(64), latents(4)
    expected = generator(h)
    with torch.autocast("cpu", torch.bfloat16):
        image = generator(h)
    assert image.dtype == torch.float32
    difference = (image - expected).abs().max() / expected.abs().max()
    assert 1e-5 < difference < 0.05  # bfloat16 was used, and is right


def test_conv_clamp_bounds_the_layers() -> None:
    free, clamped = make(8), make(8, conv_clamp=0.05)
    h = 10 * latents()
    assert free(h).abs().max() > 0.2
    # Two ToRGB outputs add up, and the filter that enlarges the first keeps its bound.
    assert clamped(h).abs().max() <= 2 * 0.05 + 1e-6


def test_empty_batch() -> None:
    assert make()(latents()[:0]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("shape", [(DIM,), (2, DIM + 1), (2, 5, DIM), (2, 6, DIM - 1), (1, 2, 6, DIM)])
def test_latent_of_wrong_shape(shape: tuple[int, ...]) -> None:
    expected = f"h must have shape [N, {DIM}] or [N, 6, {DIM}], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        make()(torch.randn(shape))


def test_unknown_noise() -> None:
    with pytest.raises(ValueError, match="noise must be one of random, const, none, got 'fixed'"):
        make()(latents(), "fixed")


# What docs/models.md states: mapping network, generator, discriminator.
PARAMETERS = {
    "digits": (199936, 122192, 268961),
    "cifar10": (3257984, 19422227, 22033409),
    "cifar10-small": (815936, 585363, 716161),
    "celebahq256": (8912704, 22666210, 24642561),
    "church256": (8912704, 22666210, 24642561),
}


def written_out(config: TrainConfig) -> tuple[int, int, int]:
    """Number of parameters of mapping network, generator and discriminator by the formulas of their layers."""
    model = config.model
    d, c, time = model.dim_h, model.img_channels, 256
    sizes = [2**i for i in range(2, model.resolution.bit_length())]
    width = {size: min(model.channel_base // size, model.channel_max) for size in sizes}

    def layer(inputs: int, outputs: int, kernel: int = 1) -> int:
        return inputs * outputs * kernel**2 + outputs

    widths = [c, *(min(model.embed_channels * 2**i, d) if i else model.embed_channels for i in range(len(sizes) - 1))]
    mapping = sum(layer(a, b, 3) for a, b in pairwise(widths)) + layer(widths[-1] * 16, d)
    mapping += model.ode_layers * (layer(d, d) + d)

    generator = 16 * width[4]
    for size in sizes:
        inputs = [width[size]] if size == 4 else [width[size // 2], width[size]]
        for i in inputs:
            generator += layer(i, width[size], 3) + 1 + layer(d, i)  # 1: noise strength
        generator += layer(width[size], c) + layer(d, width[size])

    discriminator = 2 * layer(time, time) + layer(c, width[model.resolution])
    for size in sizes[:0:-1]:
        i, o = width[size], width[size // 2]
        discriminator += layer(i, i, 3) + layer(time, i) + layer(i, o, 3) + i * o
    discriminator += layer(width[4] + 1, width[4], 3) + layer(16 * width[4], width[4]) + layer(width[4], 1)
    return mapping, generator, discriminator


@pytest.mark.parametrize("name", preset_names())
def test_number_of_parameters(name: str) -> None:
    config = preset(name, **({} if "data" in preset_fields(name) else {"data": DataConfig(source="images")}))
    with torch.device("meta"):
        model = SPIGAN(config.model)
        discriminator = Discriminator(
            config.model.resolution,
            config.model.img_channels,
            channel_base=config.model.channel_base,
            channel_max=config.model.channel_max,
        )
    counts = tuple(
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model.mapping, model.generator, discriminator)
    )
    assert counts == written_out(config)
    assert counts == PARAMETERS[name]
