"""Builds csrc/testing, the CUDA kernels as plain C++: every CUDA thread is a thread of the operating system.

Sizes in the tests are tiny, because a warp shuffle costs 32 context switches here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TESTING = Path(__file__).parents[2] / "csrc" / "testing"
HALVES = (torch.bfloat16, torch.float16)


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
) -> None:
    kernels.set_device(
        major=major,
        processors=processors,
        threads=threads,
        shared_bytes=shared_bytes,
        largest_cluster=largest_cluster,
    )


def number(kernels: ModuleType, dtype: torch.dtype) -> int:
    return int(kernels.DTYPES.index(str(dtype).removeprefix("torch.")))
