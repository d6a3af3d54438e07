"""The CUDA kernel of philox_normal, executed on the CPU by csrc/testing."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from cuda_on_cpu import HALVES, NORMAL_ERROR, exact_box_muller, exact_normals, number, pretend
from guarded_array import Array

from spigan.ops.philox_normal import _box_muller, philox_normal_reference

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("rows", "row_numel", "offset", "shift"),
    [
        (1, 1, 0, 0),
        (2, 64, 0, 0),
        (3, 5, 0, 0),  # rows off alignment
        (1, 21, 3, 3),  # the head makes up for the address
        (2, 8, 2, 0),
        (1, 8, 0, 1),
        (2, 7, 2**32 - 3, 0),
        (1, 12, 2**34 + 1, 0),  # block numbers past 2^32
        (1, 9, 2**64 - 4, 0),  # element numbers wrap
        (1, 9000, 0, 0),  # more than all threads draw at once
    ],
)
def test_philox_normal(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    dtype: torch.dtype,
    rows: int,
    row_numel: int,
    offset: int,
    shift: int,
) -> None:
    pretend(kernels, processors=1)
    seeds = torch.tensor([-3 + 2**33 * row for row in range(rows)])
    out = Array((rows, row_numel), dtype, shift)
    kernels.philox_normal(out.address, number(kernels, dtype), seeds.data_ptr(), rows, row_numel, offset, 0)
    exact = torch.stack([exact_normals(int(seed), offset, row_numel) for seed in seeds])
    plain = exact.float()  # the reference takes no offset beyond 2^63
    if offset < 2**60:
        plain = philox_normal_reference(seeds, row_numel, offset)
    assert_accurate(out.checked(), plain.to(dtype), exact, absolute=NORMAL_ERROR)


def test_normals_of_a_gpu_are_those_of_the_definition(kernels: ModuleType) -> None:
    """csrc/testing gives each approximate function the largest error that it may have."""
    generator = torch.Generator().manual_seed(1)
    powers = 2 ** torch.arange(33)
    ends = torch.cat((powers - 1, powers[:-1], 2**32 - powers, 2**32 - 2**26 + 256 * torch.arange(-4, 5)))
    firsts, seconds = (x.flatten() for x in torch.meshgrid(ends, ends, indexing="ij"))
    words = torch.cat((torch.stack((firsts, seconds)), torch.randint(2**32, (2, 50_000), generator=generator)), 1)
    drawn = torch.tensor([kernels.box_muller(*pair) for pair in words.t().tolist()]).t()
    radius, angle = exact_box_muller(*words)
    error = (drawn - radius * torch.stack((torch.cos(angle), torch.sin(angle)))).abs()
    assert (error <= 1.1e-6 * radius.clamp(min=1.1)).all(), error.max()
    assert error.max() <= NORMAL_ERROR
    reference = torch.stack(_box_muller(*words))
    assert (drawn - reference).abs().max() <= 1e-5


@pytest.mark.parametrize(("rows", "row_numel"), [(0, 5), (3, 0)])
def test_philox_normal_of_nothing(kernels: ModuleType, rows: int, row_numel: int) -> None:
    pretend(kernels)
    out = Array((1,), torch.float32)
    kernels.philox_normal(out.address, 0, 0, rows, row_numel, 1, 0)
    assert out.checked().isnan().all()
