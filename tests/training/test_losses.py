"""The losses against direct formulas, analytic penalties and explicit Jacobians, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian

from spigan.training.losses import fake_loss, generator_loss, path_lengths, r1_penalty, real_loss


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


# ---- Non-saturating logistic loss ----


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (real_loss, lambda x: -np.log(sigmoid(x))),
        (fake_loss, lambda x: -np.log(1.0 - sigmoid(x))),
        (generator_loss, lambda x: -np.log(sigmoid(x))),
    ],
)
def test_values_and_gradients(loss, formula):
    logits = (3 * randn(7)).requires_grad_()
    assert loss(logits).item() == pytest.approx(formula(logits.detach().numpy()).mean(), rel=1e-12)
    assert gradcheck(loss, logits) and gradgradcheck(loss, logits)


def test_generator_loss_does_not_saturate():
    """Where D is sure that an image is generated, the gradient is -1 / N, not 0; no logit overflows."""
    logits = torch.tensor([-800.0, 800.0], dtype=torch.float64, requires_grad=True)
    loss = generator_loss(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(400.0)
    assert gradient.tolist() == [-0.5, 0.0]


# ---- R1 ----


def test_r1_of_a_linear_discriminator():
    """D(x) = <w, x>: the penalty is |w|^2 and its gradient 2 w, whatever the images and however many."""
    w = randn(3, 4, 5).requires_grad_()
    for n in (1, 6):
        images = randn(n, 3, 4, 5).requires_grad_()
        penalty = r1_penalty((images * w).sum((1, 2, 3)), images)
        (gradient,) = torch.autograd.grad(penalty, w)
        torch.testing.assert_close(penalty, w.square().sum())
        torch.testing.assert_close(gradient, 2 * w.detach())


def test_r1_of_a_quadratic_discriminator():
    """D(x) = x^T A x / 2 with A symmetric: the penalty is the mean of |A x|^2, a function of A and of the images."""
    a = randn(8, 8)
    a = (a + a.T).requires_grad_()
    images = randn(5, 2, 2, 2).requires_grad_()
    x = images.flatten(1)
    penalty = r1_penalty(torch.einsum("ni,ij,nj->n", x, a, x) / 2, images)
    expected = (x @ a).square().sum(1).mean()
    torch.testing.assert_close(penalty, expected)
    # Off the symmetric matrices the two are different functions of A; their symmetric gradients are equal.
    (gradient,) = torch.autograd.grad(penalty, a)
    (direct,) = torch.autograd.grad(expected, a)
    torch.testing.assert_close(gradient + gradient.T, direct + direct.T)


def test_r1_can_be_differentiated_in_the_weights():
    weight, images = randn(4, 12).requires_grad_(), randn(3, 1, 3, 4)

    def penalty(weight: Tensor, images: Tensor) -> Tensor:
        images = images.requires_grad_()
        return r1_penalty((images.flatten(1) @ weight.T).tanh().square().sum(1), images)

    assert gradcheck(penalty, (weight, images.requires_grad_()))
    assert gradgradcheck(penalty, (weight, images.requires_grad_()))


# ---- Path length ----


def small_generator(h: Tensor, weight: Tensor) -> Tensor:
    """[N, 2, 3] latents of two layers -> [N, 2, 3, 5] images; not linear, the layers matter differently."""
    x = torch.tanh(h[:, 0] @ weight[:3]) + (h[:, 1] @ weight[3:]).square()
    return x.unflatten(1, (2, 3, 5))


def test_path_lengths_against_the_jacobian():
    h, weight = randn(4, 2, 3).requires_grad_(), randn(6, 30).requires_grad_()
    torch.manual_seed(1)
    lengths = path_lengths(small_generator(h, weight), h)
    torch.manual_seed(1)
    y = torch.randn(4, 2, 3, 5, dtype=torch.float64) / math.sqrt(3 * 5)
    expected = []
    for n in range(4):
        j = jacobian(lambda one: small_generator(one[None], weight)[0], h[n].detach())  # [2, 3, 5, layers, D]
        expected.append(torch.einsum("chw,chwld->ld", y[n], j).square().sum(1).mean().sqrt())
    assert lengths.shape == (4,)
    torch.testing.assert_close(lengths, torch.stack(expected))


def test_path_lengths_can_be_differentiated():
    h, weight = randn(2, 2, 3).requires_grad_(), randn(6, 30).requires_grad_()

    def lengths(h: Tensor, weight: Tensor) -> Tensor:
        torch.manual_seed(1)
        return path_lengths(small_generator(h, weight), h)

    assert gradcheck(lengths, (h, weight))
    assert gradgradcheck(lengths, (h, weight))


def test_path_lengths_estimate_the_norm_of_the_jacobian():
    """For a linear generator E[length^2] = |J|_F^2 / (H W): random directions measure every pixel alike."""
    weight = randn(3, 2 * 3 * 5)
    h = randn(1, 1, 3).expand(4000, -1, -1).requires_grad_()
    lengths = path_lengths((h[:, 0] @ weight).unflatten(1, (2, 3, 5)), h)
    assert lengths.square().mean().item() == pytest.approx(weight.square().sum().item() / (3 * 5), rel=0.05)
