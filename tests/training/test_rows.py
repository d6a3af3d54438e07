"""Random numbers of this process's rows of a minibatch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spigan.ops import philox_normal
from spigan.training.processes import Rows


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("draw", "expected"),
    [
        (lambda rows, n: rows.rand(n, 3), lambda n: torch.rand(n, 3)),
        (lambda rows, n: rows.randn(n, 3), lambda n: torch.randn(n, 3)),
        (lambda rows, n: rows.rand(3, n, dim=1).mT, lambda n: torch.rand(3, n).mT),
        (lambda rows, n: rows.randn_like(torch.empty(n, 3, 2, 2)), lambda n: torch.randn(n, 3, 2, 2)),
    ],
    ids=["rand", "randn", "along dimension 1", "randn_like"],
)
def test_processes_draw_their_rows_of_the_same_numbers(
    draw: Callable[[Rows, int], Tensor], expected: Callable[[int], Tensor], times: int
) -> None:
    torch.manual_seed(1)
    whole = expected(6 * times)
    after = torch.get_rng_state()
    for rank in range(3):
        torch.manual_seed(1)
        rows = Rows(3, rank, times)
        assert torch.equal(draw(rows, 2 * times), rows.own(whole))
        assert torch.equal(torch.get_rng_state(), after)  # all generators stay in step
    torch.manual_seed(1)
    assert torch.equal(draw(Rows(), 6 * times), whole)


def test_noise_of_the_rows() -> None:
    cpu = torch.device("cpu")
    whole = philox_normal((6, 1, 4, 4), seed=3, offset=5, device=cpu)
    for rank in range(3):
        own = Rows(3, rank).philox_normal((2, 1, 4, 4), seed=3, offset=5, device=cpu)
        assert torch.equal(own, whole[rank::3])
    assert torch.equal(Rows().philox_normal((6, 1, 4, 4), seed=3, offset=5, device=cpu), whole)
