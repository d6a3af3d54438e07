"""spigan._C as compiled: its raw functions on memory that the test owns, against published vectors and numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spigan import _C

MASK32 = np.uint64(0xFFFFFFFF)
WRAP = 2**64
GUARD = 16
NUMBER = {name: number for number, name in enumerate(_C.DTYPES)}
# numpy has no bfloat16: its arrays are uint16 words.
STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16, "float64": np.float64}
PATTERN = 0xA5  # each byte of a guard
ONES = 0xFF  # each byte of a result before it is written: NaN in every dtype

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

    The two uniform numbers are float32 by definition; from there on everything is float64.
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
    theta = 2.0 * np.pi * u2.astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(u1.astype(np.float64)))
    return radius * np.where(lane % np.uint64(2) == 0, np.cos(theta), np.sin(theta))


class Result:
    """Memory for a kernel to write: NaN between two guards."""

    def __init__(self, *shape, dtype="float32"):
        item, count = np.dtype(STORAGE[dtype]).itemsize, int(np.prod(shape))
        self.dtype, self.margin, self.size = dtype, GUARD * item, count * item
        self.memory = np.full(self.size + 2 * self.margin, PATTERN, dtype=np.uint8)
        inside = self.memory[self.margin : self.margin + self.size]
        inside.fill(ONES)
        self.array = inside.view(STORAGE[dtype]).reshape(shape)
        self.address = self.memory.ctypes.data + self.margin

    def checked(self):
        """The array, all of which and nothing beside which was written."""
        assert (self.memory[: self.margin] == PATTERN).all(), "wrote before the result"
        assert (self.memory[self.margin + self.size :] == PATTERN).all(), "wrote past the result"
        assert not np.isnan(as_float64(self.array)).any(), "left elements unwritten"
        return self.array


def as_float64(stored):
    """Values of an array as it is stored."""
    if stored.dtype == np.uint16:
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return stored.astype(np.float64)


def nearest(x, dtype):
    """float64 x as it is stored in a dtype, rounded to the nearest value, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(STORAGE[dtype])
    # Eight significant bits; below 2^-126 the spacing stays what it is there.
    quantum = np.ldexp(1.0, np.maximum(np.frexp(x)[1], -125) - 8)
    with np.errstate(over="ignore"):
        rounded = (np.rint(x / quantum) * quantum).astype(np.float32)
    return (rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def assert_same_bits(actual, expected):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def draw(seeds, row_numel, offset, threads=1, dtype="float32"):
    """[rows, row_numel] from the extension."""
    seeds = np.array([s % WRAP for s in seeds], dtype=np.uint64).view(np.int64)
    out = Result(len(seeds), row_numel, dtype=dtype)
    _C.philox_normal(out.address, NUMBER[dtype], seeds.ctypes.data, len(seeds), row_numel, offset % WRAP, threads)
    return out.checked()


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
    np.testing.assert_allclose(draw(seeds, row_numel, offset), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "row_numel"), [(1, 1), (1, 50_001), (7, 3_333), (9_000, 3)])
@pytest.mark.parametrize("offset", [0, 3, 2**34 + 3])
def test_threads_do_not_change_a_bit(rows, row_numel, offset):
    seeds = range(rows)
    one = draw(seeds, row_numel, offset, threads=1)
    for threads in (2, 5):
        assert_same_bits(draw(seeds, row_numel, offset, threads), one)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.one_of(st.integers(0, 2**64 - 1), st.integers(-600, 600)),
    row_numel=st.integers(0, 600),
    data=st.data(),
)
def test_a_split_range_has_the_bits_of_the_whole(seed, offset, row_numel, data):
    split = data.draw(st.integers(0, row_numel), label="split")
    whole = draw([seed], row_numel, offset)
    parts = (draw([seed], split, offset), draw([seed], row_numel - split, offset + split))
    assert_same_bits(np.concatenate(parts, axis=1), whole)


def test_a_row_depends_on_its_own_seed_alone():
    seeds = [11, -3, 11, 0]
    rows = draw(seeds, 77, offset=5)
    for row, seed in zip(rows, seeds, strict=True):
        assert_same_bits(row, draw([seed], 77, offset=5)[0])


@pytest.mark.parametrize(("rows", "row_numel"), [(0, 0), (0, 5), (5, 0)])
def test_empty(rows, row_numel):
    assert draw(range(rows), row_numel, offset=1, threads=2).shape == (rows, row_numel)


