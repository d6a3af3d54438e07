"""CMakeLists.txt: what is built with which CUDA compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def configure(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Run CMake, and return its exit status and what it printed, on one line."""
    pybind11 = pytest.importorskip("pybind11")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None:
        pytest.skip("cmake or ninja is missing")
    command = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, timeout=300
    )
    return done.returncode, " ".join(done.stdout.split())


@pytest.fixture
def old_nvcc(tmp_path: Path) -> str:
    """The nvcc of this machine without compute capability 9.0, as before CUDA 11.8."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    script = tmp_path / "nvcc"
    script.write_text(f"""#!/bin/sh
case "$*" in
  --list-gpu-arch) {nvcc} --list-gpu-arch | grep -v compute_90;;
  *compute_90*) echo "nvcc fatal: Unsupported gpu architecture" >&2; exit 1;;
  *) exec {nvcc} "$@";;
esac
""")
    script.chmod(0o755)
    return str(script)


def test_an_nvcc_that_is_too_old_builds_the_cpu_kernels(old_nvcc: str, tmp_path: Path) -> None:
    status, text = configure(tmp_path / "build", CUDACXX=old_nvcc)
    assert status == 0, text
    assert f"spigan: building only the CPU kernels: {old_nvcc} cannot compile for compute capability 9.0" in text


def test_an_nvcc_that_is_too_old_is_an_error_if_cuda_is_required(old_nvcc: str, tmp_path: Path) -> None:
    status, text = configure(tmp_path / "build", "-DSPIGAN_CUDA=ON", CUDACXX=old_nvcc)
    assert status != 0
    assert f"SPIGAN_CUDA=ON, but {old_nvcc} cannot compile for compute capability 9.0. Install CUDA 11.8" in text


def test_an_nvcc_without_compute_capability_8_builds_for_9(old_nvcc: str, tmp_path: Path) -> None:
    script = Path(old_nvcc)
    script.write_text(script.read_text().replace("compute_90", "compute_80"))
    status, text = configure(tmp_path / "build", CUDACXX=old_nvcc)
    assert status == 0, text
    assert ", architectures 90 " in text
