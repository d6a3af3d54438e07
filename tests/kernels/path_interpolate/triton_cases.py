"""The Triton kernel of path_interpolate in Triton's interpreter, run by ../test_triton_interpreter.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import DTYPES, assert_near

from spigan.ops import BackendUnavailable, path_interpolate

pytestmark = pytest.mark.usefixtures("poisoned_memory")  # an element that a kernel does not write is NaN


def images(*shape, dtype=torch.uint8):
    return torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.rand(shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *DTYPES])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (5, 3, 11, 13)])
@pytest.mark.parametrize("flipped", [False, True])
def test_path(shape, x0_dtype, dtype, flipped):
    x0, flips = images(*shape, dtype=x0_dtype), torch.arange(shape[0]) % 2 == 0 if flipped else None
    for times, options in (
        ([0.3], {"seed": 2**40 + 1, "offset": 0}),
        ([0.25, 0.5, 1.0], {"seed": 5, "offset": 2**32 + 3}),
        ([k / 8 for k in range(1, 9)], {"seed": 5, "offset": 2**62 + 2}),
        ([0.1, 1.0], {"noise": torch.randn(shape)}),
        ([0.1, 1.0], {"noise": torch.randn(shape).to(torch.float16)}),
    ):
        actual = path_interpolate(x0, times, **options, flips=flips, dtype=dtype, backend="triton")
        exact = path_interpolate(x0, times, **options, flips=flips, backend="reference")
        for a, e in zip(actual, exact, strict=True):
            assert_near(a, e, dtype, atol=1.2e-5)


@settings(max_examples=25)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 12), st.integers(0, 12)),
    times=st.sets(st.floats(1e-6, 1), min_size=1, max_size=8).map(sorted),
    offset=st.integers(0, 7) | st.integers(0, 2**62),
    flipped=st.booleans(),
)
def test_path_of_any_shape(shape, times, offset, flipped):
    x0, flips = images(*shape), torch.arange(shape[0]) % 2 == 0 if flipped else None
    options = {"seed": 3, "offset": offset, "flips": flips}
    actual = path_interpolate(x0, times, **options, backend="triton")
    for a, e in zip(actual, path_interpolate(x0, times, **options, backend="reference"), strict=True):
        assert_near(a, e, torch.float32, atol=1.2e-5)


def test_path_of_views():
    x0, noise = images(3, 4, 5, 6), torch.randn(6, 5, 4, 3).permute(3, 2, 1, 0)
    flips = torch.tensor([True, False, False, False, True])[::2]
    expected = path_interpolate(x0, [0.3, 1.0], noise=noise.contiguous(), flips=flips.clone(), backend="triton")
    views = (
        x0.contiguous(memory_format=torch.channels_last),
        torch.zeros(3, 4, 5, 12, dtype=torch.uint8)[..., 1::2].copy_(x0),
        x0.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for view in views:
        actual = path_interpolate(view, [0.3, 1.0], noise=noise, flips=flips, backend="triton")
        assert all(map(torch.equal, actual, expected))


def test_gradients_of_the_path():
    flips, found = torch.tensor([True, False, True]), []
    for backend in ("triton", "reference"):
        torch.manual_seed(1)
        x0, noise = torch.rand(3, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 4, 5, requires_grad=True)
        x_T, i = path_interpolate(x0, [0.3, 1.0], noise=noise, flips=flips, backend=backend)
        found.append(torch.autograd.grad(x_T.square().sum() + i.pow(3).sum(), (x0, noise)))
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_limits():
    zeros = torch.zeros
    with pytest.raises(BackendUnavailable, match=r"'triton' .* it accepts at most 8 times, got 9"):
        path_interpolate(zeros(1, 1, 1, 1), [k / 9 for k in range(1, 10)], seed=0, backend="triton")
