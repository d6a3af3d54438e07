"""Compile the Triton kernels of one operation, named as the argument, on a machine without a GPU.

`test_triton_compile.py` runs this script in a process of its own: Triton gets a driver that names a GPU, and every
launch becomes a compilation. Prints one JSON line for each kernel.
"""

from __future__ import annotations

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from spigan.kernels import fir_bias_act as fir_kernels
from spigan.kernels import modulated_conv2d as conv_kernels
from spigan.kernels.path_interpolate import path_interpolate
from spigan.kernels.philox_normal import philox_normal
from spigan.kernels.rk4_mlp import rk4_mlp

SINGLE, HALF = torch.float32, torch.bfloat16
# The two half types take the same path through the source; both compile for sm_90, one is enough for sm_80.
DTYPES = {80: (SINGLE, HALF), 90: (SINGLE, HALF, torch.float16)}


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps one cache of compiled kernels for each device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


# As of an H200; sm_80 is taken for as large.
conv_kernels.properties = lambda device: (driver.active.get_current_target().arch // 10, 132)

launched: list = []
_run = JITFunction.run


def _compile_only(self, *args, warmup, **kwargs):
    launched.append(_run(self, *args, warmup=True, **kwargs))


JITFunction.run = _compile_only


def compiled(arch: int, host, *args):
    """The kernel that `host(*args)` launches."""
    driver.set_active(AbsentGPU(arch))
    launched.clear()
    host(*args)
    (kernel,) = launched
    return kernel


def resources(kernel) -> dict[str, int]:
    """Registers of a thread and its stack, which holds what they do not, as the machine code has them."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin], check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK")}


def report(name: str, what: str, dtype: torch.dtype, arch: int, host, *args) -> None:
    """Compile what `host(*args)` launches and print a line about it."""
    kernel = compiled(arch, host, *args)
    ptx = kernel.asm["ptx"]
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
    row = {
        "kernel": name,
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "arch": arch,
        "shared": kernel.metadata.shared,
        "narrowest_store": min(int(count or 1) * int(bits) for count, bits in stores),
        "matrix": "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else "none",
        **resources(kernel),
    }
    print(json.dumps(row), flush=True)


def normals(dtype: torch.dtype, offset: int = 0, rows: int = 3, count: int = 3072) -> tuple:
    return torch.empty(rows, count, dtype=dtype), torch.zeros(rows, dtype=torch.int64), offset


def path(x0, dtype, offset=0, noise=None, flips=None, times=(0.5, 1.0), images=4, seed=3) -> tuple:
    shape = (images, 3, 32, 32)
    x_T, i = torch.empty(shape, dtype=dtype), torch.empty(len(times), *shape, dtype=dtype)
    noise = torch.empty(shape) if noise else None
    flips = torch.zeros(images, dtype=torch.bool) if flips else None
    return x_T, i, torch.empty(shape, dtype=x0), noise, flips, times, 0.0066, 0.99998, seed, offset


def ode(dtype, rows=16, dim=512, layers=3, activation="silu", every_step=False, intervals=((0.0, 0.25, 4),)) -> tuple:
    states = sum(count for _, _, count in intervals) if every_step else len(intervals)
    shapes = (states, rows, dim), (rows, dim), (layers, dim, dim), (layers, dim), (layers, dim)
    return *(torch.empty(shape, dtype=dtype) for shape in shapes), intervals, every_step, activation


def given_if(wanted, *shape, dtype=torch.float32) -> torch.Tensor | None:
    """Memory that nothing touches, so that large shapes cost nothing."""
    return torch.empty(shape, dtype=dtype) if wanted else None


def fir_bias_act(dtype, n=4, size=32, channels=512, taps=0, up=1, down=1, pad=1, rgb=0, add=False, seed=1, gain=1.4):
    x, size = torch.empty(n, size, size, channels, dtype=dtype), size * up // down
    shape = (n, size, size)
    drawn = None if seed is None else torch.full((1,), seed)
    tensors = (
        given_if(True, *shape, channels, dtype=dtype), given_if(rgb, *shape, rgb), x, given_if(taps, taps, taps),
        given_if(True, n, channels), given_if(seed is None, *shape), drawn, given_if(True, 1), given_if(True, channels),
        given_if(add, *shape, channels, dtype=dtype), given_if(True, n, channels), given_if(rgb, n, rgb, channels),
    )  # fmt: skip
    options = {"up": up, "down": down, "pad": pad, "flip": True, "fir_gain": gain + 1}
    return tensors, {**options, "slope": 0.2, "gain": gain, "clamp": math.inf if gain > 2 else 256.0}


def bias_act_backward(dtype, n=4, pixels=1024, channels=512, sum_c=True, gain=1.4):
    image, parts = torch.empty(n, pixels, channels, dtype=dtype), -(-pixels // 256)
    sums = given_if(True, n, parts, channels), given_if(True, n, parts, channels), given_if(sum_c, n, pixels)
    tensors = (image, *sums, image, image, image, given_if(True, n, channels))
    return tensors, {"slope": 0.2, "gain": gain, "clamp": 256.0}


def conv2d(dtype, n=100, size=32, channels_in=512, channels=512, rgb=0, seed=1, gain=1.4, kernel=3, tf32=False):
    shape = (n, size, size)
    tensors = (
        given_if(True, *shape, channels, dtype=dtype), given_if(rgb, *shape, rgb),
        given_if(True, *shape, channels_in, dtype=dtype),
        given_if(True, kernel, kernel, channels, channels_in, dtype=dtype),
        given_if(True, n, channels), given_if(seed is None, n, size, size),
        None if seed is None else torch.full((1,), seed), given_if(True, 1), given_if(True, channels),
        given_if(True, n, channels), given_if(rgb, n, rgb, channels),
    )  # fmt: skip
    end = {"slope": 0.2, "gain": gain, "clamp": math.inf if gain > 2 else 256.0}
    return tensors, {"padding": kernel // 2, **end, "tf32": tf32}


def transposed_conv2d(dtype, n=100, size=16, channels_in=512, channels=512, tf32=False):
    y, x = (n, 2 * size + 1, 2 * size + 1, channels), (n, size, size, channels_in)
    return tuple(given_if(True, *shape, dtype=dtype) for shape in (y, x, (3, 3, channels, channels_in))), {"tf32": tf32}


def layer(host, what: str, dtype: torch.dtype, arch: int, arguments: tuple) -> None:
    tensors, options = arguments
    report(host.__name__, what, dtype, arch, functools.partial(host, **options), *tensors)


def philox_normal_kernels(arch: int) -> None:
    for dtype in DTYPES[arch]:
        report("philox_normal", "", dtype, arch, philox_normal, *normals(dtype))
    report("philox_normal", "offset 1", SINGLE, arch, philox_normal, *normals(SINGLE, offset=1))


def path_interpolate_kernels(arch: int) -> None:
    for dtype in DTYPES[arch]:
        report("path_interpolate", "uint8", dtype, arch, path_interpolate, *path(torch.uint8, dtype))
        report("path_interpolate", "flips", dtype, arch, path_interpolate, *path(dtype, dtype, flips=True))
    eight = tuple(k / 8 for k in range(1, 9))
    for what, options in (("offset 1", {"offset": 1}), ("noise", {"noise": True}), ("8 times", {"times": eight})):
        report("path_interpolate", what, SINGLE, arch, path_interpolate, *path(torch.uint8, SINGLE, **options))


def rk4_mlp_kernels(arch: int) -> None:
    # Without a GPU choose_blocks counts one multiprocessor: more than 16 rows (64 in float32) go into blocks of 64.
    for dtype in DTYPES[arch]:
        report("rk4_mlp", "16 rows", dtype, arch, rk4_mlp, *ode(dtype))
        report("rk4_mlp", "64 rows", dtype, arch, rk4_mlp, *ode(dtype, rows=80))
    report("rk4_mlp", "softplus, 64 rows", HALF, arch, rk4_mlp, *ode(HALF, rows=80, activation="softplus"))
    report("rk4_mlp", "tanh, every step", HALF, arch, rk4_mlp, *ode(HALF, activation="tanh", every_step=True))
    report("rk4_mlp", "64 intervals", HALF, arch, rk4_mlp, *ode(HALF, intervals=((0.0, 0.25, 4),) * 64))
    report("rk4_mlp", "D = 48", HALF, arch, rk4_mlp, *ode(HALF, dim=48))


def fir_bias_act_kernels(arch: int) -> None:
    fir, backward = fir_kernels.fir_bias_act, fir_kernels.bias_act_backward
    for dtype in DTYPES[arch]:
        layer(fir, "pointwise", dtype, arch, fir_bias_act(dtype))
        layer(fir, "pointwise, rgb", dtype, arch, fir_bias_act(dtype, rgb=3))
        layer(fir, "up", dtype, arch, fir_bias_act(dtype, taps=4, up=2))
        layer(fir, "up, rgb", dtype, arch, fir_bias_act(dtype, taps=4, up=2, rgb=3))
        layer(fir, "down", dtype, arch, fir_bias_act(dtype, taps=4, down=2))
        layer(fir, "up, C = 3, add", dtype, arch, fir_bias_act(dtype, channels=3, taps=4, up=2, add=True, seed=None))
        layer(fir, "8 taps", dtype, arch, fir_bias_act(dtype, taps=8))
        layer(backward, "sums", dtype, arch, bias_act_backward(dtype))
        layer(backward, "sums, but of C", dtype, arch, bias_act_backward(dtype, sum_c=False))
        layer(backward, "C = 3", dtype, arch, bias_act_backward(dtype, channels=3))


def modulated_conv2d_kernels(arch: int) -> None:
    conv, transposed = conv_kernels.conv2d, conv_kernels.transposed_conv2d
    for dtype in DTYPES[arch]:
        layer(conv, "32x32", dtype, arch, conv2d(dtype))
        layer(conv, "32x32, rgb", dtype, arch, conv2d(dtype, rgb=3))
        layer(conv, "4x4, rgb", dtype, arch, conv2d(dtype, size=4, rgb=3))
        layer(conv, "1 image 4x4", dtype, arch, conv2d(dtype, n=1, size=4))
        layer(conv, "C = 37", dtype, arch, conv2d(dtype, channels_in=37, channels=37))
        layer(transposed, "16x16", dtype, arch, transposed_conv2d(dtype))
        layer(transposed, "1 image 4x4", dtype, arch, transposed_conv2d(dtype, n=1, size=4))
        layer(transposed, "C = 37", dtype, arch, transposed_conv2d(dtype, channels_in=37, channels=37))
    layer(conv, "32x32, TF32", SINGLE, arch, conv2d(SINGLE, tf32=True))
    layer(conv, "32x32, rgb, TF32", SINGLE, arch, conv2d(SINGLE, rgb=3, tf32=True))
    layer(conv, "1 image 4x4, TF32", SINGLE, arch, conv2d(SINGLE, n=1, size=4, tf32=True))
    layer(conv, "C = 37, TF32", SINGLE, arch, conv2d(SINGLE, channels_in=37, channels=37, tf32=True))
    layer(transposed, "16x16, TF32", SINGLE, arch, transposed_conv2d(SINGLE, tf32=True))
    layer(transposed, "C = 37, TF32", SINGLE, arch, transposed_conv2d(SINGLE, channels_in=37, channels=37, tf32=True))


def count_compiled(host, arguments, variants: tuple[dict[str, object], ...]) -> None:
    """Print how many kernels `host` needs for calls that differ as training and sampling change them.

    It should be one: otherwise a run would stop to compile.
    """
    kernels = set()
    for changed in variants:
        given = arguments(**changed)
        tensors, options = given if isinstance(given[-1], dict) else (given, {})
        kernels.add(id(compiled(90, functools.partial(host, **options), *tensors)))
    print(json.dumps({"kernel": host.__name__, "variants": len(variants), "compiled": len(kernels)}), flush=True)


ENDS = ({}, {"n": 50}, {"seed": 2**40}, {"gain": 1.0}, {"gain": 3.0})
PATHS = (
    {}, {"seed": 1}, {"seed": 2**40}, {"offset": 4}, {"offset": 2**40}, {"images": 1}, {"times": (0.1, 0.2)},
)  # fmt: skip
NORMALS = ({}, {"offset": 4}, {"offset": 16}, {"offset": 2**40}, {"rows": 1}, {"rows": 1, "count": 2**20})
ODES = ({}, {"rows": 1}, {"rows": 7}, {"layers": 1}, {"dim": 1024}, {"intervals": ((0.0, 0.5, 1), (0.5, 0.03125, 16))})
BACKWARDS = ({}, {"n": 1}, {"gain": 1.0}, {"pixels": 256}, {"pixels": 2**16})
VARIANTS = {
    "philox_normal": [(philox_normal, functools.partial(normals, SINGLE), NORMALS)],
    "path_interpolate": [(path_interpolate, functools.partial(path, torch.uint8, SINGLE), PATHS)],
    "rk4_mlp": [(rk4_mlp, functools.partial(ode, HALF), ODES)],
    "fir_bias_act": [
        (fir_kernels.fir_bias_act, functools.partial(fir_bias_act, HALF), (*ENDS, {"n": 1})),
        (
            fir_kernels.fir_bias_act,
            functools.partial(fir_bias_act, HALF, taps=4, up=2, rgb=3),
            (*ENDS, {"pad": 2}, {"n": 1}),
        ),
        (fir_kernels.bias_act_backward, functools.partial(bias_act_backward, HALF), BACKWARDS),
    ],
    "modulated_conv2d": [
        (conv_kernels.conv2d, functools.partial(conv2d, HALF), (*ENDS, {"size": 64})),
        (conv_kernels.transposed_conv2d, functools.partial(transposed_conv2d, HALF), ({}, {"n": 101}, {"size": 32})),
    ],
}

operation = sys.argv[1]
for arch in DTYPES:
    globals()[f"{operation}_kernels"](arch)
for host, arguments, variants in VARIANTS[operation]:
    count_compiled(host, arguments, variants)
