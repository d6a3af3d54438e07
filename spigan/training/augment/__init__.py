"""Differentiable augmentation of the images that the discriminator sees, for real and generated images alike.

Images are float [N, C, H, W] in about [-1, 1], with C = 1 or 3 and H = W >= 8. All augmentations are linear or affine
in the image, so their second derivatives exist on every device; R1 differentiates through them twice. Half-precision
images are augmented in float32, also under autocast, and returned in their original dtype.

Random numbers are float32, from torch's global generator for the device of the images. How many are drawn depends only
on the number of images, not on `p` or `policy`. If several processes share a minibatch, `rows` states which of its
images are given, and random numbers are drawn for the whole minibatch.
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
        target: mean sign of D(real) that ADA aims for.
        kimg: thousands of images over which ADA's p can rise from 0 to 1.

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
