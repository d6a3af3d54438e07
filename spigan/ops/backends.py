"""Choose the backend that runs an operation.

A backend that is requested by name runs or raises `BackendUnavailable`; with "auto" the next one may take over.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

KERNELS = ("cpp", "triton", "cuda")
"""The backends whose kernels are operators of torch.library (see spigan/ops/operation.py)."""

BACKENDS = ("reference", *KERNELS)
"""Every name that `backend=` accepts, besides "auto" and the names added by `register_backend`."""


class BackendUnavailable(RuntimeError):
    """The requested backend cannot run this operation here; the message says why."""


class Implementation(NamedTuple):
    """One backend's implementation of an operation.

    Attributes:
        unavailable: Returns why the backend cannot run on a device, or None if it can.
        function: Called like the operation's reference; None for a kernel, which torch.library calls.
    """

    unavailable: Callable[[torch.device], str | None]
    function: Callable[..., Any] | None = None


implementations: dict[str, dict[str, Implementation]] = {}
"""By operation and backend."""

auto_order = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
"""The backends that "auto" tries, by type of device. Other types run the reference."""

_override: list[list[str]] = []  # of `use_backend`, innermost last; each block removes its own entry


def register(
    op: str,
    backend: str,
    unavailable: Callable[[torch.device], str | None],
    function: Callable[..., Any] | None = None,
) -> None:
    """Declare that `backend` implements `op`; see `Implementation`."""
    implementations.setdefault(op, {})[backend] = Implementation(unavailable, function)


def register_backend(
    name: str,
    functions: Mapping[str, Callable[..., Any]],
    *,
    unavailable: Callable[[torch.device], str | None] | None = None,
    auto: Sequence[str] = (),
) -> None:
    """Add your own backend. `backend=`, `use_backend` and SPIGAN_BACKEND then accept its name.

    Each function is called like the operation's reference (for example `spigan.ops.rk4_mlp.rk4_mlp_reference`). Its
    arguments have been checked, and all defaults are filled in. It must return what the reference returns, and must
    provide its own derivatives if the result needs any. Registering a name again replaces that backend.

    Args:
        name: Name of the backend; neither "auto" nor one of `BACKENDS`.
        functions: The operations that it implements, by name: {"rk4_mlp": function}. If another operation is requested
            from this backend by name, it raises `BackendUnavailable`.
        unavailable: Returns why the backend cannot run on a device, or None if it can. By default it runs on all
            devices.
        auto: Device types ("cpu", "cuda", ...) on which "auto" prefers this backend to all others.

    Raises:
        TypeError, ValueError: The name is taken, an operation does not exist, its value is not a function, or `auto` is
            not a list of device types.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a backend's name must be an identifier, got {name!r}")
    if name in ("auto", *BACKENDS):
        raise ValueError(f"{name!r} is one of spigan's own backends: choose another name")
    if not functions:
        raise ValueError(f"the backend {name!r} must implement at least one operation: {', '.join(implementations)}")
    for op, function in functions.items():
        if op not in implementations:
            raise ValueError(f"unknown operation {op!r}; expected one of {', '.join(implementations)}")
        if not callable(function):
            raise TypeError(f"the backend {name!r} needs a function for {op}, got {type(function).__name__}")
    if isinstance(auto, str) or not all(isinstance(kind, str) and kind.isidentifier() for kind in auto):
        raise ValueError(f'auto must be a list of device types, such as ["cpu", "cuda"], got {auto!r}')
    for by_backend in implementations.values():
        by_backend.pop(name, None)
    for op, function in functions.items():
        register(op, name, unavailable or always_available, function)
    for kind in {*auto_order, *auto}:
        others = tuple(other for other in auto_order.get(kind, ("reference",)) if other != name)
        auto_order[kind] = (name, *others) if kind in auto else others


def function(op: str, backend: str) -> Callable[..., Any] | None:
    """Return the Python function with which `backend` implements `op`; None if it is a kernel or missing."""
    implementation = implementations[op].get(backend)
    return None if implementation is None else implementation.function


def operations() -> tuple[str, ...]:
    """Return the names of all operations."""
    return tuple(implementations)


