"""The CUDA kernels, executed on the CPU by csrc/testing: every CUDA thread is a thread of the operating system.

Sizes are tiny, because a warp shuffle costs 32 context switches here.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops.philox_normal import philox4x32_10, philox_normal_reference
from spigan.ops.rk4_mlp import rk4_mlp_reference, step_grid
from spigan.sde import VPSDE

TESTING = Path(__file__).parents[2] / "csrc" / "testing"
HALVES = (torch.bfloat16, torch.float16)
GUARD = 64  # bytes before and after every array


# ---- Building ----


def find(*names: str) -> str | None:
    """Path of the first of these programs that there is, also of those in Python's own environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def run(*command: str | Path, **kwargs: Any) -> str:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)
    assert result.returncode == 0, f"{' '.join(map(str, command))} returned {result.returncode}:\n{result.stdout}"
    return result.stdout


def build(folder: Path, target: str, *options: str) -> None:
    cmake = find("cmake")
    if cmake is None:
        pytest.skip("cmake is missing")
    ninja = find("ninja")
    generator = [] if ninja is None else ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    run(cmake, "-S", TESTING, "-B", folder, *generator, *options)
    run(cmake, "--build", folder, "--target", target)


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C++ compiler that CMake takes."""
    named = os.environ.get("CXX")
    found = find(*([named] if named else ["c++", "g++", "clang++"]))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(scope="session")
def kernels(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The functions of spigan._C.cuda on CPU addresses."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    build(folder, "_cuda_on_cpu", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    (path,) = folder.glob("_cuda_on_cpu*")
    spec = spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pretend(
    kernels: ModuleType,
    *,
    major: int = 9,
    processors: int = 4,
    threads: int = 32,
    shared_bytes: int = 232448,
    largest_cluster: int = 16,
) -> None:
    kernels.set_device(
        major=major,
        processors=processors,
        threads=threads,
        shared_bytes=shared_bytes,
        largest_cluster=largest_cluster,
    )


# ---- Memory ----


class Array:
    """A tensor of NaN with guards around it, `shift` elements off alignment."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.start, self.end = GUARD + shift * dtype.itemsize, GUARD + shift * dtype.itemsize + size
        self.memory = torch.full((self.end + GUARD,), 0xA5, dtype=torch.uint8)
        assert self.memory.data_ptr() % 16 == 0
        self.memory[self.start : self.end] = 0xFF
        self.tensor = self.memory[self.start : self.end].view(dtype).view(tuple(shape))

    @classmethod
    def of(cls, value: Tensor, shift: int = 0) -> Array:
        array = cls(value.shape, value.dtype, shift)
        array.tensor.copy_(value)
        return array

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start

    def checked(self) -> Tensor:
        assert (self.memory[: self.start] == 0xA5).all(), "written before the array"
        assert (self.memory[self.end :] == 0xA5).all(), "written after the array"
        return self.tensor


def number(kernels: ModuleType, dtype: torch.dtype) -> int:
    return int(kernels.DTYPES.index(str(dtype).removeprefix("torch.")))


# ---- philox_normal ----


