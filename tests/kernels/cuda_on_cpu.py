"""Builds csrc/testing, the CUDA kernels as plain C++: every CUDA thread is a thread of the operating system.

Sizes in the tests are tiny, because a warp shuffle costs 32 context switches here.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan.ops.philox_normal import philox4x32_10

TESTING = Path(__file__).parents[2] / "csrc" / "testing"
HALVES = (torch.bfloat16, torch.float16)
NORMAL_ERROR = 7.4e-6
"""Most that a drawn normal differs from the definition in float64, as csrc/cuda/box_muller.h states."""


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


def pretend(
    kernels: ModuleType,
    *,
    major: int = 9,
    processors: int = 4,
    threads: int = 32,
    shared_bytes: int = 232448,
    largest_cluster: int = 16,
    driver: int = 13000,
    matrix_only: bool = False,
) -> None:
    kernels.set_device(
        major=major,
        processors=processors,
        threads=threads,
        shared_bytes=shared_bytes,
        largest_cluster=largest_cluster,
        driver=driver,
        matrix_only=matrix_only,
    )


def number(kernels: ModuleType, dtype: torch.dtype) -> int:
    return int(kernels.DTYPES.index(str(dtype).removeprefix("torch.")))


def exact_box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of words in float64; the uniform numbers are those of float32."""
    u1 = (word0.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    return torch.sqrt(-2.0 * torch.log(u1)), 2.0 * math.pi * (word1.to(torch.float32) * 2.0**-32).double()


def exact_normals(seed: int, offset: int, count: int) -> Tensor:
    """Elements offset .. offset + count - 1 of a stream in float64; the uniform numbers are those of float32."""
    elements = [(offset + j) % 2**64 for j in range(count)]
    low, high = (torch.tensor([(e // 4 >> bits) & 0xFFFFFFFF for e in elements]) for bits in (0, 32))
    zero = torch.zeros_like(low)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32 & 0xFFFFFFFF))
    words = torch.stack(philox4x32_10((low, high, zero, zero), key))
    lane = torch.tensor([e % 4 for e in elements])
    rows = torch.arange(count)
    radius, angle = exact_box_muller(words[lane // 2 * 2, rows], words[lane // 2 * 2 + 1, rows])
    return radius * torch.where(lane % 2 == 0, torch.cos(angle), torch.sin(angle))


ODD_AND_VECTORS = [
    {"channels": 1},
    {"channels": 3},
    {"channels": 16},
    {"channels": 24, "shift": 1},
    {"channels": 72, "x_size": (1, 5)},  # lanes beyond the channels
]
