"""Losses of adversarial training: non-saturating logistic loss, R1 penalty and path length.

The appendix with the paper's objective (B.5) is not available. These are StyleGAN2's losses, with R1 evaluated at the
real interpolations i(t).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.training.processes import ALL_ROWS, Rows


def real_loss(logits: Tensor) -> Tensor:
    """Return the mean of -log sigmoid(D) over [N] logits of real images (Goodfellow et al. 2014)."""
    return F.softplus(-logits).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """Return the mean of -log(1 - sigmoid(D)) over [N] logits of generated images."""
    return F.softplus(logits).mean()


def generator_loss(logits: Tensor) -> Tensor:
    """Return the mean of -log sigmoid(D) over [N] logits of generated images: the non-saturating loss."""
    return real_loss(logits)


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Return the mean squared norm of D's gradient at real images (Mescheder et al. 2018, eq. 9, without gamma / 2).

    Args:
        logits: [N], computed from `images`.
        images: [N, C, H, W] that require gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def path_lengths(images: Tensor, h: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Return the length of J^T y for each image, where J = d image / d h and y ~ N(0, 1) / sqrt(H W).

    Karras et al. 2020b, section 3.2.

    Args:
        images: [N, C, H, W], computed from `h`.
        h: [N, num_ws, D], a latent for each layer.
        rows: which rows of the joint minibatch the images are.

    Returns:
        [N] path lengths.
    """
    y = rows.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * y).sum(), h, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
