"""spigan._C as compiled: its raw functions on memory that the test owns, against published vectors and numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spigan import _C

MASK32 = np.uint64(0xFFFFFFFF)
WRAP = 2**64
GUARD = 16
GUARD_VALUE = np.float32(-12345.0)

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def numpy_philox4x32_10(counter, key):
    """The block function on arrays of 32-bit words held in uint64, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & MASK32, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & MASK32
        k0 = (k0 + np.uint64(0x9E3779B9)) & MASK32
        k1 = (k1 + np.uint64(0xBB67AE85)) & MASK32
    return c0, c1, c2, c3


def numpy_normals(seeds, row_numel, offset):
    """float64 [rows, row_numel], each element computed on its own from its index.

    The uniform numbers and the angle are float32 by definition; from there on everything is float64.
    """
    seed = np.array([s % WRAP for s in seeds], dtype=np.uint64)[:, None]
    element = np.array([(offset + j) % WRAP for j in range(row_numel)], dtype=np.uint64)[None, :]
    block, lane = element >> np.uint64(2), element & np.uint64(3)
    zero = np.zeros_like(block)
    words = numpy_philox4x32_10(
        (block & MASK32, block >> np.uint64(32), zero, zero), (seed & MASK32, seed >> np.uint64(32))
    )
    first, second = np.where(lane < 2, words[0], words[2]), np.where(lane < 2, words[1], words[3])
    u1 = first.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    u2 = second.astype(np.float32) * np.float32(2.0**-32)
    theta = (np.float32(6.2831855) * u2).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(u1.astype(np.float64)))
    return radius * np.where(lane % np.uint64(2) == 0, np.cos(theta), np.sin(theta))


def normals(seeds, row_numel, offset, threads=1):
    """float32 [rows, row_numel] from the extension, from a NaN-poisoned buffer between guards."""
    seeds = np.array([s % WRAP for s in seeds], dtype=np.uint64).view(np.int64)
    count = len(seeds) * row_numel
    buffer = np.full(count + 2 * GUARD, GUARD_VALUE, dtype=np.float32)
    out = buffer[GUARD : GUARD + count]
    out.fill(np.nan)
    _C.philox_normal(out.ctypes.data, seeds.ctypes.data, len(seeds), row_numel, offset % WRAP, threads)
    assert (buffer[:GUARD] == GUARD_VALUE).all(), "wrote before the buffer"
    assert (buffer[GUARD + count :] == GUARD_VALUE).all(), "wrote past the buffer"
    assert not np.isnan(out).any(), "left elements unwritten"
    return out.reshape(len(seeds), row_numel)


def assert_same_bits(actual, expected):
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox4x32_10_known_answers(counter, key, expected):
    assert _C.philox4x32_10(counter, key) == expected
    assert numpy_philox4x32_10(tuple(map(np.uint64, counter)), tuple(map(np.uint64, key))) == expected


@pytest.mark.parametrize("row_numel", [1, 2, 3, 4, 5, 255, 256, 257, 1001])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 7, 2**32 - 1, 2**34 + 3, 2**63 - 1, 2**64 - 1, 2**64 - 130])
def test_philox_normal_matches_numpy(row_numel, offset):
    seeds = [0, 1, 2**32 + 5, 2**63 - 1, -1]
    expected = numpy_normals(seeds, row_numel, offset)
    # |n| <= 6.77, where float32 has a spacing of 4.8e-7; the logarithm's, root's and cosine's roundings add to it.
    np.testing.assert_allclose(normals(seeds, row_numel, offset), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "row_numel"), [(1, 1), (1, 50_001), (7, 3_333), (9_000, 3)])
@pytest.mark.parametrize("offset", [0, 3, 2**34 + 3])
def test_threads_do_not_change_a_bit(rows, row_numel, offset):
    seeds = range(rows)
    one = normals(seeds, row_numel, offset, threads=1)
    for threads in (2, 5):
        assert_same_bits(normals(seeds, row_numel, offset, threads), one)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.one_of(st.integers(0, 2**64 - 1), st.integers(-600, 600)),
    row_numel=st.integers(0, 600),
    data=st.data(),
)
def test_a_split_range_has_the_bits_of_the_whole(seed, offset, row_numel, data):
    split = data.draw(st.integers(0, row_numel), label="split")
    whole = normals([seed], row_numel, offset)
    parts = (normals([seed], split, offset), normals([seed], row_numel - split, offset + split))
    assert_same_bits(np.concatenate(parts, axis=1), whole)


def test_a_row_depends_on_its_own_seed_alone():
    seeds = [11, -3, 11, 0]
    rows = normals(seeds, 77, offset=5)
    for row, seed in zip(rows, seeds, strict=True):
        assert_same_bits(row, normals([seed], 77, offset=5)[0])


@pytest.mark.parametrize(("rows", "row_numel"), [(0, 0), (0, 5), (5, 0)])
def test_empty(rows, row_numel):
    assert normals(range(rows), row_numel, offset=1, threads=2).shape == (rows, row_numel)


def test_normals_have_the_moments_of_a_normal_distribution():
    x = normals([3], 1_000_000, offset=0)[0].astype(np.float64)
    # Five standard errors of each moment.
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() - 1) < 5 * np.sqrt(2) * 1e-3
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96) * 1e-3
    assert abs((x[:-1] * x[1:]).mean()) < 5e-3


@pytest.mark.parametrize(("rows", "row_numel", "threads"), [(-1, 1, 1), (1, -1, 1), (1, 1, 0)])
def test_sizes_out_of_range_are_refused(rows, row_numel, threads):
    with pytest.raises(ValueError, match="philox_normal needs"):
        _C.philox_normal(0, 0, rows, row_numel, 0, threads)


def test_build_info():
    info = _C.build_info()
    assert info["compiler"]
    assert info["compiler_version"][0].isdigit()
    assert info["cxx_standard"] >= 201703
    assert info["build_type"]
    assert isinstance(info["openmp"], bool)
    assert info["openmp"] == (info["openmp_version"] is not None)
    assert isinstance(info["cuda"], bool)
    assert info["cuda"] == (info["cuda_version"] is not None) == bool(info["cuda_architectures"])


@pytest.mark.parametrize("name", ["philox4x32_10", "philox_normal", "build_info"])
def test_functions_are_documented(name):
    # pybind11 writes the signature itself; a docstring is what follows it.
    assert len(getattr(_C, name).__doc__.strip().splitlines()) > 1
