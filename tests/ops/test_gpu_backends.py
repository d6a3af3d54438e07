"""spigan.ops.backends on a GPU that is not there: when the kernels can run, and that compilers can trace the choice."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from spigan import info, ops
from spigan.ops import BackendUnavailable, backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RUNS = {"error": None, "driver": 13000, "runtime": 13000}
OLD_DRIVER = {"error": "cudaErrorInsufficientDriver: too old", "driver": 12040, "runtime": 13000}
NO_CODE = {"error": "cudaErrorNoKernelImageForDevice: no image", "driver": 13000, "runtime": 13000}


class Build:
    """A build of the extension with CUDA, on a machine with two GPUs. `found` is what its probe finds."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = RUNS
        self.calls: list[str] = []
        self.cuda = SimpleNamespace(probe=torch.compiler.disable(self.probe))  # no compiler traces the real one

    def probe(self) -> dict[str, Any]:
        self.calls.append("probe")
        return self.found

    def build_info(self) -> dict[str, Any]:
        raise AssertionError("it is read when spigan is imported: a compiler cannot trace this call")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)
    build = Build()

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            build.calls.append(f"cuda:{self.index}")

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(backends, "_extension", build)
    monkeypatch.setattr(
        backends, "_build", {"cuda": True, "cuda_version": "13.0.88", "cuda_architectures": ["80-real", "90"]}
    )
    monkeypatch.setattr(backends, "_capabilities", {0: (9, 0), 1: (7, 5)})
    monkeypatch.setattr(backends, "_extension_causes", {})
    monkeypatch.setattr(backends, "_TRITON", True)
    return build


# ---- When they can run ----


@pytest.mark.parametrize(
    ("installed", "interpret", "rocm", "device", "cause"),
    [
        (False, True, False, "cpu", "the package triton is not installed"),
        (False, False, False, "cuda", "the package triton is not installed"),
        (True, False, False, "cpu", "it runs on CUDA devices, not on cpu"),
        (True, True, False, "cpu", None),
        (True, True, False, "meta", "it runs on CUDA devices, not on meta"),
        (True, False, False, "cuda", None),
        (True, False, False, "cuda:1", "it needs compute capability 8.0 or higher, cuda:1 has 7.5"),
        (True, False, True, "cuda", "it runs on NVIDIA's GPUs, and this torch is built for ROCm"),
    ],
)
def test_where_triton_runs(
    build: Build, installed: bool, interpret: bool, rocm: bool, device: str, cause: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(backends, "_TRITON", installed)
    monkeypatch.setattr(backends, "_TRITON_INTERPRET", interpret)
    monkeypatch.setattr(backends, "_ROCM", rocm)
    assert backends.triton_on_gpu(torch.device(device)) == cause


def test_where_cuda_runs(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.cuda_on_gpu(CUDA) is None
    assert backends.cuda_on_gpu(CPU) == "it runs on CUDA devices, not on cpu"
    assert "it needs compute capability 8.0 or higher" in str(backends.cuda_on_gpu(torch.device("cuda:1")))
    monkeypatch.setattr(backends, "_ROCM", True)
    assert backends.cuda_on_gpu(CUDA) == "it runs on NVIDIA's GPUs, and this torch is built for ROCm"
    monkeypatch.setattr(backends, "_build", {"cuda": False})
    assert str(backends.cuda_on_gpu(CUDA)).startswith("spigan._C was built without CUDA: put nvcc on PATH")
    monkeypatch.setattr(backends, "_extension", None)
    monkeypatch.setattr(backends, "_extension_cause", "it is gone")
    assert backends.cuda_on_gpu(CUDA) == "it is gone"


def test_a_driver_is_asked_once_for_each_device(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(index: int) -> tuple[int, int]:
        build.calls.append(f"capability of {index}")
        return (9, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(backends, "_capabilities", {})
    for device in ("cuda", "cuda:0", "cuda:1", "cuda:1"):
        for available in (backends.triton_on_gpu, backends.cuda_on_gpu):
            assert available(torch.device(device)) is None
    assert build.calls == ["capability of 0", "cuda:0", "probe", "capability of 1", "cuda:1", "probe"]


@pytest.mark.parametrize(
    ("found", "advice"), [(OLD_DRIVER, "Update the driver"), (NO_CODE, "Reinstall spigan for this GPU")]
)
def test_kernels_that_do_not_load_leave_their_place_to_triton(
    build: Build, found: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.found = found
    driver = backends.cuda_version(found["driver"])
    cause = (
        f"its kernels do not load on cuda:0 ({found['error']}): spigan._C was built with CUDA 13.0.88 for 80-real, 90, "
        f"the driver supports CUDA {driver}. {advice}"
    )
    for op in backends.operations():
        assert backends.choose(op, None, CUDA) == "triton"
        with pytest.raises(BackendUnavailable, match=f"{op}: backend 'cuda'") as error:
            backends.choose(op, "cuda", CUDA)
        assert cause in str(error.value)
    monkeypatch.setattr(backends, "_TRITON", False)
    assert backends.choose("rk4_mlp", None, CUDA) == "reference"
    assert build.calls == ["cuda:0", "probe"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    report = info.report()
    assert f"    cuda cannot run: {cause}" in report.split("backends on cuda:")[1]


def test_an_extension_that_cannot_be_asked_is_not_used(build: Build) -> None:
    del build.cuda.probe  # of an older version, still installed
    assert backends.choose("rk4_mlp", None, CUDA) == "triton"
    cause = str(backends.cuda_on_gpu(CUDA))
    assert cause.startswith("spigan._C cannot be asked for its CUDA kernels (AttributeError: ")


# ---- Compilers ----


def operations() -> dict[str, Callable[[], Tensor]]:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, device=CUDA, dtype=dtype)

    maps, kernel, style, seeds = empty(2, 8, 6, 5), empty(4, 8, 3, 3), empty(2, 8), empty(3, dtype=torch.int64)
    square, vector, filter = empty(2, 16, 16), empty(2, 16), empty(4, 4)
    return {
        "philox_normal": lambda: ops.philox_normal((3, 4), seed=seeds),
        "path_interpolate": lambda: ops.path_interpolate(maps, [0.3, 1.0], seed=7)[1],
        "rk4_mlp": lambda: ops.rk4_mlp(vector, square, vector, vector, [1.0]),
        "modulated_conv2d": lambda: ops.modulated_conv2d(maps, kernel, style, up=2, resample_filter=filter),
        "fir_bias_act": lambda: ops.fir_bias_act(maps, activation="lrelu"),
    }


@pytest.mark.parametrize("op", backends.operations())
@pytest.mark.parametrize("found", [RUNS, NO_CODE], ids=["cuda", "triton"])
def test_a_graph_stays_whole_with_a_build_with_cuda(build: Build, op: str, found: dict[str, Any]) -> None:
    """torch.compile traces the choice, and with it everything that decides whether the kernels can run."""
    build.found = found
    chosen: list[Any] = []

    def record(graph: torch.fx.GraphModule, inputs: object) -> Any:
        chosen.extend(node.args[-1] for node in graph.graph.nodes if "spigan." in str(node.target))
        return graph.forward

    torch.compiler.reset()
    with FakeTensorMode():
        result = torch.compile(operations()[op], fullgraph=True, backend=record)()
    assert result.is_cuda
    assert set(chosen) == {"cuda" if found is RUNS else "triton"}
    assert build.calls == ["cuda:0", "probe"]
