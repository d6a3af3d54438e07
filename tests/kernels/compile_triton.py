"""Compiles the Triton kernels as their host functions would launch them, on a machine without a GPU.

A process of its own, which `test_triton_compile.py` starts: Triton gets a driver that names a GPU that is not there,
and every launch is made a compilation. Prints one JSON line for each kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from spigan.kernels.path_interpolate import path_interpolate
from spigan.kernels.philox_normal import philox_normal
from spigan.kernels.rk4_mlp import rk4_mlp

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ARCHITECTURES = (80, 90)


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


for arch in ARCHITECTURES:
    for dtype in FLOATS:
        report("philox_normal", "", dtype, arch, philox_normal, *normals(dtype))
        report("path_interpolate", "uint8", dtype, arch, path_interpolate, *path(torch.uint8, dtype))
        report("path_interpolate", "flips", dtype, arch, path_interpolate, *path(dtype, dtype, flips=True))
        # On no GPU choose_blocks counts one multiprocessor: more rows than 16 (64 in float32) are taken by 64.
        report("rk4_mlp", "16 rows", dtype, arch, rk4_mlp, *ode(dtype))
        report("rk4_mlp", "64 rows", dtype, arch, rk4_mlp, *ode(dtype, rows=80))
    half, single = torch.bfloat16, torch.float32
    report("philox_normal", "offset 1", single, arch, philox_normal, *normals(single, offset=1))
    report("path_interpolate", "offset 1", single, arch, path_interpolate, *path(torch.uint8, single, offset=1))
    report("path_interpolate", "noise", single, arch, path_interpolate, *path(torch.uint8, single, noise=True))
    eight = tuple(k / 8 for k in range(1, 9))
    report("path_interpolate", "8 times", single, arch, path_interpolate, *path(torch.uint8, single, times=eight))
    report("rk4_mlp", "softplus, 64 rows", half, arch, rk4_mlp, *ode(half, rows=80, activation="softplus"))
    report("rk4_mlp", "tanh, every step", half, arch, rk4_mlp, *ode(half, activation="tanh", every_step=True))
    report("rk4_mlp", "64 intervals", half, arch, rk4_mlp, *ode(half, intervals=((0.0, 0.25, 4),) * 64))
    report("rk4_mlp", "D = 48", half, arch, rk4_mlp, *ode(half, dim=48))

# What changes from call to call must not compile anew: training and sampling would wait for it.
calls = {
    philox_normal: [normals(single, *a) for a in ((0,), (4,), (16,), (2**40,), (0, 1), (0, 1, 2**20))],
    path_interpolate: [
        path(torch.uint8, single, **changed)
        for changed in (
            {},
            {"seed": 1},
            {"seed": 2**40},
            {"offset": 4},
            {"offset": 2**40},
            {"images": 1},
            {"times": (0.1, 0.2)},
        )
    ],
    rk4_mlp: [
        ode(half, **changed)
        for changed in (
            {},
            {"rows": 1},
            {"rows": 7},
            {"layers": 1},
            {"dim": 1024},
            {"intervals": ((0.0, 0.5, 1), (0.5, 0.03125, 16))},
        )
    ],
}
for host, variants in calls.items():
    kernels = {id(compiled(90, host, *arguments)) for arguments in variants}
    print(json.dumps({"kernel": host.__name__, "variants": len(variants), "compiled": len(kernels)}), flush=True)
