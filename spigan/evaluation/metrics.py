"""The formulas of the metrics, for features: [N, D] tensors with one row per image, on any device.

Rows are compared in blocks, so that memory grows with N + D^2, and never with N^2. The mean, the covariance, everything
computed from them, and the kernel of KID are float64. Distances between neighbours are float32, computed after
subtracting the reference's mean. This makes |x|^2 + |y|^2 - 2 x.y accurate enough, because distances are only compared
with each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NEIGHBOURS_MANIFOLD = 3
"""k of improved precision and recall (Kynkäänniemi et al. 2019, section 3.1)."""
NEIGHBOURS_COVERAGE = 5
"""k of density and coverage (Naeem et al. 2020, section 4.2)."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""Subsets of KID: the number used by Karras et al. 2020a, and the largest size used by Binkowski et al. 2018."""
INCEPTION_SPLITS = 10
"""Parts over which the Inception Score is averaged (Salimans et al. 2016)."""

_BLOCK = 1 << 24  # distances computed at a time, 64 MiB in float32
_ROWS = 4096  # rows copied to float64 at a time


class Estimate(NamedTuple):
    """A mean and a standard deviation, over subsets or parts."""

    mean: float
    std: float


def check_features(features: Tensor, what: str = "features", least: int = 1) -> Tensor:
    """Return `features` if they are finite numbers [N, D] with N >= least.

    Raises:
        ValueError: if they are not. The message calls them `what`.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{what} must be floating-point [N, D], got {features.dtype} {list(features.shape)}")
    if len(features) < least:
        raise ValueError(f"{what}: at least {least} images are needed, got {len(features)}")
    if not all(part.isfinite().all() for part in features.split(_ROWS)):
        raise ValueError(f"{what} must be finite, but the feature network returned infinity or NaN")
    return features


# ---- Frechet distance ----


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [D] and the unbiased covariance [D, D], in float64, of features [N, D] with N >= 2."""
    check_features(features, least=2)
    mean = torch.stack([part.double().sum(0) for part in features.split(_ROWS)]).sum(0) / len(features)
    covariance = mean.new_zeros(len(mean), len(mean))
    for part in features.split(_ROWS):
        centred = part.double() - mean
        covariance.addmm_(centred.T, centred)
    return mean, covariance / (len(features) - 1)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Return the squared Frechet distance between two Gaussians (Dowson and Landau 1982; Heusel et al. 2017, eq. 6).

    It is |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With C = L L^T, the trace of (C1 C2)^(1/2) is the sum of the
    singular values of L1^T L2. Unlike a matrix square root of C1 C2, these also exist for singular covariances.

    Args:
        mean1: [D] float64.
        covariance1: [D, D] float64.
        mean2: [D] float64.
        covariance2: [D, D] float64.
    """
    trace = covariance1.trace() + covariance2.trace()
    root = torch.linalg.svdvals(_factor(covariance1).T @ _factor(covariance2)).sum()
    distance = (mean1 - mean2).square().sum() + trace - 2.0 * root
    return max(0.0, distance.item())  # for equal Gaussians, rounding may give -1e-13


def _factor(covariance: Tensor) -> Tensor:
    """Return L with L L^T = covariance. Eigenvalues that are only rounding errors are set to 0."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0.0)
    return vectors * torch.where(values > noise, values, 0.0).sqrt()


# ---- Kernel distance ----


def kernel_distance(
    reference: Tensor, samples: Tensor, *, subsets: int = KID_SUBSETS, subset_size: int = KID_SUBSET_SIZE, seed: int = 0
) -> Estimate:
    """Return KID, the squared maximum mean discrepancy of features (Binkowski et al. 2018, section 4).

    The kernel is k(x, y) = (x.y / D + 1)^3. The estimate is unbiased, so it may be slightly below 0. The subsets are
    drawn without replacement, from a separate random generator.

    Args:
        reference: features [N, D].
        samples: features [M, D].
        subsets: number of pairs of subsets to average over.
        subset_size: number of rows per subset, limited to N and M.
        seed: seed of the subsets.

    Returns:
        Mean and standard deviation over the subsets.
    """
    n = min(subset_size, len(reference), len(samples))
    for name, features in (("reference", reference), ("samples", samples)):
        check_features(features, name, least=2)
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        x, y = (
            features[torch.randperm(len(features), generator=generator)[:n].to(features.device)].double()
            for features in (reference, samples)
        )
        values.append(_mmd2(x, y))
    distances = torch.stack(values)
    return Estimate(distances.mean().item(), distances.std(correction=0).item())


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased squared MMD of x and y, both [n, D] (Gretton et al. 2012, eq. 4)."""
    n, dim = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / dim + 1.0) ** 3

    within = sum(k.sum() - k.diagonal().sum() for k in (kernel(x, x), kernel(y, y)))
    return within / (n * (n - 1)) - 2.0 * kernel(x, y).mean()


# ---- Inception Score ----


def inception_score(probabilities: Tensor, splits: int = INCEPTION_SPLITS) -> Estimate:
    """Return the Inception Score, exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016, section 4).

    Args:
        probabilities: class probabilities [N, classes] with N >= splits. Rows sum to 1.
        splits: number of consecutive parts to score separately.

    Returns:
        Mean and standard deviation over the parts.
    """
    check_features(probabilities, "class probabilities", least=splits)
    scores = []
    for part in probabilities.tensor_split(splits):
        p = part.double()
        # The mean divergence from the mean equals the entropy of the mean minus the mean entropy. entr(0) is 0.
        scores.append((torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()).exp())
    values = torch.stack(scores)
    return Estimate(values.mean().item(), values.std(correction=0).item())


# ---- Neighbours ----


class Neighbours(NamedTuple):
    """Metrics based on neighbours. All are fractions in [0, 1], except that density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def neighbour_distances(
    features: Tensor, centre: Tensor, k: int = NEIGHBOURS_COVERAGE, *, progress: bool = False
) -> Tensor:
    """Return the squared distances from every row to its k nearest other rows, in ascending order.

    Args:
        features: [N, D] with N > k.
        centre: [D], subtracted from all rows. Use the same centre for all features that are compared.
        k: number of neighbours.
        progress: whether to show a progress bar if this takes over 2 s.

    Returns:
        float32 [N, k].
    """
    check_features(features, least=k + 1)
    nearest, start = [], 0
    for block in _squared_distances(features, features, centre, "neighbours" if progress else None):
        stop = start + len(block)
        block[:, start:stop].fill_diagonal_(torch.inf)  # a row is not its own neighbour
        nearest.append(block.topk(k, largest=False).values)
        start = stop
    return torch.cat(nearest)


