"""The order of batches: random, endless, and exactly resumed."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from data_helpers import everything, open_source
from hypothesis import given, settings
from hypothesis import strategies as st

from spigan.data import loader
from spigan.data.batches import InfiniteShuffle


def images_of(count: int, total: int, batch_size: int, *, seed: int, start: int = 0) -> list[int]:
    """The first `total` indices after `start`."""
    batches = iter(InfiniteShuffle(count, batch_size, seed=seed, start=start))
    taken = list(itertools.islice(batches, -(-total // batch_size)))
    assert all(len(batch) == batch_size for batch in taken)
    return list(itertools.chain(*taken))[:total]


@settings(deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 2**70))
def test_each_epoch_is_a_permutation(count: int, batch_size: int, seed: int) -> None:
    indices = images_of(count, 3 * count, batch_size, seed=seed)
    for epoch in range(3):
        assert sorted(indices[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(count=st.integers(1, 40), sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)), start=st.integers(0, 10**12))
def test_resuming_anywhere_gives_the_rest(count: int, sizes: tuple[int, int], start: int) -> None:
    past = start % (3 * count)
    base = start - past
    whole = images_of(count, past + 50, sizes[0], seed=1, start=base)
    assert images_of(count, 50, sizes[1], seed=1, start=start) == whole[past:]  # even with another batch size


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [tuple(InfiniteShuffle(100, 1, seed=seed).permutation(epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    # Frozen: a run must resume in the same order after an upgrade of its packages.
    assert images_of(10, 12, 4, seed=0) == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4, 7, 3]


def test_parts_make_the_batches() -> None:
    """What processes that share a batch load: each its images of the same batches."""
    dataset = open_source("digits")
    whole = loader(dataset, batch_size=12, seed=3, start=1795)
    parts = [loader(dataset, batch_size=12, seed=3, start=1795, part=slice(rank, None, 3)) for rank in range(3)]
    for _ in range(3):
        batch = next(whole)
        for rank, part in enumerate(parts):
            assert torch.equal(next(part), batch[rank::3])


@pytest.mark.parametrize("name", ["count", "batch_size", "seed", "start"])
def test_shuffle_refuses(name: str) -> None:
    values: dict[str, Any] = {"count": 3, "batch_size": 2, "seed": 0, "start": 0} | {name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1; expected"):
        InfiniteShuffle(values["count"], values["batch_size"], seed=values["seed"], start=values["start"])


def test_loader_resumes_and_leaves_the_global_generator_alone() -> None:
    dataset = open_source("digits")
    state = torch.get_rng_state()
    batches = [batch for batch, _ in zip(loader(dataset, batch_size=700, seed=3), range(6), strict=False)]
    assert batches[0].dtype == torch.uint8
    assert batches[0].shape == (700, 1, 8, 8)
    order = InfiniteShuffle(1797, 700, seed=3).permutation(0)
    assert torch.equal(batches[0], everything(dataset)[order[:700]])
    resumed = loader(dataset, batch_size=700, seed=3, start=4 * 700)
    assert torch.equal(next(resumed), batches[4])
    assert torch.equal(next(resumed), batches[5])
    assert torch.equal(torch.get_rng_state(), state)
