"""philox_normal: the reference against Random123 and the definition, cpp against the reference, statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spigan.ops import philox_normal
from spigan.ops.philox_normal import _box_muller, philox4x32_10, philox_normal_reference

BACKENDS = ["reference", "cpp"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MASK32 = 0xFFFFFFFF

# Random123, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def integer_philox(counter, key):
    """Philox4x32-10 on Python's unbounded integers, written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def element(seed, index):
    """One number of a stream in float64; only the two uniform numbers are float32, as the definition says."""
    block, lane = divmod(index, 4)
    words = integer_philox((block % 2**32, block >> 32, 0, 0), (seed % 2**32, seed >> 32))
    first, second = words[2 * (lane // 2) : 2 * (lane // 2) + 2]
    u1 = float(np.float32(np.float32(first) * np.float32(2**-32) + np.float32(2**-33)))
    angle = 2 * math.pi * float(np.float32(second) * np.float32(2**-32))
    return math.sqrt(-2 * math.log(u1)) * (math.sin(angle) if lane % 2 else math.cos(angle))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    words = philox4x32_10(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(word.item() for word in words) == expected
    assert integer_philox(counter, key) == expected


def test_counters_and_keys_broadcast():
    counter = tuple(torch.tensor([[c[i] for c, _, _ in KNOWN_ANSWERS]]) for i in range(4))
    key = tuple(torch.tensor([[k[i]] for _, k, _ in KNOWN_ANSWERS]) for i in range(2))
    words = torch.stack(philox4x32_10(counter, key), dim=-1)
    assert words.shape == (3, 3, 4)
    assert [tuple(words[i, i].tolist()) for i in range(3)] == [result for _, _, result in KNOWN_ANSWERS]


def test_extreme_words_give_finite_normals():
    words = torch.tensor([0, 1, MASK32 - 1, MASK32])
    first, second = (x.flatten() for x in torch.meshgrid(words, words, indexing="ij"))
    cosine, sine = _box_muller(first, second)
    assert cosine.isfinite().all() and sine.isfinite().all()
    assert cosine[0].item() == pytest.approx((2 * 33 * math.log(2)) ** 0.5, rel=1e-6)  # the largest there is
    assert torch.equal(torch.hypot(cosine, sine)[first == MASK32], torch.zeros(4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 1, 6, 2**32 - 3, 2**34 - 3, 2**63 - 11])
def test_elements_are_those_of_the_definition(backend, seed, offset, poisoned_memory):
    drawn = philox_normal((10,), seed=seed, offset=offset, backend=backend)
    expected = [element(seed, offset + i) for i in range(10)]
    # The reference rounds the angle to float32, whose spacing near 2 pi is 4.8e-7, times a radius of up to 6.77.
    np.testing.assert_allclose(drawn.numpy(), expected, rtol=0, atol=2e-6 if backend == "cpp" else 5e-6)


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (3,), (4,), (5,), (0,), (3, 0), (0, 3), (1, 1, 1), (7, 13), (2, 3, 5, 7), (1001,), (257, 33)],
)
@pytest.mark.parametrize("offset", [0, 3, 2**32 + 1, 2**40 + 2])
def test_cpp_equals_the_reference(shape, offset, poisoned_memory):
    expected = philox_normal(shape, seed=12, offset=offset, backend="reference")
    actual = philox_normal(shape, seed=12, offset=offset, backend="cpp")
    assert actual.shape == expected.shape == shape
    assert actual.is_contiguous() and expected.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@settings(max_examples=40)
@given(
    seeds=st.lists(st.integers(0, 2**63 - 1), max_size=5),
    row=st.lists(st.integers(0, 9), max_size=3),
    offset=st.one_of(st.integers(0, 100), st.integers(0, 2**63 - 1000)),
)
def test_cpp_equals_the_reference_with_a_seed_for_each_row(seeds, row, offset):
    seeds = torch.tensor(seeds, dtype=torch.int64)
    shape = (len(seeds), *row)
    expected = philox_normal(shape, seed=seeds, offset=offset, backend="reference")
    actual = philox_normal(shape, seed=seeds, offset=offset, backend="cpp")
    assert actual.shape == expected.shape == shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(seed=st.integers(0, 2**63 - 1), offset=st.integers(0, 2**40), count=st.integers(0, 300), share=st.floats(0, 1))
def test_a_split_range_has_the_bits_of_the_whole(backend, seed, offset, count, share):
    split = round(share * count)
    whole = philox_normal((count,), seed=seed, offset=offset, backend=backend)
    first = philox_normal((split,), seed=seed, offset=offset, backend=backend)
    second = philox_normal((count - split,), seed=seed, offset=offset + split, backend=backend)
    if backend == "cpp":
        assert torch.equal(torch.cat((first, second)), whole)
    else:
        # torch's vectorised logarithm and cosine differ in the last bit from the scalar ones at the end of an array.
        torch.testing.assert_close(torch.cat((first, second)), whole, rtol=0, atol=2e-6)


def test_a_row_has_the_bits_of_its_own_seed():
    seeds = [11, 2**63 - 1, 11, 0, 2**32]
    for dtype in DTYPES:
        rows = philox_normal((5, 7, 11), seed=torch.tensor(seeds), offset=5, dtype=dtype, backend="cpp")
        for row, seed in zip(rows, seeds, strict=True):
            assert torch.equal(row, philox_normal((7, 11), seed=seed, offset=5, dtype=dtype, backend="cpp"))
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])