def count_repeated(features: Tensor, radii: Tensor, centre: Tensor) -> int:
    """Return the number of rows that are equal to their k-th nearest other row.

    Density and coverage count what is nearer than that row, so they miss even the row itself.

    Args:
        features: [N, D].
        radii: the result of `neighbour_distances(features, centre)`, [N, k].
        centre: [D].
    """
    # Squared distances in float32 are rounded in proportion to the squared norms.
    norms = (features.float() - centre.float()).square().sum(1)
    return int((radii[:, -1] <= 1e-6 * norms).sum())


def neighbour_metrics(
    reference: Tensor, samples: Tensor, radii: Tensor, centre: Tensor, *, progress: bool = False
) -> Neighbours:
    """Return improved precision and recall, density and coverage.

    The manifold of a set is the union of balls around its rows, each of which reaches the third nearest other row.
    Precision is the fraction of samples within the reference's manifold. Recall is the fraction of reference rows
    within the samples' manifold (Kynkäänniemi et al. 2019, eq. 1 to 3). For density and coverage, the balls around
    reference rows reach the fifth nearest other row (k = 5). Density is the mean number of balls that contain a sample,
    divided by k. Coverage is the fraction of balls that contain at least one sample (Naeem et al. 2020, eq. 4 and 6).
    Values can only be compared for equal N and M, because the radii shrink as rows are added.

    Args:
        reference: [N, D] with N > 5.
        samples: [M, D] with M > 3.
        radii: the result of `neighbour_distances(reference, centre)`.
        centre: [D], roughly the mean of the reference.
        progress: whether to show progress bars if this takes over 2 s.
    """
    check_features(reference, "reference", least=NEIGHBOURS_COVERAGE + 1)
    check_features(samples, "samples", least=NEIGHBOURS_MANIFOLD + 1)
    sample_radii = neighbour_distances(samples, centre, NEIGHBOURS_MANIFOLD, progress=progress)[:, -1]
    manifold, ball = radii[:, NEIGHBOURS_MANIFOLD - 1], radii[:, NEIGHBOURS_COVERAGE - 1]
    precise = inside = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    covered, start = recalled.clone(), 0
    title = "precision, recall" if progress else None
    for block in _squared_distances(samples, reference, centre, title):  # [rows, N]
        precise += int((block <= manifold).any(1).sum())
        recalled |= (block <= sample_radii[start : start + len(block), None]).any(0)
        within = block < ball  # as in the authors' code, so that a set against itself has density 1
        inside += int(within.sum())
        covered |= within.any(0)
        start += len(block)
    return Neighbours(
        precise / len(samples),
        int(recalled.sum()) / len(reference),
        inside / (NEIGHBOURS_COVERAGE * len(samples)),
        int(covered.sum()) / len(reference),
    )


def _squared_distances(x: Tensor, y: Tensor, centre: Tensor, title: str | None) -> Iterator[Tensor]:
    """Yield the squared distances from x [N, D] to y [M, D] in blocks, float32 [rows, M], which may be overwritten.

    `title` is the title of a progress bar, or None for no bar.
    """
    from tqdm.auto import tqdm

    centre = centre.float()
    y = y.float() - centre
    y_norms = y.square().sum(1)
    with tqdm(total=len(x), desc=title, unit="img", delay=2.0, leave=False, disable=title is None) as bar:
        for part in x.split(max(1, _BLOCK // len(y))):
            rows = part.float() - centre
            block = torch.addmm(y_norms, rows, y.T, alpha=-2.0)
            yield block.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0.0)
            bar.update(len(part))