def _names() -> tuple[str, ...]:
    """Return `BACKENDS` and the names that were added."""
    return tuple(dict.fromkeys((*BACKENDS, *(name for by_backend in implementations.values() for name in by_backend))))


def _check_name(backend: str, source: str) -> str:
    if backend != "auto" and backend not in BACKENDS and backend not in _names():
        raise ValueError(f"{source} names the backend {backend!r}; expected one of {', '.join(('auto', *_names()))}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operation inside the `with` block on `backend`. The `backend` argument of a call takes precedence.

    The choice applies to the whole process, so that it also holds in autograd's and other threads.

    Args:
        backend: "auto", one of `BACKENDS`, or a name added by `register_backend`.
    """
    entry = [_check_name(backend, "use_backend")]
    _override.append(entry)
    try:
        yield
    finally:
        # By identity: blocks of several threads may end in any order.
        _override[:] = [other for other in _override if other is not entry]


def requested(backend: str | None = None) -> tuple[str, str]:
    """Return the requested backend and where the request comes from.

    The argument comes first, then `use_backend`, then SPIGAN_BACKEND, then "auto".

    Args:
        backend: The `backend` argument of the call.

    Returns:
        (backend, source of the request).
    """
    if backend is not None:
        return _check_name(backend, "backend="), "the argument backend="
    if _override:
        return _override[-1][0], "use_backend"
    if name := os.environ.get("SPIGAN_BACKEND"):
        return _check_name(name, "SPIGAN_BACKEND"), "SPIGAN_BACKEND"
    return "auto", "default"


def why_unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """Return why `backend` cannot run `op` on `device`, or None if it can."""
    by_backend = implementations[op]
    if backend not in by_backend:
        return f"this version of spigan has no {backend} implementation of {op} (it has: {', '.join(by_backend)})"
    return by_backend[backend].unavailable(device)


def unlimited(backend: str) -> str | None:
    """`limit` of operations whose backends all accept the same arguments."""
    return None


def choose(op: str, backend: str | None, device: torch.device, limit: Callable[[str], str | None] = unlimited) -> str:
    """Return the name of the backend that runs `op` on `device`.

    Args:
        op: Name of the operation.
        backend: The `backend` argument of the call.
        device: Device of the tensors.
        limit: Returns why a backend does not accept this call's arguments, or None if it does.

    Raises:
        BackendUnavailable: `backend` was requested by name and cannot run.
    """
    name, source = requested(backend)
    if name == "auto":
        for candidate in auto_order.get(device.type, ("reference",)):  # ends with the reference, which always runs
            if why_unavailable(op, candidate, device) is None and limit(candidate) is None:
                return candidate
    if (cause := why_unavailable(op, name, device) or limit(name)) is not None:
        raise BackendUnavailable(f"{op}: backend {name!r} (requested by {source}) cannot run on {device}: {cause}")
    return name


# ---- Where spigan's own backends run ----


def _load_extension() -> tuple[ModuleType | None, dict[str, Any], str | None]:
    """Return (the extension, what its `build_info` reports, why there is none)."""
    try:
        found = importlib.import_module("spigan._C")
        return found, dict(found.build_info()), None
    except Exception as error:
        # Not only ImportError: a damaged extension may raise anything, and `spigan info` must still report it.
        return None, {}, f"the compiled extension spigan._C does not load ({type(error).__name__}: {error})"


# Loaded and read here rather than at first use: torch.compile traces `choose`, and can trace neither an import nor a
# call of the extension.
_extension, _build, _extension_cause = _load_extension()


def extension() -> ModuleType:
    """Return the compiled extension `spigan._C`.

    Raises:
        BackendUnavailable: It is missing or broken.
    """
    if _extension is None:
        raise BackendUnavailable(_extension_cause)
    return _extension


def extension_on_cpu(device: torch.device) -> str | None:
    """Availability of the cpp backends: they need `spigan._C` and tensors on the CPU."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return _extension_cause


# Determined once, here: compilers trace `choose` and could not trace this.
_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_ROCM = torch.version.hip is not None

# By index of the CUDA device; see `_once`.
_capabilities: dict[int, tuple[int, int]] = {}
_extension_causes: dict[int, str | None] = {}

Function = TypeVar("Function", bound=Callable[..., Any])


def _once(function: Function) -> Function:
    """Mark what asks the driver: torch.compile calls it while tracing, and takes its result for a constant.

    This cannot be asked at import, because it initialises CUDA, after which a process cannot fork.
    """
    # As torch.compiler.assume_constant_result does, which would import torch._dynamo: that takes seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_once
def _old_gpu(index: int) -> str | None:
    """Return why GPU `index` is too old for every kernel, or None."""
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    major, minor = _capabilities[index]
    if major < 8:
        return f"it needs compute capability 8.0 or higher, cuda:{index} has {major}.{minor}"
    return None


@_once
def _extension_on_gpu(index: int) -> str | None:
    """Return why the kernels of the extension do not run on GPU `index`, or None."""
    if index not in _extension_causes:
        _extension_causes[index] = _probe(index)
    return _extension_causes[index]


def _probe(index: int) -> str | None:
    """Load a kernel of the extension on GPU `index`, and return why that fails, or None."""
    try:
        with torch.cuda.device(index):
            found = extension().cuda.probe()
    except Exception as error:  # whatever it is, another backend can take over
        return f"spigan._C cannot be asked for its CUDA kernels ({type(error).__name__}: {error})"
    if found["error"] is None:
        return None
    cause = (
        f"its kernels do not load on cuda:{index} ({found['error']}): spigan._C was built with CUDA "
        f"{_build['cuda_version']} for {', '.join(_build['cuda_architectures'])}, the driver supports CUDA "
        f"{cuda_version(found['driver'])}. "
    )
    if found["driver"] < found["runtime"]:
        return cause + "Update the driver, or reinstall spigan with an older CUDA toolkit"
    return cause + "Reinstall spigan for this GPU: pip install -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native ..."


def cuda_version(number: int) -> str:
    """Return a version as CUDA encodes it, such as 12040, as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def triton_on_gpu(device: torch.device) -> str | None:
    """Availability of the triton backends: CUDA tensors, or CPU tensors if TRITON_INTERPRET=1."""
    if not _TRITON:
        return "the package triton is not installed"
    if device.type == "cuda":
        return _no_rocm() or _old_gpu(device.index or 0)
    if device.type == "cpu" and _TRITON_INTERPRET:
        return None
    return f"it runs on CUDA devices, not on {device.type}"


def _no_rocm() -> str | None:
    # Triton's compiler for AMD's GPUs refuses options of our kernels, such as maxnreg.
    return "it runs on NVIDIA's GPUs, and this torch is built for ROCm" if _ROCM else None


def cuda_on_gpu(device: torch.device) -> str | None:
    """Availability of the cuda backends: `spigan._C` with CUDA kernels that load on the device, and CUDA tensors."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if _extension is None:
        return _extension_cause
    if not _build["cuda"]:
        return (
            "spigan._C was built without CUDA: put nvcc on PATH and reinstall spigan "
            "(with SPIGAN_CUDA=ON a missing nvcc is an error)"
        )
    index = device.index or 0
    return _no_rocm() or _old_gpu(index) or _extension_on_gpu(index)


def always_available(device: torch.device) -> str | None:
    """Availability of the reference backends."""
    return None


def describe(device: torch.device) -> dict[str, dict[str, Any]]:
    """Report, for each operation, the backend chosen on `device` and the status of the others.

    Returns:
        {op: {"chosen": name or None, "why": reason, "not_chosen": [backends that could run],
        "cannot_run": {backend: cause}, "not_implemented": [backends that this version lacks]}}
    """
    report: dict[str, dict[str, Any]] = {}
    name, source = requested()
    for op, by_backend in implementations.items():
        try:
            chosen: str | None = choose(op, None, device)
            why = f"auto: first that runs on {device.type}" if name == "auto" else f"requested by {source}"
        except BackendUnavailable:
            chosen, why = None, f"{name} was requested by {source}: {why_unavailable(op, name, device)}"
        causes = {other: why_unavailable(op, other, device) for other in _names() if other in by_backend}
        report[op] = {
            "chosen": chosen,
            "why": why,
            "not_chosen": [other for other, cause in causes.items() if cause is None and other != chosen],
            "cannot_run": {other: cause for other, cause in causes.items() if cause is not None},
            "not_implemented": [other for other in BACKENDS if other not in by_backend],
        }
    return report
