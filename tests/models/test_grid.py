"""The grid of samples."""

from __future__ import annotations

import pytest
import torch

from spigan import SPIGAN, ModelConfig, Sampler
from spigan.images import display_scale, make_grid
from spigan.models.grid import default_batch_size, sample_grid


def make(resolution: int) -> SPIGAN:
    torch.manual_seed(0)
    config = ModelConfig(resolution=resolution, dim_h=8, embed_channels=4, channel_base=128, channel_max=4)
    model = SPIGAN(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.5)
    return model


@pytest.mark.parametrize(("resolution", "side"), [(8, 8), (64, 8), (128, 4)])
def test_a_grid_shows_the_images_of_the_first_seeds(resolution: int, side: int) -> None:
    model = make(resolution)
    images = Sampler(model, output="uint8")(range(side**2))
    expected = make_grid(images, columns=side, scale=display_scale(resolution))
    assert torch.equal(sample_grid(model), expected)


@pytest.mark.parametrize("change", ["batch size", "training mode", "autocast"])
def test_a_grid_depends_on_the_weights_alone(change: str) -> None:
    model = make(8)
    expected = sample_grid(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        grid = sample_grid(model.train(change == "training mode"), batch_size=7 if change == "batch size" else None)
    assert grid.dtype == torch.uint8 and not grid.requires_grad
    # Another batch size may round differently.
    assert (grid.int() - expected.int()).abs().max() <= (1 if change == "batch size" else 0)


@pytest.mark.parametrize(("resolution", "size"), [(8, 128), (128, 128), (256, 64), (512, 16), (1024, 4)])
def test_default_batch_size(resolution: int, size: int) -> None:
    assert default_batch_size(resolution) == size