def test_normals_have_the_moments_of_a_normal_distribution():
    x = draw([3], 1_000_000, offset=0)[0].astype(np.float64)
    # Five standard errors of each moment.
    assert abs(x.mean()) < 5e-3
    assert abs(x.var() - 1) < 5 * np.sqrt(2) * 1e-3
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96) * 1e-3
    assert abs((x[:-1] * x[1:]).mean()) < 5e-3


def test_every_instruction_set_draws_the_same_numbers(isa):
    """The elementary functions on a million words: where |n| is up to 6.77 float32 has a spacing of 4.8e-7."""
    seeds, row_numel, offset = [7, 2**40 + 1], 500_003, 2**34 + 3
    single = draw(seeds, row_numel, offset)
    assert np.abs(single - numpy_normals(seeds, row_numel, offset)).max() < 2e-6
    for dtype in STORAGE:
        for numel in (1, 6, 33, 1001):
            expected = nearest(single[:, :numel].astype(np.float64), dtype)
            assert_same_bits(draw(seeds, numel, offset, dtype=dtype), expected)


def interpolate(x0, x0_dtype, times, *, noise=None, flips=None, dtype="float32", scale=(0.25, 0.75), seed=5, offset=0):
    """x_T [images, rows, width] and i [K, images, rows, width]; x0 and noise as they are stored, scale = a(1), s(1)."""
    x_T, i = Result(*x0.shape, dtype=dtype), Result(len(times), *x0.shape, dtype=dtype)
    _C.path_interpolate(
        x_T.address,
        i.address,
        NUMBER[dtype],
        x0.ctypes.data,
        NUMBER[x0_dtype],
        0 if noise is None else noise.ctypes.data,
        0 if flips is None else flips.ctypes.data,
        *x0.shape,
        times,
        *scale,
        seed,
        offset % WRAP,
        2,
    )
    return x_T.checked(), i.checked()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("images", "rows", "width"), [(1, 1, 1), (3, 2, 5), (2, 5, 51), (1, 1, 255), (1, 2, 128), (1, 257, 1), (2, 9, 100)]
)
def test_path_interpolate_matches_numpy(images, rows, width, dtype, isa):
    rng = np.random.default_rng(0)
    shape, times = (images, rows, width), [0.125, 0.7, 1.0]
    noise = rng.standard_normal(shape, dtype=np.float32)
    flips = np.arange(images, dtype=np.uint8) % 3 + (images == 1)  # anything but 0 mirrors
    for x0_dtype in ("uint8", "float32", "bfloat16", "float16"):
        if x0_dtype == "uint8":
            x0 = rng.integers(0, 256, shape, dtype=np.uint8)
            clean = x0 / 127.5 - 1
        else:
            x0 = nearest(rng.uniform(-1, 1, shape), x0_dtype)
            clean = as_float64(x0)
        mirrored = np.where(flips[:, None, None] != 0, clean[..., ::-1], clean)
        for mirror, image in ((None, clean), (flips, mirrored)):
            for offset in range(4):
                drawn = numpy_normals([5], noise.size, offset - 2).reshape(shape)
                for given_noise, e in ((noise, noise), (None, drawn)):
                    results = interpolate(
                        x0, x0_dtype, times, noise=given_noise, flips=mirror, dtype=dtype, offset=offset - 2
                    )
                    x_T = 0.25 * image + 0.75 * e
                    t = np.array(times).reshape(-1, 1, 1, 1)
                    # One rounding to the result's dtype of what is known to 3e-6.
                    unit = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
                    for actual, exact in zip(results, (x_T, t * image + (1 - t) * x_T), strict=True):
                        np.testing.assert_allclose(as_float64(actual), exact, rtol=unit, atol=3e-6)


