"""Differentiable augmentation of the images that the discriminator sees, the same for real and generated ones.

Images are float [N, C, H, W] in about [-1, 1], with C = 1 or 3 and H = W >= 8. All augmentations are linear or affine
in the image, so their second derivatives exist on every device; R1 differentiates through them twice. Half-precision
images are computed in float32, also under autocast, and returned in their own dtype.

Random numbers come from torch's global generator of the images' device, in float32. Their count depends on the number
of images alone, not on `p` or `policy`. Where several processes share a minibatch, `rows` tells which images of it
are given, and the numbers of the whole minibatch are drawn.
"""

from __future__ import annotations

from typing import Literal

from spigan.training.augment.ada import ADA
from spigan.training.augment.common import NoAugment
from spigan.training.augment.diffaug import DiffAugment

__all__ = ["ADA", "Augment", "DiffAugment", "NoAugment", "make_augment"]

Augment = NoAugment | DiffAugment | ADA


def make_augment(name: Literal["none", "diffaug", "ada"], *, target: float = 0.6, kimg: float = 500.0) -> Augment:
    """Return the augmentation called `name`.

    Args:
        name: "none", "diffaug" or "ada".
        target: mean sign of D(real) that ADA steers to.
        kimg: thousands of images in which ADA's p can go from 0 to 1.

    Raises:
        ValueError: if the name is unknown.
    """
    if name == "none":
        return NoAugment()
    if name == "diffaug":
        return DiffAugment()
    if name == "ada":
        return ADA(target=target, kimg=kimg)
    raise ValueError(f"augmentation must be 'none', 'diffaug' or 'ada', got {name!r}")
