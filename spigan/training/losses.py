"""Losses of adversarial training: non-saturating logistic loss, lazy R1, path length. The paper's objective (appendix
B.5) is not available; this is StyleGAN2's, with R1 taken on the real interpolations i(t)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.training.processes import ALL_ROWS, Rows


def real_loss(logits: Tensor) -> Tensor:
    """[N] logits of real images -> -log sigmoid(D), averaged (Goodfellow et al. 2014)."""
    return F.softplus(-logits).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """[N] logits of generated images -> -log(1 - sigmoid(D)), averaged."""
    return F.softplus(logits).mean()


def generator_loss(logits: Tensor) -> Tensor:
    """[N] logits of generated images -> -log sigmoid(D), averaged: the non-saturating loss."""
    return real_loss(logits)


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of D's gradient at real images, averaged (Mescheder et al. 2018, eq. 9, without gamma / 2).

    Args:
        logits: [N], computed from `images`.
        images: [N, C, H, W] that require gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def path_lengths(images: Tensor, h: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
    """Length of J^T y for each image, J = d image / d h, y ~ N(0, 1) / sqrt(H W) (Karras et al. 2020b, section 3.2).

    Args:
        images: [N, C, H, W], computed from `h`.
        h: [N, num_ws, D], a latent for each layer.
        rows: which rows of the joint minibatch the images are.

    Returns:
        [N].
    """
    joint = images.new_empty_strided((rows.joint(len(images)), *images.shape[1:]), images.stride())
    y = rows.own(torch.randn_like(joint)) / math.sqrt(images.shape[2] * images.shape[3])
    (gradient,) = torch.autograd.grad((images * y).sum(), h, create_graph=True)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