def convert(stored, x0_dtype, dtype):
    """Stored values in another dtype: x_T = 1 x_0 + 0 e, where e = -1 keeps the sign of -0."""
    noise = np.full(stored.shape, -1, dtype=np.float32)
    out = np.empty(stored.shape, dtype=STORAGE[dtype])
    i = np.empty_like(out)
    sizes = (1, 1, stored.size)
    _C.path_interpolate(
        out.ctypes.data,
        i.ctypes.data,
        NUMBER[dtype],
        stored.ctypes.data,
        NUMBER[x0_dtype],
        noise.ctypes.data,
        0,
        *sizes,
        [1.0],
        1.0,
        0.0,
        0,
        0,
        1,
    )
    return out


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_types_convert_exactly(half, isa):
    """All 65536 words to float32; back to them, every float32 at or next to a value or halfway to the next one."""
    words = np.arange(2**16, dtype=np.uint16)
    stored = words if half == "bfloat16" else words.view(np.float16)
    with np.errstate(invalid="ignore"):
        values = as_float64(stored).astype(np.float32)
    number = np.isfinite(values)
    assert_same_bits(convert(stored, half, "float32")[number], values[number])
    assert np.isnan(convert(stored[np.isnan(values)], half, "float32")).all()
    np.testing.assert_array_equal(convert(stored[np.isinf(values)], half, "float32"), values[np.isinf(values)])

    shift = 16 if half == "bfloat16" else 13
    finite = values[number].view(np.uint32)
    steps = np.uint32(2 ** (shift - 1)) * np.arange(2, dtype=np.uint32)[:, None, None]
    floats = (finite + steps + np.arange(-1, 2, dtype=np.int32).astype(np.uint32)[:, None]).ravel().view(np.float32)
    others = [65519.99, 65520, 65536, 1e9, -1e9, 1e-45, 1e-30, *np.ldexp(np.arange(1, 2048, dtype=np.float32), -25)]
    floats = np.concatenate((floats[np.isfinite(floats)], np.array(others, dtype=np.float32)))
    if half == "bfloat16":  # subnormal float32 may be flushed to 0 on the way: they are no result of any operation
        floats = floats[np.abs(floats) >= 2.0**-126]
    assert_same_bits(convert(floats, "float32", half), nearest(floats.astype(np.float64), half))
    special = np.float32([np.nan, -np.nan, np.inf, -np.inf])
    np.testing.assert_array_equal(as_float64(convert(special, "float32", half)), special.astype(np.float64))


def solve(inputs, intervals, dtype, *, every_step=False, activation="silu", threads=1):
    """States from the extension; inputs (h0, weight, bias, time_weight) as they are stored."""
    h0, weight, _, _ = inputs
    states = sum(count for _, _, count in intervals) if every_step else len(intervals)
    out = Result(states, *h0.shape, dtype=dtype)
    _C.rk4_mlp(
        out.address,
        NUMBER[dtype],
        *(x.ctypes.data for x in inputs),
        *h0.shape,
        len(weight),
        intervals,
        every_step,
        _C.ACTIVATIONS.index(activation),
        threads,
    )
    return out.checked()


def numpy_rk4(inputs, intervals):
    """The states after every step in float64, SiLU between the layers; the formulas of the textbook."""
    h, weight, bias, time_weight = (as_float64(x) for x in inputs)

    def r(h, t):
        for layer in range(len(weight)):
            h = (h / (1 + np.exp(-h)) if layer else h) @ weight[layer].T + bias[layer] + t * time_weight[layer]
        return h

    states = []
    for start, dt, count in intervals:
        for step in range(count):
            t = start + step * dt
            k1 = r(h, t)
            k2 = r(h + dt / 2 * k1, t + dt / 2)
            k3 = r(h + dt / 2 * k2, t + dt / 2)
            k4 = r(h + dt * k3, t + dt)
            h = h + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            states.append(h)
    return np.stack(states)


@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("batch", [1, 2, 3, 5, 35])
@pytest.mark.parametrize(("dim", "layers"), [(1, 1), (31, 2), (32, 1), (33, 3), (64, 2)])
def test_rk4_mlp_matches_numpy(dim, layers, batch, dtype, isa):
    rng = np.random.default_rng(dim)
    shapes = ((batch, dim), (layers, dim, dim), (layers, dim), (layers, dim))
    scales = (1.0, 0.5 * dim**-0.5, 0.5, 0.5)
    inputs = [nearest(scale * rng.standard_normal(shape), dtype) for shape, scale in zip(shapes, scales, strict=True)]
    intervals = [(0.0, 0.15, 2), (0.3, 0.7, 1)]
    exact = numpy_rk4(inputs, intervals)
    # Half types round a layer's input and output: an error of some units of their precision, not of float32's.
    atol = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 8e-2}[dtype]
    every = solve(inputs, intervals, dtype, every_step=True, threads=3)
    np.testing.assert_allclose(as_float64(every), exact, rtol=0, atol=atol)
    assert_same_bits(solve(inputs, intervals, dtype), every[[1, 2]])


