"""What all tests share: a fixed seed, memory that shows what was left unwritten, and the rule for rounding errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# The first example of a test may compile or load something; a deadline would fail it on a busy machine.
settings.register_profile("spigan", deadline=None)
settings.load_profile("spigan")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN instead of whatever was there, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    assert actual.dtype == plain.dtype
    assert actual.shape == plain.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return

    def error(value: Tensor) -> float:
        return (value.detach().double() - exact).abs().max().item()

    assert exact.isfinite().all() and plain.isfinite().all(), "the references themselves overflow"
    floor = slack * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    # Written so that a NaN fails.
    assert error(actual) <= 2.0 * error(plain) + floor, (
        f"{error(actual):.3e} against {error(plain):.3e} in plain PyTorch"
    )


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """assert_accurate(actual, plain, exact): error(actual) <= 2 error(plain) + 2 eps max|exact|.

    `plain` is plain PyTorch in the dtype of `actual`, `exact` the same in float64.
    """
    return _assert_accurate