def test_a_row_of_the_reference_is_that_of_its_own_seed():
    # To rounding: torch's vectorised logarithm and cosine differ from those at the end of an array.
    seeds = [11, 2**63 - 1, 0]
    rows = philox_normal((3, 64), seed=torch.tensor(seeds), backend="reference")
    for row, seed in zip(rows, seeds, strict=True):
        torch.testing.assert_close(row, philox_normal((64,), seed=seed, backend="reference"), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_tensors_need_not_be_contiguous(backend):
    seeds = torch.arange(1, 13).reshape(3, 4)
    for view in (seeds[:, 1], seeds[0, ::3], torch.tensor(9).expand(4)):
        strided = philox_normal((len(view), 5), seed=view, backend=backend)
        assert torch.equal(strided, philox_normal((len(view), 5), seed=view.clone(), backend=backend))
    assert torch.equal(strided[0], strided[3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 33), (3, 1), (3, 0), (0, 5), (3, 300)])
def test_other_dtypes_are_casts(backend, dtype, shape, poisoned_memory):
    # Kernels write every dtype themselves; they compute in float32.
    seeds = torch.tensor([4, 5, 6])[: shape[0]]
    for seed, offset in ((4, 1), (seeds, 2**32 + 2)):
        single = philox_normal(shape, seed=seed, offset=offset, backend=backend)
        assert single.dtype == torch.float32
        cast = philox_normal(shape, seed=seed, offset=offset, dtype=dtype, backend=backend)
        assert cast.dtype == dtype and torch.equal(cast, single.to(dtype))
        assert cast.is_contiguous() and not cast.requires_grad


def test_the_global_generator_and_the_default_dtype_have_no_part_in_it():
    first = philox_normal((9,), seed=4)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        torch.rand(5)
        before = torch.get_rng_state()
        second = philox_normal((9,), seed=4)
        assert torch.equal(torch.get_rng_state(), before)
        assert philox_normal((9,), seed=4, backend="reference").dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_rng_state(state)
    assert second.dtype == torch.float32 and torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_standard_normal(backend):
    n = 100_000
    x = philox_normal((n,), seed=3, backend=backend).double().numpy()
    # Five standard errors of each moment.
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert scipy.stats.kstest(x, scipy.stats.norm.cdf).pvalue > 1e-3
    for lane in range(4):
        assert scipy.stats.kstest(x[lane::4], scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_are_independent(backend):
    n = 100_000
    streams = [
        philox_normal((n,), seed=seed, offset=offset, backend=backend).double()
        for seed, offset in [(0, 0), (1, 0), (2**32, 0), (0, n), (0, 2**34), (2**62, 0)]
    ]
    # Neighbours in one stream and in one block; the squares show a dependence of the radius that the signs hide.
    pairs = [(streams[0][:-lag], streams[0][lag:]) for lag in (1, 2, 3, 4)]
    pairs += [(streams[0], other) for other in streams[1:]] + [(streams[1], streams[2])]
    for a, b in pairs:
        for x, y in ((a, b), (a.square(), b.square()), (a.abs().log(), b.abs().log())):
            assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1].item()) < 5 / n**0.5


def test_seeds_of_consecutive_images_are_independent():
    rows = philox_normal((300, 300), seed=torch.arange(300)).double()
    assert scipy.stats.kstest(rows.mean(1) * 300**0.5, scipy.stats.norm.cdf).pvalue > 1e-3
    assert scipy.stats.kstest(rows.mean(0) * 300**0.5, scipy.stats.norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype, set_threads):
    def draw(threads):
        set_threads(threads)
        return philox_normal((3, 20_001), seed=torch.tensor([5, 6, 7]), offset=3, dtype=dtype, backend="cpp")

    assert all(torch.equal(draw(threads), draw(1)) for threads in (2, 3))


