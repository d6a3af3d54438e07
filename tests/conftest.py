"""What all tests share: a fixed seed, memory that shows what was left unwritten, and the rule for rounding errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spigan import _C
from spigan.ops import backends, frozen_layer, layer_weights

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads only wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start
    torch.set_num_threads(1)

os.environ["SPIGAN_AUTOTUNE"] = "0"  # tests that measure say so

# The first example of a test may compile or load something; a deadline would fail it on a busy machine.
settings.register_profile("spigan", deadline=None)
settings.load_profile("spigan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """set_threads(n): torch's number of threads, which the C++ kernels take, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=_C.build_info()["cpu_isas"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that this CPU has, which the C++ kernels then use."""
    _C.select_cpu_isa(request.param)
    yield request.param
    _C.select_cpu_isa(None)


@pytest.fixture
def added_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends that the test adds are gone after it."""
    copy = {op: dict(by_backend) for op, by_backend in backends.implementations.items()}
    monkeypatch.setattr(backends, "implementations", copy)
    monkeypatch.setattr(backends, "auto_order", dict(backends.auto_order))


@pytest.fixture(params=["library's", "own"])
def convolutions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test with the library's convolutions, a few images at a time, and with our matrix products on the CPU.

    Otherwise `modulated_conv2d` chooses by size, and images as small as the tests' would never meet some of them.
    """
    own = request.param == "own"
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_TILES", 1 if own else sys.maxsize)
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_TILES_KEPT", 1 if own else sys.maxsize)
    monkeypatch.setattr(layer_weights, "WINOGRAD_MIN_CHANNELS", 1)
    monkeypatch.setattr(layer_weights, "PRODUCTS_MAX_PIXELS", sys.maxsize if own else 0)
    monkeypatch.setattr(layer_weights, "PRODUCTS_MIN_CHANNELS", sys.maxsize)
    # Some of the tests' products are larger and some are not.
    monkeypatch.setattr(frozen_layer, "ONEDNN_MIN_PRODUCTS", 1000)
    monkeypatch.setattr(frozen_layer, "MIN_PART_BYTES", 1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN instead of whatever was there, so that an element never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _assert_accurate(actual: Tensor, plain: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    assert actual.dtype == plain.dtype
    assert actual.shape == plain.shape == exact.shape
    assert exact.dtype == torch.float64
    if exact.numel() == 0:
        return

    def error(value: Tensor) -> float:
        return (value.detach().double() - exact).abs().max().item()

    assert exact.isfinite().all() and plain.isfinite().all(), "the references themselves overflow"
    if actual.dtype == torch.float64:
        slack = 100.0  # the reference itself is only that exact
    floor = slack * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    # Written so that a NaN fails.
    assert error(actual) <= 2.0 * error(plain) + floor, (
        f"{error(actual):.3e} against {error(plain):.3e} in plain PyTorch"
    )


@pytest.fixture(scope="session")
def assert_accurate() -> Callable[..., None]:
    """assert_accurate(actual, plain, exact): error(actual) <= 2 error(plain) + 2 eps max|exact|.

    `plain` is plain PyTorch in the dtype of `actual`, `exact` the same in float64.
    """
    return _assert_accurate


class _Kernels(TorchDispatchMode):
    """Notes (operator, backend) of every kernel of this project that runs inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "spigan":
            bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | (kwargs or {})
            self.calls.append((name, bound.get("backend", "")))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def noted_kernels() -> _Kernels:
    """`with noted_kernels:` notes in `noted_kernels.calls` which operators of the project run, and on which backend."""
    return _Kernels()
