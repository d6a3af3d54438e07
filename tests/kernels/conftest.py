"""Fixtures of the kernels' tests; makes the shared modules of this folder importable."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from cuda_on_cpu import build, find


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
    options = (f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}")
    # The workers of pytest-xdist share one build: the first builds, the others wait for the lock and find the result.
    shared = (
        tmp_path_factory.getbasetemp().parent
        if "PYTEST_XDIST_WORKER" in os.environ
        else tmp_path_factory.mktemp("kernels")
    )
    folder = shared / "cuda_on_cpu"
    with (shared / "cuda_on_cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.glob("_cuda_on_cpu*")):
            build(folder, "_cuda_on_cpu", *options)
    (path,) = folder.glob("_cuda_on_cpu*")
    spec = spec_from_file_location("_cuda_on_cpu", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _float32_is_float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """cuDNN's convolutions do not round float32 to TF32 (nor do matrix products, unless asked to)."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
