"""The formulas: against scipy, torchmetrics and prdc on random features, closed forms, and what degenerates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from prdc import compute_prdc
from sklearn.metrics.pairwise import euclidean_distances, polynomial_kernel
from torch import Tensor
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from spigan.evaluation import metrics
from spigan.evaluation.metrics import (
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    neighbour_distances,
    neighbour_metrics,
)


def features(n: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """[n, dim] correlated float32 features, not negative, as after a ReLU."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / math.sqrt(dim)
    return torch.from_numpy(np.maximum(rng.normal(size=(n, dim)) @ mixing * scale + shift + 0.5, 0)).float()


def compare(reference: Tensor, samples: Tensor) -> metrics.Neighbours:
    centre = reference.double().mean(0)
    return neighbour_metrics(reference, samples, neighbour_distances(reference, centre), centre)


# ---- Frechet distance ----


def test_mean_and_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_ROWS", 100)  # several chunks, the last one short
    x = features(350, 20, 0) + 1000.0  # float32 sums of squares would lose the variance
    mean, covariance = mean_and_covariance(x)
    exact = x.double().numpy()
    np.testing.assert_allclose(mean.numpy(), exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance.numpy(), np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("n", "dim"), [(500, 16), (300, 200)])
def test_frechet_distance_equals_scipys_matrix_square_root(n: int, dim: int) -> None:
    a, b = mean_and_covariance(features(n, dim, 0)), mean_and_covariance(features(n, dim, 1, 0.1, 1.2))
    root = scipy.linalg.sqrtm((a[1] @ b[1]).numpy())
    expected = (a[0] - b[0]).square().sum() + a[1].trace() + b[1].trace() - 2 * np.trace(root).real
    assert frechet_distance(*a, *b) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(*b, *a) == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(*a, *a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_two_gaussians() -> None:
    """Of covariances that commute: |m1 - m2|^2 + sum (s1 - s2)^2; and the estimate approaches it."""
    s1, s2 = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.5, 1.0, 0.5]).double()
    m1, m2 = torch.zeros(3).double(), torch.tensor([1.0, -1.0, 0.0]).double()
    exact = 2.0 + 0.25 + 1.0
    turn = torch.from_numpy(scipy.linalg.expm(np.array([[0, 1, 2], [-1, 0, 3], [-2, -3, 0.0]])))
    assert frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2)) == pytest.approx(exact, rel=1e-12)
    c1, c2 = (turn @ torch.diag(s**2) @ turn.T for s in (s1, s2))
    assert frechet_distance(turn @ m1, c1, turn @ m2, c2) == pytest.approx(exact, rel=1e-12)
    x, y = torch.randn(2, 40_000, 3, dtype=torch.float64)
    estimate = frechet_distance(*mean_and_covariance(x * s1 + m1), *mean_and_covariance(y * s2 + m2))
    assert estimate == pytest.approx(exact, rel=0.03)


def test_frechet_distance_of_singular_covariances() -> None:
    """Fewer images than features: the distance is that within the rows' span, where scipy's square root is complex."""
    x, y = features(20, 64, 0).double(), features(20, 64, 1).double()
    basis = torch.linalg.qr(torch.cat([x, y]).T).Q  # [64, 40]: distances are the same in these coordinates
    small = frechet_distance(*mean_and_covariance(x @ basis), *mean_and_covariance(y @ basis))
    assert frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y)) == pytest.approx(small, rel=1e-7)
    same = torch.ones(10, 64)
    assert frechet_distance(*mean_and_covariance(same), *mean_and_covariance(same + 1)) == pytest.approx(64.0)


