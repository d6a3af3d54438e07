"""Which backend runs an operation: asked for by name it runs or raises, chosen automatically it may fall back."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

KERNELS = ("cpp", "triton", "cuda")
"""The backends whose kernels are operators of torch.library (see spigan/ops/library.py)."""

BACKENDS = ("reference", *KERNELS)
"""Every name that `backend=` takes, beside "auto" and what `register_backend` has added."""

_auto_order = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

_implementations: dict[str, dict[str, Callable[[torch.device], str | None]]] = {}
_functions: dict[str, dict[str, Callable[..., Any]]] = {}  # by operation, of the backends that are no kernels
_override: list[list[str]] = []  # of `use_backend`, innermost last; each block removes its own entry


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run this operation here; the message says why."""


def register(
    op: str,
    backend: str,
    unavailable: Callable[[torch.device], str | None],
    function: Callable[..., Any] | None = None,
) -> None:
    """Declare that `backend` implements `op`.

    Args:
        op: name of the operation.
        backend: its name.
        unavailable: tells for a device why the backend cannot run there, or None when it can.
        function: the implementation, called as the operation's reference is; None for one of `KERNELS`.
    """
    _implementations.setdefault(op, {})[backend] = unavailable
    if function is not None:
        _functions.setdefault(op, {})[backend] = function


def register_backend(
    name: str,
    functions: Mapping[str, Callable[..., Any]],
    *,
    unavailable: Callable[[torch.device], str | None] | None = None,
    auto: Sequence[str] = (),
) -> None:
    """Add a backend of your own: from then on `backend=`, `use_backend` and SPIGAN_BACKEND take its name.

    A function is called with the arguments of the operation's reference (`spigan.ops.rk4_mlp.rk4_mlp_reference` and so
    on): checked, with all defaults filled in. It returns what the reference returns, and is responsible for its own
    derivatives where the result shall have any. Registering a name again replaces that backend.

    Args:
        name: of the backend; not "auto" and none of `BACKENDS`.
        functions: the operations that it implements, by name: {"rk4_mlp": function}. Asked for any other one by name,
            it raises `BackendUnavailable`.
        unavailable: tells for a device why the backend cannot run there, or None when it can; default: it runs on all.
        auto: types of device ("cpu", "cuda", ...) on which "auto" takes it before all others.

    Raises:
        TypeError, ValueError: a name that is taken, an operation that does not exist, no function for it, or an `auto`
            that is no list of types.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a backend's name must be an identifier, got {name!r}")
    if name in ("auto", *BACKENDS):
        raise ValueError(f"{name!r} is a backend of spigan itself: choose another name")
    if not functions:
        raise ValueError(f"the backend {name!r} must implement one operation at least: {', '.join(_implementations)}")
    for op, function in functions.items():
        if op not in _implementations:
            raise ValueError(f"there is no operation {op!r}; there are {', '.join(_implementations)}")
        if not callable(function):
            raise TypeError(f"the backend {name!r} needs a function for {op}, got {type(function).__name__}")
    if isinstance(auto, str) or not all(isinstance(kind, str) and kind.isidentifier() for kind in auto):
        raise ValueError(f'auto must be a list of types of device, such as ["cpu", "cuda"], got {auto!r}')
    for op in _implementations:
        _implementations[op].pop(name, None)
        _functions[op].pop(name, None)
    for op, function in functions.items():
        register(op, name, unavailable or always_available, function)
    for kind in {*_auto_order, *auto}:
        others = tuple(other for other in _auto_order.get(kind, ("reference",)) if other != name)
        _auto_order[kind] = (name, *others) if kind in auto else others


def function(op: str, backend: str) -> Callable[..., Any] | None:
    """The Python function of `op` that `backend` is; None for a kernel."""
    return _functions[op].get(backend)


def _names() -> tuple[str, ...]:
    """`BACKENDS`, and those that were added."""
    return tuple(dict.fromkeys((*BACKENDS, *(name for functions in _functions.values() for name in functions))))


def operations() -> tuple[str, ...]:
    """Names of all registered operations."""
    return tuple(_implementations)


def _check_name(backend: str, where: str) -> str:
    if backend != "auto" and backend not in BACKENDS and backend not in _names():
        raise ValueError(f"{where} names the backend {backend!r}; expected one of {', '.join(('auto', *_names()))}")
    return backend


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Run every operation inside the `with` block on `backend` (an argument of the call still wins).

    The choice is the process's, so that it also holds in autograd's and other threads of the block.

    Args:
        backend: "auto", one of `BACKENDS`, or one that `register_backend` has added.
    """
    entry = [_check_name(backend, "use_backend")]
    _override.append(entry)
    try:
        yield
    finally:
        # By identity: blocks of several threads may end in any order.
        _override[:] = [other for other in _override if other is not entry]