def test_empty_problems_touch_no_memory():
    for images, rows, width in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        _C.path_interpolate(0, 0, 0, 0, 0, 0, 0, images, rows, width, [1.0], 0.5, 0.5, 0, 0, 1)
    for batch, dim in ((0, 4), (3, 0), (0, 0)):
        _C.rk4_mlp(0, 0, 0, 0, 0, 0, batch, dim, 1, [(0.0, 1.0, 1)], False, 0, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("philox_normal", {"rows": -1}, "expected rows >= 0, got -1"),
        ("philox_normal", {"row_numel": -1}, "expected row_numel >= 0, got -1"),
        ("philox_normal", {"dtype": 4}, "expected an index in DTYPES of a dtype that this function supports, got 4"),
        ("philox_normal", {"dtype": -1}, "expected an index in DTYPES of a dtype that this function supports, got -1"),
        ("path_interpolate", {"images": -1}, "expected images >= 0, got -1"),
        ("path_interpolate", {"rows": -2}, "expected rows >= 0, got -2"),
        ("path_interpolate", {"width": -1}, "expected width >= 0, got -1"),
        ("path_interpolate", {"times": []}, rf"expected len\(times\) from 1 to {_C.MAX_PATH_TIMES}, got 0"),
        (
            "path_interpolate",
            {"times": [1.0] * (_C.MAX_PATH_TIMES + 1)},
            rf"got {_C.MAX_PATH_TIMES + 1}",
        ),
        ("path_interpolate", {"dtype": 3}, "expected an index in DTYPES .* supports, got 3"),
        ("path_interpolate", {"dtype": 4}, "expected an index in DTYPES .* supports, got 4"),
        ("path_interpolate", {"x0_dtype": 3}, "expected an index in DTYPES .* supports, got 3"),
        ("path_interpolate", {"x0_dtype": 5}, "expected an index in DTYPES .* supports, got 5"),
        ("rk4_mlp", {"batch": -1}, "expected batch >= 0, got -1"),
        ("rk4_mlp", {"dim": -1}, "expected dim >= 0, got -1"),
        ("rk4_mlp", {"layers": 0}, "expected layers >= 1, got 0"),
        ("rk4_mlp", {"dtype": 4}, "expected an index in DTYPES .* supports, got 4"),
        ("rk4_mlp", {"activation": len(_C.ACTIVATIONS)}, "expected an index in ACTIVATIONS, got 4"),
        ("rk4_mlp", {"activation": -1}, "expected an index in ACTIVATIONS, got -1"),
        *(
            (name, {"threads": 0}, "expected threads from 1 to .*, got 0")
            for name in ("philox_normal", "path_interpolate", "rk4_mlp")
        ),
    ],
)
def test_arguments_out_of_range_are_refused(name, change, message):
    arguments = {
        "philox_normal": {"out": 0, "dtype": 0, "seeds": 0, "rows": 0, "row_numel": 0, "offset": 0},
        "path_interpolate": {
            **dict.fromkeys(("x_T", "i", "dtype", "x0", "x0_dtype", "noise", "flips", "images", "rows", "width"), 0),
            **{"times": [1.0], "mean_coef": 0.5, "std": 0.5, "seed": 0, "offset": 0},
        },
        "rk4_mlp": {
            **dict.fromkeys(("out", "dtype", "h0", "weight", "bias", "time_weight", "batch", "dim"), 0),
            **{"layers": 1, "intervals": [(0.0, 1.0, 1)], "every_step": False, "activation": 0},
        },
    }[name]
    getattr(_C, name)(**arguments, threads=1)
    with pytest.raises(ValueError, match=message):
        getattr(_C, name)(**{**arguments, "threads": 1, **change})


def test_instruction_sets():
    names = _C.build_info()["cpu_isas"]
    assert names[-1] == "portable" and len(set(names)) == len(names)
    try:
        for name in names:
            _C.select_cpu_isa(name)
            assert _C.build_info()["cpu_isa"] == name
        with pytest.raises(ValueError, match=r"select_cpu_isa: mmx is not one of build_info\(\)\['cpu_isas'\]"):
            _C.select_cpu_isa("mmx")
        assert _C.build_info()["cpu_isa"] == names[-1] or _C.build_info()["cpu_isa"] == names[0]
    finally:
        _C.select_cpu_isa(None)
    assert _C.build_info()["cpu_isa"] == names[0]


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


@pytest.mark.parametrize(
    "name",
    ["philox4x32_10", "philox_normal", "path_interpolate", "rk4_mlp", "select_cpu_isa", "build_info"],
)
def test_functions_are_documented(name):
    # pybind11 writes the signature itself; a docstring is what follows it.
    assert len(getattr(_C, name).__doc__.strip().splitlines()) > 1