def exact_normals(seed: int, offset: int, count: int) -> Tensor:
    """Elements offset .. offset + count - 1 of a stream in float64; the uniform numbers are those of float32."""
    elements = [(offset + j) % 2**64 for j in range(count)]
    low, high = (torch.tensor([(e // 4 >> bits) & 0xFFFFFFFF for e in elements]) for bits in (0, 32))
    zero = torch.zeros_like(low)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    words = torch.stack(philox4x32_10((low, high, zero, zero), key)).to(torch.float32)
    lane = torch.tensor([e % 4 for e in elements])
    rows = torch.arange(count)
    u1 = (words[lane // 2 * 2, rows] * 2.0**-32 + 2.0**-33).double()
    angle = 2.0 * math.pi * (words[lane // 2 * 2 + 1, rows] * 2.0**-32).double()
    return torch.sqrt(-2.0 * torch.log(u1)) * torch.where(lane % 2 == 0, torch.cos(angle), torch.sin(angle))


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
    assert_accurate(out.checked(), plain.to(dtype), exact)


@pytest.mark.parametrize(("rows", "row_numel"), [(0, 5), (3, 0)])
def test_philox_normal_of_nothing(kernels: ModuleType, rows: int, row_numel: int) -> None:
    pretend(kernels)
    out = Array((1,), torch.float32)
    kernels.philox_normal(out.address, 0, 0, rows, row_numel, 1, 0)
    assert out.checked().isnan().all()


# ---- path_interpolate ----


def check_path_interpolate(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    images: int = 2,
    rows: int = 3,
    width: int = 8,
    times: Sequence[float] = (0.5, 1.0),
    dtype: torch.dtype = torch.float32,
    x0_dtype: torch.dtype = torch.uint8,
    offset: int = 0,
    flips: bool = False,
    noise: bool = False,
    shift: int = 0,
) -> None:
    pretend(kernels, processors=1)
    seed, shape = 2**40 + 7, (images, rows, width)
    if x0_dtype == torch.uint8:
        x0 = torch.randint(0, 256, shape, dtype=torch.uint8)
    else:
        x0 = (2.0 * torch.rand(shape) - 1.0).to(x0_dtype)
    given, mirrored = torch.randn(shape), torch.arange(images) % 2 == 0
    x_T, i = Array(shape, dtype, shift), Array((len(times), *shape), dtype, shift)
    inputs = Array.of(x0, shift), Array.of(given, shift), Array.of(mirrored.to(torch.uint8))
    mean_coef, std = VPSDE().marginal(1.0)
    kernels.path_interpolate(
        x_T.address,
        i.address,
        number(kernels, dtype),
        inputs[0].address,
        number(kernels, x0_dtype),
        inputs[1].address if noise else 0,
        inputs[2].address if flips else 0,
        *shape,
        times,
        mean_coef,
        std,
        seed,
        offset,
        0,
    )
    if flips:
        x0 = torch.where(mirrored[:, None, None], x0.flip(-1), x0)

    def path(compute: torch.dtype, e: Tensor) -> tuple[Tensor, Tensor]:
        clean = x0.to(compute) / 127.5 - 1.0 if x0_dtype == torch.uint8 else x0.to(compute)
        end = mean_coef * clean + std * e.view(shape)
        return end, torch.stack([t * clean + (1.0 - t) * end for t in times])

    exact = path(torch.float64, given.double() if noise else exact_normals(seed, offset, x0.numel()))
    plain = path(torch.float32, given if noise else philox_normal_reference(torch.tensor([seed]), x0.numel(), offset))
    for k, array in enumerate((x_T, i)):
        assert_accurate(array.checked(), plain[k].to(dtype), exact[k])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, torch.float32, *HALVES], ids=str)
def test_path_interpolate_dtypes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, x0_dtype: torch.dtype
) -> None:
    for flips, width in itertools.product((False, True), (8, 5)):
        check_path_interpolate(
            kernels, assert_accurate, dtype=dtype, x0_dtype=x0_dtype, flips=flips, width=width, noise=width == 5
        )


@pytest.mark.parametrize("count", range(1, 9))
def test_path_interpolate_times(kernels: ModuleType, assert_accurate: Callable[..., None], count: int) -> None:
    times = [(k + 1) / count for k in range(count)]
    check_path_interpolate(kernels, assert_accurate, times=times)
    check_path_interpolate(kernels, assert_accurate, times=times, images=1, rows=1, width=7)


@pytest.mark.parametrize(
    "case",
    [
        {"images": 1, "rows": 1, "width": 1},
        {"images": 1, "rows": 1, "width": 6, "times": [0.25]},
        {"offset": 1},
        {"offset": 2, "flips": True},
        {"offset": 3, "shift": 3, "times": [0.25]},  # the head makes up for the addresses
        {"offset": 3, "shift": 3, "times": [0.25], "flips": True},
        {"offset": 2**32 - 2},
        {"offset": 2**35 + 5, "width": 3},
        {"shift": 1, "flips": True},
        {"noise": True},
        {"noise": True, "flips": True, "offset": 1},  # the offset is that of the drawn noise
        {"noise": True, "shift": 1},
        {"images": 5, "rows": 41, "width": 44, "flips": True},  # more than all threads handle at once
    ],
    ids=str,
)
def test_path_interpolate(kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]) -> None:
    check_path_interpolate(kernels, assert_accurate, **case)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_path_interpolate_of_nothing(kernels: ModuleType, shape: tuple[int, int, int]) -> None:
    pretend(kernels)
    out = Array((1,), torch.float32)
    kernels.path_interpolate(out.address, out.address, 0, 0, 4, 0, 0, *shape, [1.0], 0.1, 0.9, 1, 0, 0)
    assert out.checked().isnan().all()


# ---- fir_bias_act ----


class Fir(NamedTuple):
    taps: int
    up: int = 1
    down: int = 1
    pad: int = 0
    flip: bool = False
    gain: float = 1.5


def resample(x: Tensor, filter: Tensor, fir: Fir, size: tuple[int, int]) -> Tensor:
    """FIR(x), channels last, by zeros, padding and a convolution."""
    n, height, width, channels = x.shape
    stuffed = x.new_zeros(n, channels, height * fir.up, width * fir.up)
    stuffed[:, :, :: fir.up, :: fir.up] = x.permute(0, 3, 1, 2)
    needed = [(s - 1) * fir.down + fir.taps for s in size]
    before, crop = max(fir.pad, 0), max(-fir.pad, 0)
    padded = F.pad(stuffed, (before, needed[1], before, needed[0]))[:, :, crop:, crop:][:, :, : needed[0], : needed[1]]
    weight = filter.flip(0, 1) if fir.flip else filter
    y = F.conv2d(padded.flatten(0, 1)[:, None], fir.gain * weight.to(x)[None, None], stride=fir.down)
    return y.view(n, channels, *size).permute(0, 2, 3, 1)


def check_fir_bias_act(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    n: int = 2,
    x_size: tuple[int, int] = (3, 6),
    channels: int = 8,
    dtype: torch.dtype = torch.float32,
    fir: Fir | None = None,
    size: tuple[int, int] | None = None,
    factor: bool = True,
    noise: str | None = None,
    strength: bool = False,
    bias: str | None = "channel",
    slope: float = 0.2,
    gain: float = math.sqrt(2.0),
    clamp: float = math.inf,
    next_factor: bool = False,
    add: bool = False,
    rgb: int = 0,
    out: bool = True,
    in_place: bool = False,
    shift: int = 0,
    shifted: str | None = None,
    threads: int = 32,
) -> None:
    """shifted: the one array that is `shift` elements off alignment; None: all of them."""
    pretend(kernels, processors=1, threads=threads)

    def shift_of(name: str) -> int:
        return shift if name != "seed" and shifted in (None, name) else 0

    size = x_size if size is None else size
    pixels, seed = size[0] * size[1], 2**40 + 9
    rows = {"given": n, "shared": 1}.get(noise or "", 0)
    tensors = {
        "x": torch.randn(n, *x_size, channels).to(dtype),
        "filter": None if fir is None else torch.randn(fir.taps, fir.taps) / fir.taps,
        "factor": torch.randn(n, channels) if factor else None,
        "noise": torch.randn(rows, pixels) if rows else None,
        "seed": torch.tensor([seed]) if noise == "drawn" else None,
        "strength": torch.tensor([-0.7]) if strength else None,
        "bias": None if bias is None else torch.randn(n if bias == "image" else 1, channels),
        "next_factor": torch.randn(n, channels) if next_factor else None,
        "add": torch.randn(n, *size, channels).to(dtype) if add else None,
        "rgb_weight": torch.randn(n, rgb, channels) if rgb else None,
    }
    arrays = {name: Array.of(t, shift_of(name)) for name, t in tensors.items() if t is not None}
    address = {name: array.address for name, array in arrays.items()}
    results = {"rgb": Array((n, *size, rgb), torch.float32, shift_of("rgb"))} if rgb else {}
    if out:
        results["out"] = arrays.pop("x") if in_place else Array((n, *size, channels), dtype, shift_of("out"))
    kernels.fir_bias_act(
        out=results["out"].address if out else 0,
        dtype=number(kernels, dtype),
        size=(n, *size, channels),
        x=address["x"],
        x_size=x_size,
        filter=address.get("filter", 0),
        fir=(1, 1, 1, 0) if fir is None else fir[:4],
        flip=fir is not None and fir.flip,
        fir_gain=1.0 if fir is None else fir.gain,
        factor=address.get("factor", 0),
        noise=address.get("noise", 0),
        noise_stride=pixels if noise == "given" else 0,
        seed=address.get("seed", 0),
        strength=address.get("strength", 0),
        bias=address.get("bias", 0),
        bias_stride=channels if bias == "image" else 0,
        slope=slope,
        gain=gain,
        clamp=clamp,
        next_factor=address.get("next_factor", 0),
        add=address.get("add", 0),
        rgb=results["rgb"].address if rgb else 0,
        rgb_weight=address.get("rgb_weight", 0),
        rgb_channels=rgb,
        stream=0,
    )

    def expected(compute: torch.dtype) -> dict[str, Tensor]:
        t = {name: None if v is None else v.to(compute) for name, v in tensors.items()}
        v = t["x"]
        assert v is not None
        if fir is not None:
            v = resample(v, cast("Tensor", tensors["filter"]), fir, size)
        if t["factor"] is not None:
            v = v * t["factor"][:, None, None]
        normals = t["noise"]
        if noise == "drawn":
            count = n * pixels
            exact = compute == torch.float64
            seeds = torch.tensor([seed])
            normals = exact_normals(seed, 0, count) if exact else philox_normal_reference(seeds, count, 0)
        if normals is not None:
            v = v + (1.0 if t["strength"] is None else t["strength"]) * normals.view(-1, *size, 1)
        if t["bias"] is not None:
            v = v + t["bias"][:, None, None]
        v = (torch.where(v < 0, slope * v, v) * gain).clamp(-clamp, clamp)
        end = v if t["next_factor"] is None else v * t["next_factor"][:, None, None]
        found = {"out": end if t["add"] is None else end + t["add"]}
        if t["rgb_weight"] is not None:
            found["rgb"] = torch.einsum("nhwc,nrc->nhwr", v, t["rgb_weight"])
        return found

    plain, exact = expected(torch.float32), expected(torch.float64)
    for name, array in results.items():
        actual = array.checked()
        assert_accurate(actual, plain[name].to(actual.dtype), exact[name])
    for name, array in arrays.items():
        assert array.checked().equal(cast("Tensor", tensors[name])), name


ODD_AND_VECTORS = [
    {"channels": 1},
    {"channels": 3},
    {"channels": 16},
    {"channels": 24, "shift": 1},
    {"channels": 72, "x_size": (1, 5)},  # lanes beyond the channels
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", ODD_AND_VECTORS, ids=str)
def test_fir_bias_act_shapes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"noise": "drawn", "strength": True, "clamp": 1.5, "next_factor": True, "add": True}
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **options, **shape)
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **options, **shape, fir=Fir(4, pad=2))


@pytest.mark.parametrize(
    "case",
    [
        {"factor": False, "bias": None, "slope": 1.0, "gain": 1.0},  # copies
        {"factor": False, "noise": "given"},
        {"noise": "given", "strength": True, "bias": "image"},
        {"noise": "shared", "strength": True},
        {"noise": "drawn"},
        {"noise": "drawn", "n": 3, "x_size": (1, 1)},
        {"noise": "drawn", "n": 5, "x_size": (3, 3)},  # images begin at every place of a block of normals
        {"clamp": 0.5, "next_factor": True},
        {"gain": 0.3, "slope": 0.0, "add": True},
        {"in_place": True, "noise": "drawn"},
        {"in_place": True, "channels": 5},
        {"in_place": True, "channels": 5, "rgb": 3},
        {"n": 0},
        {"channels": 0},
        {"channels": 0, "rgb": 3},
        {"x_size": (0, 4)},
        {"n": 3, "x_size": (11, 40), "channels": 32, "bias": "image"},  # more than all blocks handle at once
        {"threads": 64, "x_size": (9, 5)},
    ],
    ids=str,
)
def test_fir_bias_act_without_filter(
    kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]
) -> None:
    check_fir_bias_act(kernels, assert_accurate, **case)


FILTERS = [
    ({"fir": Fir(4, pad=1)}, (4, 7)),  # after a transposed convolution
    ({"fir": Fir(4, pad=2, flip=True)}, (7, 8)),
    ({"fir": Fir(4, pad=-1)}, (2, 3)),
    ({"fir": Fir(4, up=2, pad=2)}, (9, 12)),
    ({"fir": Fir(4, up=2, pad=1, flip=True)}, (8, 11)),  # strips begin left of the image
    ({"fir": Fir(4, up=2, pad=-3)}, (4, 7)),
    ({"fir": Fir(4, down=2, pad=1)}, (3, 4)),
    ({"fir": Fir(4, down=2, pad=2, flip=True)}, (3, 4)),
    ({"fir": Fir(4, up=2, down=2, pad=3)}, (5, 7)),
    ({"fir": Fir(1)}, (5, 7)),
    ({"fir": Fir(1, up=2)}, (9, 12)),
    ({"fir": Fir(1, down=2, pad=-1)}, (2, 3)),
    ({"fir": Fir(3, pad=1)}, (5, 7)),
    ({"fir": Fir(3, up=2, pad=2, flip=True)}, (9, 13)),
    ({"fir": Fir(3, up=2, down=2, pad=1)}, (4, 6)),
    ({"fir": Fir(8, pad=3)}, (4, 6)),
    ({"fir": Fir(8, up=2, pad=4, flip=True)}, (9, 13)),
    ({"fir": Fir(8, up=2, pad=5)}, (10, 14)),
    ({"fir": Fir(8, down=2, pad=4)}, (3, 4)),
    ({"fir": Fir(4, pad=20)}, (3, 4)),  # nothing of x
    ({"fir": Fir(4, pad=3), "x_size": (0, 0)}, (3, 3)),
    ({"fir": Fir(4, pad=1), "n": 0}, (4, 7)),
]


@pytest.mark.parametrize(("case", "size"), FILTERS, ids=str)
@pytest.mark.parametrize("channels", [8, 3])
def test_fir_bias_act_with_filter(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    case: dict[str, Any],
    size: tuple[int, int],
    channels: int,
) -> None:
    options = {"x_size": (5, 7), "n": 1, "channels": channels, **case}
    check_fir_bias_act(kernels, assert_accurate, size=size, **options)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_fir_bias_act_filters_halves(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype
) -> None:
    """A filter for each kernel; blocks of several rows, more channels than a block's lanes, more tiles than blocks."""
    options: dict[str, Any] = {"dtype": dtype, "n": 1, "x_size": (6, 9), "noise": "drawn", "threads": 64}
    for case, size in (FILTERS[0], FILTERS[4], FILTERS[6], FILTERS[13]):
        check_fir_bias_act(kernels, assert_accurate, **options, size=size, channels=72, fir=case["fir"])
    options |= {"n": 11, "x_size": (20, 18), "threads": 32}
    check_fir_bias_act(kernels, assert_accurate, **options, size=(19, 17), channels=8, fir=Fir(4, pad=1))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        {"rgb": 1},
        {"rgb": 3, "out": False, "noise": "drawn"},
        {"rgb": 4, "next_factor": True, "clamp": 1.0},
        {"rgb": 3, "channels": 5, "add": True},
        {"rgb": 3, "channels": 40, "shift": 1, "out": False},  # several loops over the lanes
        {"rgb": 2, "channels": 264, "x_size": (1, 3), "next_factor": True},
        {"rgb": 3, "fir": Fir(4, pad=1), "size": (2, 5)},
        {"rgb": 3, "channels": 3, "fir": Fir(3, up=2, pad=2), "size": (5, 11), "out": False},
        {"rgb": 1, "n": 0},
    ],
    ids=str,
)
def test_fir_bias_act_rgb(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, case: dict[str, Any]
) -> None:
    check_fir_bias_act(kernels, assert_accurate, dtype=dtype, **case)


