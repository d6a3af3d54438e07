"""The C++ kernel of rk4_mlp on every instruction set of this CPU, through the operator."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from spigan.ops import rk4_mlp
from spigan.ops.rk4_mlp import ACTIVATIONS, mlp_vector_field

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(n, dim, layers, dtype):
    scale = dim**-0.5
    h0, weight = torch.randn(n, dim), scale * torch.randn(layers, dim, dim)
    return [x.to(dtype) for x in (h0, weight, torch.randn(layers, dim), torch.randn(layers, dim))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
# Every number of rows modulo 4, both sides of the padding to 32, groups of rows, and weights used where they are.
@pytest.mark.parametrize(
    ("n", "dim", "layers"), [(1, 1, 2), (2, 31, 2), (3, 32, 3), (7, 33, 1), (37, 65, 2), (4, 96, 2)]
)
def test_rk4_mlp(isa, n, dim, layers, activation, dtype, assert_accurate, poisoned_memory):
    inputs = problem(n, dim, layers, dtype)

    def solve(inputs, backend):
        return rk4_mlp(*inputs, [0.3, 1.0], steps=2, activation=activation, backend=backend)

    exact = solve([x.double() for x in inputs], "reference")
    assert_accurate(solve(inputs, "cpp"), solve(inputs, "reference"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_rows_and_neighbours_change_no_bit(isa, dtype, set_threads):
    h0, *parameters = problem(50, 70, 2, dtype)

    def solve(h0, threads):
        set_threads(threads)
        return rk4_mlp(h0, *parameters, [0.5, 1.0], steps=2, backend="cpp")

    expected = solve(h0, 1)
    assert torch.equal(solve(h0, 2), expected) and torch.equal(solve(h0, 5), expected)
    for part in (slice(7, 8), slice(30, 50), slice(0, 17)):
        assert torch.equal(solve(h0[part], 2), expected[:, part])
    for value in (torch.nan, torch.inf, torch.finfo(dtype).max):
        beside = h0.clone()
        beside[::3] = value
        kept = [row for row in range(50) if row % 3]
        assert torch.equal(solve(beside, 2)[:, kept], expected[:, kept])
        if value != value:
            assert solve(beside, 2)[:, ::3].isnan().all()


def activated(x, activation, dtype):
    """f(x) of x [N, M] by the kernel in `dtype` and by PyTorch in float64: h' = (0, f(x)) from h(0) = (x, 0)."""
    m = x.shape[1]
    weight = torch.zeros(2, 2 * m, 2 * m, dtype=dtype)
    weight[0, :m, :m] = weight[1, m:, :m] = torch.eye(m)
    h0 = torch.cat((x, torch.zeros_like(x)), 1).to(dtype)
    vector = torch.zeros(2, 2 * m, dtype=dtype)
    out = rk4_mlp(h0, weight, vector, vector, [1.0], steps=1, activation=activation, backend="cpp")[0]
    expected = mlp_vector_field(h0.double(), 0.0, *(p.double() for p in (weight, vector, vector)), activation)
    return out[:, m:].double(), expected[:, m:]


EXACT = {
    "silu": lambda x: x * torch.sigmoid(x),
    "lrelu": lambda x: torch.where(x > 0, x, 0.2 * x),
    "tanh": torch.tanh,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),  # F.softplus gives up accuracy beyond 20
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_all_magnitudes(isa, activation):
    grid = torch.cat(
        [
            torch.linspace(-30, 30, 20_000, dtype=torch.float64),
            torch.linspace(-100, 100, 5_000, dtype=torch.float64),
            torch.logspace(-37, 4, 10_000, dtype=torch.float64),
            -torch.logspace(-37, 4, 10_000, dtype=torch.float64),
            torch.tensor(
                [0.0, -0.0, 1e4, -1e4, 0.625, -0.625, 88.0, -87.0, 88.8, -88.8, 1e-38, -1e-38], dtype=torch.double
            ),
        ]
    ).float()
    grid = F.pad(grid, (0, -len(grid) % 40)).view(-1, 40)
    actual, by_torch = activated(grid, activation, torch.float32)
    exact = EXACT[activation](grid.double())
    torch.testing.assert_close(by_torch, exact, rtol=1e-7, atol=1e-8)
    # The function to 2 ulp, and the weighted sum of four equal slopes; below the smallest normal number anything goes,
    # and e^x is taken for no x below -87, where silu may be wrong by |x| e^-87.
    torch.testing.assert_close(actual, exact, rtol=8e-7, atol=2e-34)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activations_of_half_types(isa, activation, dtype):
    grid = torch.cat((torch.linspace(-30, 30, 2_000), torch.logspace(-5, 4, 500), -torch.logspace(-5, 4, 500)))
    grid = F.pad(grid, (0, -len(grid) % 40)).view(-1, 40).to(dtype).float()
    actual, _ = activated(grid, activation, dtype)
    # Rounded as the next layer's input and as the result.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(actual, EXACT[activation](grid.double()), rtol=1.01 * eps, atol=tiny * eps + 2e-34)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_in_its_row(isa, activation, dtype):
    rows = torch.randn(9, 24)
    special = [torch.nan, torch.inf, -torch.inf]
    poisoned = rows.clone()
    for row, value in enumerate(special):
        poisoned[3 * row + 1, row] = value
    clean, _ = activated(rows, activation, dtype)
    actual, _ = activated(poisoned, activation, dtype)
    kept = [0, 2, 3, 5, 6, 8]
    assert torch.equal(actual[kept], clean[kept]) and clean.isfinite().all()
    # Infinity times the zeros of the weights is NaN.
    assert actual[[1, 4, 7]].isnan().all()
