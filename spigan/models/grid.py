"""The grid of samples shown by training, model cards and the demo."""

from __future__ import annotations

import torch
from torch import Tensor

from spigan.images import display_scale, grid_side, make_grid, to_uint8
from spigan.models.pretrained import PretrainedModel
from spigan.ops import philox_normal


def default_batch_size(resolution: int) -> int:
    """Return a batch size that needs a moderate amount of memory: 128 up to 128 pixels, 64 at 256, 4 at 1024."""
    return max(1, min(128, 2**22 // resolution**2))


def sample_grid(model: PretrainedModel, *, batch_size: int | None = None) -> Tensor:
    """Draw the images for seeds 0, 1, ... as one grid: 8 x 8 images up to 64 pixels, else 4 x 4. Enlarge small images.

    Args:
        model: a `spigan.SPIGAN`.
        batch_size: number of images to evaluate at once. Default: `default_batch_size`.

    Returns:
        uint8 [C, H', W'] on the CPU.
    """
    resolution = model.config.resolution
    device, side = next(model.parameters()).device, grid_side(resolution)
    seeds = torch.arange(side * side, device=device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        z = philox_normal((len(seeds), *model.config.z_shape), seed=seeds)
        batches = z.split(batch_size or default_batch_size(resolution))
        images = torch.cat([to_uint8(model(part, noise="const")) for part in batches])
    return make_grid(images, columns=side, scale=display_scale(resolution)).cpu()