@pytest.mark.parametrize(
    "shifted", ["x", "out", "rgb", "filter", "factor", "noise", "strength", "bias", "next_factor", "add", "rgb_weight"]
)
def test_fir_bias_act_with_one_array_off_alignment(
    kernels: ModuleType, assert_accurate: Callable[..., None], shifted: str
) -> None:
    options: dict[str, Any] = {"noise": "given", "strength": True, "next_factor": True, "add": True, "rgb": 3}
    options |= {"shift": 1, "shifted": shifted, "x_size": (2, 3)}
    check_fir_bias_act(kernels, assert_accurate, **options)
    check_fir_bias_act(kernels, assert_accurate, **options, fir=Fir(4, pad=2), dtype=torch.bfloat16)


def test_fir_bias_act_keeps_what_is_not_finite(kernels: ModuleType) -> None:
    pretend(kernels, processors=1)
    x = Array.of(torch.tensor([math.nan, math.inf, -math.inf, 1.0]).view(1, 1, 1, 4))
    arguments = {"dtype": 0, "size": (1, 1, 1, 4), "x_size": (1, 1), "filter": 0, "fir": (1, 1, 1, 0), "flip": False}
    arguments |= {"fir_gain": 1.0, "noise_stride": 0, "bias_stride": 0, "slope": 0.2, "gain": 1.0, "rgb_channels": 0}
    none = ("factor", "noise", "seed", "strength", "bias", "next_factor", "add", "rgb", "rgb_weight", "stream")
    for clamp, largest in ((math.inf, math.inf), (2.0, 2.0)):
        out = Array((1, 1, 1, 4), torch.float32)
        kernels.fir_bias_act(out=out.address, x=x.address, clamp=clamp, **arguments, **dict.fromkeys(none, 0))
        assert out.checked().flatten()[0].isnan()
        assert out.checked().flatten()[1:].tolist() == [largest, -largest, 1.0]
    with pytest.raises(RuntimeError, match="InvalidValue"):
        kernels.fir_bias_act(
            out=out.address, x=x.address, clamp=1.0, **{**arguments, "dtype": 3}, **dict.fromkeys(none, 0)
        )


