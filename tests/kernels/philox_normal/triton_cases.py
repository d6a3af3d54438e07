"""The Triton kernel of philox_normal in Triton's interpreter, run by ../test_triton_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DTYPES, assert_near

from spigan.ops import BackendUnavailable, philox_normal

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element that a kernel does not write is NaN


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5,), (0,), (3, 0), (0, 3), (7, 13), (1025,), (2049,)])
@pytest.mark.parametrize("offset", [0, 3, 2**32 - 3, 2**40 + 2, 2**63 - 4000])
def test_normals(shape, offset):
    for dtype in DTYPES:
        actual = philox_normal(shape, seed=2**63 - 12, offset=offset, dtype=dtype, backend="triton")
        assert_near(actual, philox_normal(shape, seed=2**63 - 12, offset=offset, backend="reference"), dtype)


@settings(max_examples=20)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), max_size=4),
    row=st.integers(0, 40) | st.integers(1000, 1100),
    offset=st.integers(0, 100) | st.integers(0, 2**63 - 2000),
    split=st.floats(0, 1),
)
def test_normals_of_several_seeds(seeds, row, offset, split):
    seeds = torch.tensor(seeds, dtype=torch.int64)

    def draw(count, offset, backend="triton"):
        return philox_normal((len(seeds), count), seed=seeds, offset=offset, backend=backend)

    whole, part = draw(row, offset), round(split * row)
    assert_near(whole, draw(row, offset, "reference"), torch.float32)
    assert torch.equal(torch.cat((draw(part, offset), draw(row - part, offset + part)), 1), whole)


def test_limits():
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it draws float32, bfloat16 or float16, not float64"):
        philox_normal((3,), seed=0, dtype=torch.float64, backend="triton")