def requested(backend: str | None = None) -> tuple[str, str]:
    """The backend that is asked for, and by whom: argument, then `use_backend`, then SPIGAN_BACKEND, then "auto".

    Args:
        backend: the `backend` argument of the call.

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
    """Why `backend` cannot run `op` on `device`; None when it can."""
    implementations = _implementations[op]
    if backend not in implementations:
        return f"this version of spigan has no {backend} implementation of {op} (it has: {', '.join(implementations)})"
    return implementations[backend](device)


def unlimited(backend: str) -> str | None:
    """`limit` of operations whose backends all take the same arguments."""
    return None


def choose(op: str, backend: str | None, device: torch.device, limit: Callable[[str], str | None] = unlimited) -> str:
    """Name of the backend that runs `op` on `device`.

    Args:
        op: name of the operation.
        backend: the `backend` argument of the call.
        device: device of the tensors.
        limit: tells for a backend why it does not take this call's arguments, or None when it does.

    Raises:
        BackendUnavailable: `backend` was asked for by name and cannot run.
    """
    name, source = requested(backend)
    if name == "auto":
        order = _auto_order.get(device.type, ("reference",))
        return next(b for b in order if why_unavailable(op, b, device) is None and limit(b) is None)
    if (cause := why_unavailable(op, name, device) or limit(name)) is not None:
        raise BackendUnavailable(f"{op}: backend {name!r} (asked for by {source}) cannot run on {device}: {cause}")
    return name


def _load_extension() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("spigan._C"), None
    except Exception as error:
        # Not only ImportError: a damaged extension may raise anything, and `spigan info` must still be able to tell.
        return None, f"the compiled extension spigan._C does not load ({type(error).__name__}: {error})"


# Loaded here and not at first use: torch.compile traces `choose` and cannot trace an import.
_extension, _extension_cause = _load_extension()


def extension() -> ModuleType:
    """The compiled extension `spigan._C`.

    Raises:
        BackendUnavailable: it is missing or broken.
    """
    if _extension is None:
        raise BackendUnavailable(_extension_cause)
    return _extension


def extension_on_cpu(device: torch.device) -> str | None:
    """`unavailable` function of the cpp backends: they need `spigan._C` and tensors on the CPU."""
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    return _extension_cause


# Found out once, here: compilers trace `choose`, and could not trace this.
_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


_capabilities: dict[int, tuple[int, int]] = {}  # by index of the CUDA device


def _old_gpu(device: torch.device) -> str | None:
    index = device.index or 0
    if index not in _capabilities:  # not at import: it would initialise CUDA, after which a process cannot fork
        _capabilities[index] = torch.cuda.get_device_capability(index)
    major, minor = _capabilities[index]
    if major < 8:
        return f"it needs compute capability 8.0 or more, {device} has {major}.{minor}"
    return None


def triton_on_gpu(device: torch.device) -> str | None:
    """`unavailable` function of the triton backends: CUDA tensors, or CPU tensors where TRITON_INTERPRET=1."""
    if not _TRITON:
        return "the package triton is not installed"
    if device.type == "cuda":
        return _old_gpu(device)
    if device.type == "cpu" and _TRITON_INTERPRET:
        return None
    return f"it runs on CUDA devices, not on {device.type}"


def cuda_on_gpu(device: torch.device) -> str | None:
    """`unavailable` function of the cuda backends: they need `spigan._C` built with CUDA, and CUDA tensors."""
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if _extension is None:
        return _extension_cause
    if not _extension.build_info()["cuda"]:
        return (
            "spigan._C was built without CUDA: put nvcc on PATH and install again "
            "(SPIGAN_CUDA=ON makes its absence an error)"
        )
    return _old_gpu(device)


def always_available(device: torch.device) -> str | None:
    """`unavailable` function of the reference backends."""
    return None


def describe(device: torch.device) -> dict[str, dict[str, Any]]:
    """For each operation: the backend chosen on `device`, and what became of the other ones.

    Returns:
        {op: {"chosen": name or None, "why": reason, "not_chosen": [backends that could run],
        "cannot_run": {backend: cause}, "not_implemented": [backends that this version lacks]}}
    """
    report: dict[str, dict[str, Any]] = {}
    name, source = requested()
    for op, implementations in _implementations.items():
        try:
            chosen: str | None = choose(op, None, device)
            why = f"auto: first that runs on {device.type}" if name == "auto" else f"asked for by {source}"
        except BackendUnavailable:
            chosen, why = None, f"{name} was asked for by {source}: {why_unavailable(op, name, device)}"
        causes = {other: why_unavailable(op, other, device) for other in _names() if other in implementations}
        report[op] = {
            "chosen": chosen,
            "why": why,
            "not_chosen": [other for other, cause in causes.items() if cause is None and other != chosen],
            "cannot_run": {other: cause for other, cause in causes.items() if cause is not None},
            "not_implemented": [other for other in BACKENDS if other not in implementations],
        }
    return report