# ---- bias_act_backward ----


def check_bias_act_backward(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    *,
    wanted: Sequence[str] = ("grad_x", "sum_u", "sum_ux", "sum_c"),
    n: int = 2,
    pixels: int = 7,
    channels: int = 8,
    parts: int = 1,
    dtype: torch.dtype = torch.float32,
    out: bool = True,
    factor: bool = True,
    slope: float = 0.2,
    gain: float = 1.3,
    clamp: float = 1.0,
    in_place: bool = False,
    shift: int = 0,
    shifted: str | None = None,
    threads: int = 32,
) -> None:
    """shifted: the one array that is `shift` elements off alignment; None: all of them."""
    pretend(kernels, processors=1, threads=threads)

    def shift_of(name: str) -> int:
        return shift if shifted in (None, name) else 0

    result = torch.randn(n, pixels, channels).clamp(-clamp, clamp).to(dtype)
    inputs = {
        "grad": torch.randn(n, pixels, channels).to(dtype),
        "out": result if out else None,
        "x": torch.randn(n, pixels, channels).to(dtype) if "sum_ux" in wanted else None,
        "factor": torch.randn(n, channels) if factor else None,
    }
    shapes = {
        "grad_x": (n, pixels, channels),
        "sum_u": (n, parts, channels),
        "sum_ux": (n, parts, channels),
        "sum_c": (n, pixels),
    }
    arrays = {name: Array.of(t, shift_of(name)) for name, t in inputs.items() if t is not None}
    address = {name: array.address for name, array in arrays.items()}
    results = {w: Array(shapes[w], dtype if w == "grad_x" else torch.float32, shift_of(w)) for w in wanted}
    if in_place:
        results["grad_x"] = arrays.pop("grad")
    kernels.bias_act_backward(
        **{name: results[name].address if name in wanted else 0 for name in shapes},
        dtype=number(kernels, dtype),
        **{name: address.get(name, 0) for name in inputs},
        slope=slope,
        gain=gain,
        clamp=clamp,
        size=(n, pixels, channels),
        parts=parts,
        stream=0,
    )

    def expected(compute: torch.dtype) -> dict[str, Tensor]:
        t = {name: None if v is None else v.to(compute) for name, v in inputs.items()}
        assert t["grad"] is not None
        u = t["grad"] * gain
        if out:
            u = u * torch.where(result > 0, 1.0, slope).to(compute) * (result.double().abs() < clamp)
        length = -(-pixels // parts)

        def sums(v: Tensor) -> Tensor:
            return torch.stack([v[:, k * length : (k + 1) * length].sum(1) for k in range(parts)], 1)

        found = {"grad_x": u if t["factor"] is None else u * t["factor"][:, None], "sum_u": sums(u), "sum_c": u.sum(2)}
        if t["x"] is not None:
            found["sum_ux"] = sums(u * t["x"])
        return found

    plain, exact = expected(torch.float32), expected(torch.float64)
    for name, array in results.items():
        actual = array.checked()
        assert_accurate(actual, plain[name].to(actual.dtype), exact[name])
    for name, array in arrays.items():
        assert array.checked().equal(cast("Tensor", inputs[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", ODD_AND_VECTORS, ids=str)
def test_bias_act_backward_shapes(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    shape = {name: value for name, value in shape.items() if name != "x_size"}
    check_bias_act_backward(kernels, assert_accurate, dtype=dtype, **shape)
    wanted = ("grad_x", "sum_u", "sum_ux")
    check_bias_act_backward(kernels, assert_accurate, dtype=dtype, **shape, wanted=wanted, parts=3)


SUMS = ("grad_x", "sum_u", "sum_ux", "sum_c")


@pytest.mark.parametrize("wanted", [w for k in range(5) for w in itertools.combinations(SUMS, k)], ids=str)
def test_bias_act_backward_wanted(
    kernels: ModuleType, assert_accurate: Callable[..., None], wanted: tuple[str, ...]
) -> None:
    for options in ({"parts": 1}, {"parts": 3, "out": False}, {"parts": 9, "factor": False, "clamp": math.inf}):
        check_bias_act_backward(kernels, assert_accurate, wanted=wanted, channels=12, **options)


@pytest.mark.parametrize(
    "case",
    [
        {"n": 0},
        {"pixels": 0, "parts": 2},
        {"channels": 0},
        {"in_place": True},
        {"in_place": True, "channels": 3, "wanted": ("grad_x",)},
        {"parts": 200, "pixels": 199, "channels": 4, "wanted": ("grad_x", "sum_u", "sum_ux")},  # more tiles than blocks
        {"wanted": ("grad_x",), "pixels": 1500, "channels": 4},  # parts of its own
        {"threads": 64, "channels": 132, "pixels": 5},  # several loops over the channels
        {"threads": 64, "channels": 132, "pixels": 5, "parts": 2, "wanted": ("sum_u", "sum_ux")},
        {"threads": 64, "channels": 3, "pixels": 100},
    ],
    ids=str,
)
def test_bias_act_backward(kernels: ModuleType, assert_accurate: Callable[..., None], case: dict[str, Any]) -> None:
    check_bias_act_backward(kernels, assert_accurate, **case)


@pytest.mark.parametrize("shifted", ["grad_x", "sum_u", "sum_ux", "sum_c", "grad", "out", "x", "factor"])
def test_bias_act_backward_with_one_array_off_alignment(
    kernels: ModuleType, assert_accurate: Callable[..., None], shifted: str
) -> None:
    check_bias_act_backward(kernels, assert_accurate, shift=1, shifted=shifted, dtype=torch.bfloat16)


# ---- rk4_mlp ----

CLUSTER_1 = {"processors": 2, "largest_cluster": 1}
CLUSTER_2 = {"processors": 4, "largest_cluster": 2}
CLUSTER_4 = {"processors": 4, "largest_cluster": 4}
WORKSPACE_1 = {"major": 8, "processors": 1}
WORKSPACE_2 = {"major": 8, "processors": 2}
WORKSPACE_4 = {"major": 8, "processors": 4}


class Problem:
    """Inputs of rk4_mlp, of which the float64 and the plain result are known."""

    def __init__(self, batch: int, dim: int, layers: int, dtype: torch.dtype, activation: str = "silu") -> None:
        generator = torch.Generator().manual_seed(batch + 100 * dim + layers)

        def draw(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(shape, generator=generator)).to(dtype)

        self.dtype, self.activation = dtype, activation
        self.h0 = draw(batch, dim, scale=1.0)
        self.weight = draw(layers, dim, dim, scale=1.2 / math.sqrt(dim))
        self.bias, self.time_weight = draw(layers, dim, scale=0.3), draw(layers, dim, scale=0.3)

    def reference(self, dtype: torch.dtype, times: Sequence[float], steps: int) -> Tensor:
        tensors = (x.to(dtype) for x in (self.h0, self.weight, self.bias, self.time_weight))
        return rk4_mlp_reference(*tensors, times, steps, self.activation)

    def plan(self, kernels: ModuleType) -> dict[str, Any]:
        plan: dict[str, Any] = kernels.rk4_mlp_plan(number(kernels, self.dtype), *self.h0.shape, self.weight.shape[0])
        return plan

    def solve(
        self, kernels: ModuleType, times: Sequence[float], steps: int, *, every_step: bool = False, shift: int = 0
    ) -> Tensor:
        grid = list(step_grid(times, steps))
        ends = [0, *(n + 1 for n, step in enumerate(grid) if step[2])]
        intervals = [(grid[a][0], grid[a][1], b - a) for a, b in itertools.pairwise(ends)]
        out = Array((len(grid) if every_step else len(times), *self.h0.shape), self.dtype, shift)
        inputs = [Array.of(x, shift) for x in (self.h0, self.weight, self.bias, self.time_weight)]
        sizes = (*self.h0.shape, self.weight.shape[0])
        needed = kernels.rk4_mlp_workspace_bytes(number(kernels, self.dtype), *sizes)
        workspace = Array((needed,), torch.uint8)
        kernels.rk4_mlp(
            out.address,
            number(kernels, self.dtype),
            *(x.address for x in inputs),
            *sizes,
            intervals,
            every_step,
            kernels.ACTIVATIONS.index(self.activation),
            0,
            workspace.address if needed else 0,
        )
        workspace.checked()
        for array, value in zip(inputs, (self.h0, self.weight, self.bias, self.time_weight), strict=True):
            torch.testing.assert_close(array.checked(), value, rtol=0, atol=0, equal_nan=True)
        return out.checked()


def assert_rk4(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    problem: Problem,
    times: Sequence[float] = (1.0,),
    steps: int = 1,
    **options: Any,
) -> None:
    actual = problem.solve(kernels, times, steps, **options)
    wanted = (
        times if not options.get("every_step") else [start + length for start, length, _ in step_grid(times, steps)]
    )
    exact, plain = (problem.reference(dtype, wanted, steps) for dtype in (torch.float64, problem.dtype))
    assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(
    ("device", "exchange", "members"),
    [
        (CLUSTER_1, "cluster", 1),
        (CLUSTER_2, "cluster", 2),
        (CLUSTER_4, "cluster", 4),
        (WORKSPACE_1, "workspace", 1),
        (WORKSPACE_4, "workspace", 4),
    ],
)
@pytest.mark.parametrize(("batch", "dim", "layers"), [(1, 16, 1), (3, 48, 2), (17, 16, 3)])
def test_rk4_mlp(
    kernels: ModuleType,
    assert_accurate: Callable[..., None],
    dtype: torch.dtype,
    device: dict[str, int],
    exchange: str,
    members: int,
    batch: int,
    dim: int,
    layers: int,
) -> None:
    pretend(kernels, **device)
    problem = Problem(batch, dim, layers, dtype)
    plan = problem.plan(kernels)
    assert (plan["exchange"], plan["weights"]) == (exchange, "shared")
    assert plan["members"] <= members
    assert (plan["workspace_bytes"] > 0) == (exchange == "workspace")
    if batch == 1:
        assert plan["members"] == members and plan["rows"] == 1
    assert_rk4(kernels, assert_accurate, problem)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("device", [CLUSTER_2, WORKSPACE_2], ids=["cluster", "workspace"])
def test_rk4_mlp_weights_in_global_memory(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, device: dict[str, int]
) -> None:
    pretend(kernels, **device, shared_bytes=8 << 10)
    for batch in (1, 11):
        problem = Problem(batch, 64, 2, dtype)
        assert problem.plan(kernels)["weights"] == "global"
        assert_rk4(kernels, assert_accurate, problem)


@pytest.mark.parametrize("activation", ["silu", "lrelu", "tanh", "softplus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rk4_mlp_activations(
    kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype, activation: str
) -> None:
    pretend(kernels, **CLUSTER_1)
    assert_rk4(kernels, assert_accurate, Problem(2, 16, 2, dtype, activation))


@pytest.mark.parametrize("device", [CLUSTER_2, WORKSPACE_4], ids=["cluster", "workspace"])
@pytest.mark.parametrize("every_step", [False, True])
def test_rk4_mlp_intervals(
    kernels: ModuleType, assert_accurate: Callable[..., None], device: dict[str, int], every_step: bool
) -> None:
    pretend(kernels, **device)
    for batch in (1, 5):
        problem = Problem(batch, 16, 2, torch.float32)
        if every_step:
            # The reference takes the same steps when it is asked for all of them.
            times = [0.25, 0.5, 0.75, 1.0]
            actual = problem.solve(kernels, [0.5, 1.0], 4, every_step=True)
            exact, plain = (problem.reference(dtype, times, 4) for dtype in (torch.float64, torch.float32))
            assert_accurate(actual, plain, exact)
        else:
            assert_rk4(kernels, assert_accurate, problem, [0.3, 0.31, 1.0], 3)


@pytest.mark.parametrize(
    ("device", "rows"),
    [
        ({"processors": 1, "largest_cluster": 1, "shared_bytes": 3600}, 8),
        ({"processors": 1, "largest_cluster": 1, "shared_bytes": 1600}, 1),
        ({"major": 8, "processors": 1, "shared_bytes": 3000}, 8),
        ({"major": 8, "processors": 1, "shared_bytes": 1600}, 1),
    ],
)
def test_rk4_mlp_several_tiles_of_rows(
    kernels: ModuleType, assert_accurate: Callable[..., None], device: dict[str, int], rows: int
) -> None:
    pretend(kernels, **device)
    problem = Problem(3 if rows == 1 else 19, 16, 1, torch.float32)
    plan = problem.plan(kernels)
    assert plan["weights"] == "shared"
    assert plan["exchange"] == ("workspace" if "major" in device else "cluster")
    assert (plan["groups"], plan["rows"]) == (1, rows)
    assert_rk4(kernels, assert_accurate, problem, [0.5, 1.0], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rk4_mlp_several_warps(kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype) -> None:
    for device in (CLUSTER_2, WORKSPACE_4):
        pretend(kernels, **device, threads=96)
        assert_rk4(kernels, assert_accurate, Problem(9, 48, 2, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rk4_mlp_unaligned(kernels: ModuleType, assert_accurate: Callable[..., None], dtype: torch.dtype) -> None:
    for device in (CLUSTER_2, WORKSPACE_4, {**CLUSTER_2, "shared_bytes": 3 << 10}):
        pretend(kernels, **device)
        problem = Problem(2, 32, 2, dtype)
        assert_rk4(kernels, assert_accurate, problem, shift=1)


def test_a_row_depends_on_nothing_but_itself(kernels: ModuleType) -> None:
    """Not on the batch, its neighbours (not even on NaN), nor on how the work is divided."""
    devices = [CLUSTER_1, CLUSTER_4, WORKSPACE_4, {**CLUSTER_2, "shared_bytes": 4 << 10}]
    problem = Problem(10, 32, 2, torch.float32)
    pretend(kernels, **CLUSTER_2)
    expected = problem.solve(kernels, [1.0], 1)
    assert expected.isfinite().all()
    problem.h0[3] = math.nan
    others = [row for row in range(10) if row != 3]
    for device in devices:
        pretend(kernels, **device)
        actual = problem.solve(kernels, [1.0], 1)
        assert actual[:, 3].isnan().all()
        assert actual[:, others].equal(expected[:, others])
    problem.h0 = problem.h0[7:8]
    assert problem.solve(kernels, [1.0], 1).equal(expected[:, 7:8])


def test_rk4_mlp_of_nothing(kernels: ModuleType) -> None:
    pretend(kernels)
    assert Problem(0, 16, 1, torch.float32).solve(kernels, [1.0], 1).shape == (1, 0, 16)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dim": 24}, "InvalidValue"),
        ({"dim": 1040}, "InvalidValue"),
        ({"layers": 9}, "InvalidValue"),
        ({"dtype": 3}, "InvalidValue"),
        ({"intervals": [(0.0, 0.01, 1)] * 65}, "InvalidValue"),
    ],
    ids=str,
)
def test_rk4_mlp_refuses(kernels: ModuleType, change: dict[str, Any], error: str) -> None:
    pretend(kernels)
    arguments = {"dtype": 0, "batch": 1, "dim": 16, "layers": 1, "intervals": [(0.0, 1.0, 1)], "every_step": False}
    addresses = dict.fromkeys(("out", "h0", "weight", "bias", "time_weight"), 0)
    with pytest.raises(RuntimeError, match=error):
        kernels.rk4_mlp(**{**addresses, **arguments, **change}, activation=0, stream=0)


def test_rk4_mlp_refuses_without_workspace(kernels: ModuleType) -> None:
    pretend(kernels, **WORKSPACE_4)
    with pytest.raises(RuntimeError, match="InvalidValue"):
        kernels.rk4_mlp(0, 0, 0, 0, 0, 0, 1, 16, 1, [(0.0, 1.0, 1)], False, 0, 0, 0)
    pretend(kernels, shared_bytes=512)
    with pytest.raises(RuntimeError, match="InvalidConfiguration"):
        kernels.rk4_mlp_plan(0, 1, 64, 1)


# What these report for themselves: multiprocessors, shared memory of a block.
H200 = {"processors": 132, "threads": 1024, "shared_bytes": 232448}
A100 = {"major": 8, "processors": 108, "threads": 1024, "shared_bytes": 166912}


def test_plans_of_real_devices(kernels: ModuleType) -> None:
    """D = 512, L = 3: weights stay on chip, in one pass for few rows."""
    pretend(kernels, **H200)
    plan = kernels.rk4_mlp_plan(0, 8, 512, 3)
    assert plan["exchange"] == "cluster" and plan["weights"] == "shared"
    assert (plan["members"], plan["groups"], plan["rows"], plan["threads"]) == (16, 8, 1, 256)
    plan = kernels.rk4_mlp_plan(0, 100, 512, 3)
    assert (plan["exchange"], plan["weights"], plan["members"], plan["rows"]) == ("cluster", "shared", 16, 8)
    assert kernels.rk4_mlp_plan(0, 100, 1024, 8)["weights"] == "global"  # 32 MiB
    pretend(kernels, **A100)
    plan = kernels.rk4_mlp_plan(0, 8, 512, 3)
    assert (plan["exchange"], plan["weights"]) == ("workspace", "shared")


@pytest.mark.parametrize("device", [H200, A100, {**A100, "processors": 46, "shared_bytes": 101376}])
def test_every_size_has_a_plan(kernels: ModuleType, device: dict[str, int]) -> None:
    pretend(kernels, **device)
    for dim, layers, batch, dtype in itertools.product(range(16, 1025, 16), (1, 3, 8), (1, 100, 4096), (0, 1)):
        plan = kernels.rk4_mlp_plan(dtype, batch, dim, layers)
        assert plan["shared_bytes"] <= device["shared_bytes"]
        assert plan["groups"] * plan["members"] <= device["processors"]
        assert dim % (4 * plan["members"]) == 0


# ---- Races ----


def test_no_races(compiler: str, tmp_path: Path) -> None:
    """ThreadSanitizer sees every access of every CUDA thread and the barriers between them."""
    source, program = tmp_path / "empty.cpp", tmp_path / "empty"
    source.write_text("int main() { return 0; }\n")
    command = [compiler, "-fsanitize=thread", source, "-o", program]
    if any(subprocess.run(c, capture_output=True, check=False).returncode != 0 for c in (command, [program])):
        pytest.skip(f"{compiler} has no ThreadSanitizer that runs here")
    build(tmp_path / "build", "run_kernels", "-DSPIGAN_SANITIZE=thread", "-DSPIGAN_TESTING_MODULE=OFF")
    output = run(tmp_path / "build" / "run_kernels", timeout=300)
    assert "all equal" in output and "ThreadSanitizer" not in output, output