def test_too_few_or_unsuitable_features() -> None:
    with pytest.raises(ValueError, match="at least 2 images are needed, got 1"):
        mean_and_covariance(torch.ones(1, 3))
    with pytest.raises(ValueError, match="must be finite"):
        mean_and_covariance(torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ValueError, match=r"must be floating-point \[N, D\], got torch.int64"):
        mean_and_covariance(torch.ones(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 6 images are needed, got 5"):
        neighbour_distances(torch.randn(5, 3), torch.zeros(3))


# ---- KID ----


def test_one_subset_of_all_rows_equals_torchmetrics() -> None:
    x, y = features(200, 32, 0), features(200, 32, 1, 0.2)
    expected = poly_mmd(x.double(), y.double(), degree=3, coef=1.0).item()
    value, spread = kernel_distance(x, y, subsets=3, subset_size=1000)
    assert value == pytest.approx(expected, rel=1e-10)
    assert spread == pytest.approx(0.0, abs=1e-12)  # every subset is all rows


def test_subsets_of_the_kernel_distance() -> None:
    x, y = features(3000, 16, 0), features(2500, 16, 1, 0.3)
    kxx, kyy, kxy = (
        polynomial_kernel(a.double().numpy(), b.double().numpy(), degree=3, coef0=1)
        for a, b in ((x, x), (y, y), (x, y))
    )
    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kxx, kyy))
    value, spread = kernel_distance(x, y, subsets=50, subset_size=500)
    assert abs(value - (within - 2 * kxy.mean())) < 4 * spread / math.sqrt(50)
    assert kernel_distance(x, y, subsets=2) == kernel_distance(x, y, subsets=2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert kernel_distance(x, y, subsets=2, seed=1) != kernel_distance(x, y, subsets=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_kernel_distance_of_one_distribution_is_about_0() -> None:
    value, spread = kernel_distance(features(4000, 16, 0), features(4000, 16, 1), subsets=50)
    assert abs(value) < 4 * spread / math.sqrt(50)


# ---- Inception Score ----


def test_inception_score_equals_torchmetrics() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(700, 12)) * 3)
    theirs = InceptionScore(feature=torch.nn.Identity(), splits=1)
    theirs.features = [logits]
    assert inception_score(logits.softmax(1), 1).mean == pytest.approx(theirs.compute()[0].item(), rel=1e-10)


def test_inception_score_in_closed_form() -> None:
    """Certain and even over n classes: n. The same for all images: 1. Zeros are no NaN."""
    assert inception_score(torch.eye(8).repeat(10, 1), 10) == pytest.approx((8.0, 0.0))
    assert inception_score(torch.full((50, 4), 0.25)) == pytest.approx((1.0, 0.0))
    parts = torch.cat([torch.eye(4), torch.eye(4)[[0, 0, 1, 1]]])
    assert inception_score(parts, 2) == pytest.approx((3.0, 1.0))
    with pytest.raises(ValueError, match="class probabilities: at least 10 images are needed, got 9"):
        inception_score(torch.eye(9))


# ---- Neighbours ----


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 170)])
def test_neighbour_metrics_equal_prdc(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 64 * n)  # several blocks, the last one short
    x, y = features(n, 24, 0), features(m, 24, 1, 0.1, 1.1)
    ours = compare(x, y)
    k3, k5 = (compute_prdc(x.double().numpy(), y.double().numpy(), nearest_k=k) for k in (3, 5))
    assert ours == pytest.approx((k3["precision"], k3["recall"], k5["density"], k5["coverage"]), abs=1e-12)
    assert 0.2 < ours.precision < 1 and 0.2 < ours.recall < 1


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_neighbour_distances_are_accurate(shift: float) -> None:
    """Far from the origin float32 would cancel; around the mean it does not."""
    x = features(300, 64, 0) + shift
    distances = np.sort(euclidean_distances(x.double().numpy(), squared=True), axis=1)[:, 1:6]
    ours = neighbour_distances(x, x.double().mean(0))
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), distances, rtol=1e-4)


def test_a_set_against_itself() -> None:
    x = features(500, 8, 0)
    assert compare(x, x) == pytest.approx((1.0, 1.0, 1.0, 1.0), abs=0.01)


def test_what_each_of_the_four_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    x[::2] += 20.0  # two modes
    both = torch.randn(600, 4, generator=generator)
    both[::2] += 20.0
    one = torch.randn(600, 4, generator=generator)
    far = one + 100.0
    all_of_it = compare(x, both)
    assert min(all_of_it) > 0.85
    dropped = compare(x, one)
    assert dropped.precision > 0.85 and dropped.density > 0.85
    assert dropped.recall == pytest.approx(0.5, abs=0.05) and dropped.coverage == pytest.approx(0.5, abs=0.05)
    assert compare(x, far) == (0.0, 0.0, 0.0, 0.0)


def test_equal_images_everywhere() -> None:
    """A collapsed generator, and a reference with copies: radii of 0 are no error."""
    x = features(100, 8, 0)
    collapsed = compare(x, x[:1].repeat(100, 1) + 0.5)
    assert collapsed.recall == 0.0 and collapsed.coverage < 0.1
    same = torch.ones(20, 8)
    assert neighbour_distances(same, same[0]).eq(0).all()
    assert compare(same, same)[:2] == (1.0, 1.0)