def test_meta_tensors_have_a_shape():
    drawn = philox_normal((3, 5), seed=0, device="meta", dtype=torch.bfloat16)
    assert drawn.shape == (3, 5) and drawn.dtype == torch.bfloat16 and drawn.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shape": (3, -1)}, ValueError, r"each size in shape must be in \[0, 2\*\*63\), got -1"),
        ({"shape": (3, 1.5)}, TypeError, "each size in shape must be an integer, got float"),
        ({"shape": 3}, TypeError, "shape must be a sequence of sizes, got int"),
        ({"offset": -1}, ValueError, "offset must be in"),
        ({"offset": 2**63}, ValueError, "offset must be in"),
        ({"offset": 0.5}, TypeError, "offset must be an integer, got float"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 2**63}, ValueError, "seed must be in"),
        ({"seed": "7"}, TypeError, "seed must be an integer, got str"),
        ({"seed": None}, TypeError, "seed must be an integer, got NoneType"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"dtype": torch.int64}, TypeError, "dtype must be float32, float64, bfloat16, float16, got torch.int64"),
        ({"seed": torch.zeros(3)}, TypeError, r"a seed tensor must be int64 \[N\], got float32 \[3\]"),
        (
            {"seed": torch.zeros(3, 1, dtype=torch.int64)},
            TypeError,
            r"a seed tensor must be int64 \[N\], got int64 \[3, 1\]",
        ),
        (
            {"seed": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"a seed tensor \[2\] needs a shape that starts with it",
        ),
        (
            {"seed": torch.zeros(2, dtype=torch.int64), "shape": ()},
            ValueError,
            r"a seed tensor \[2\] needs a shape that starts with it, got \[\]",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_argument(change, error, message, backend):
    with pytest.raises(error, match=message):
        philox_normal(**{"shape": (3, 4), "seed": 0, "backend": backend, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_stays_whole_under_compile(backend):
    def draw(x, seeds):
        y = x + philox_normal(x.shape, seed=7, offset=3, backend=backend)
        return y, philox_normal((len(seeds), 5), seed=seeds, dtype=torch.float64, backend=backend)

    arguments = (torch.ones(4, 6), torch.tensor([1, 2, 3]))
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(*arguments), draw(*arguments), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_graph_serves_all_sizes_seeds_and_offsets(backend):
    graphs = []

    def count(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    def draw(x, seed, offset):
        return x + philox_normal(x.shape, seed=seed, offset=offset, backend=backend)

    compiled = torch.compile(draw, backend=count, fullgraph=True, dynamic=True)
    for n, seed, offset in ((4, 7, 5), (9, 2**40, 2**33), (6, 123, 77)):
        x = torch.zeros(n, 5)
        torch.testing.assert_close(compiled(x, seed, offset), draw(x, seed, offset), rtol=0, atol=2e-6)
    assert len(graphs) == 1


@pytest.mark.slow
def test_stays_whole_under_inductor():
    def draw(x):
        return 2 * x + philox_normal(x.shape, seed=7, offset=3)

    x = torch.ones(4, 6)
    torch.testing.assert_close(torch.compile(draw, fullgraph=True)(x), draw(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("seeds", "row_numel", "offset", "dtype"),
    [
        ([1, 2, 3], 5, 3, torch.float32),
        ([4], 0, 0, torch.float64),
        ([], 5, 2**40, torch.bfloat16),
        ([9], 1, 0, torch.float16),
    ],
)
def test_opcheck(seeds, row_numel, offset, dtype):
    seeds = torch.tensor(seeds, dtype=torch.int64)
    torch.library.opcheck(torch.ops.spigan.philox_normal, (seeds, row_numel, offset, dtype, "cpp"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exports(backend):
    class Noise(torch.nn.Module):
        def forward(self, x, seeds):
            return x + philox_normal(x.shape, seed=seeds, offset=2, backend=backend)

    arguments = (torch.zeros(3, 5), torch.tensor([4, 5, 6]))
    rows = torch.export.Dim("rows", min=1, max=100)
    program = torch.export.export(Noise(), arguments, dynamic_shapes={"x": {0: rows}, "seeds": {0: rows}})
    assert torch.equal(program.module()(*arguments), Noise()(*arguments))
    larger = (torch.ones(8, 5), torch.arange(8))
    torch.testing.assert_close(program.module()(*larger), Noise()(*larger), rtol=0, atol=2e-6)
    uses_kernel = any("spigan.philox_normal" in str(node.target) for node in program.graph.nodes)
    assert uses_kernel == (backend == "cpp")


def test_reference_takes_seeds_of_64_bits():
    rows = philox_normal_reference(torch.tensor([-1, 2**63 - 1]), 3, 0)
    np.testing.assert_allclose(rows[0].numpy(), [element(2**64 - 1, i) for i in range(3)], rtol=0, atol=5e-6)
    assert not torch.equal(rows[0], rows[1])
