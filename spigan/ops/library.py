"""How kernels are made known to PyTorch and launched.

Every operation with kernels is one operator `spigan::<op>` of torch.library with a `backend` argument, so that
torch.compile, torch.export and the profiler see it as one node. References are not registered: they are plain PyTorch,
which compilers trace and autograd differentiates.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spigan.ops import backends

library = torch.library.Library("spigan", "FRAGMENT")
"""The namespace `spigan::`."""

Function = TypeVar("Function", bound=Callable[..., Any])


def _nvtx_is_on() -> bool:
    return os.environ.get("SPIGAN_NVTX") == "1" and torch.cuda.is_available()


def annotate(name: str, enabled: bool | None = None) -> Callable[[Function], Function]:
    """Decorator: each call is an NVTX range `name`, which Nsight Systems shows.

    Args:
        name: name of the range.
        enabled: None: where SPIGAN_NVTX=1 is set and CUDA is available. Else the function comes back as it was, so
            that a range that is off costs nothing.
    """
    if enabled is None:
        enabled = _nvtx_is_on()

    def decorate(function: Function) -> Function:
        if not enabled:
            return function

        def ranged(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.nvtx.range_push(name)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.nvtx.range_pop()

        return ranged  # type: ignore[return-value]

    return decorate


def stage(name: str) -> AbstractContextManager[Any]:
    """A range `name` around a part of the model, in PyTorch's profiler while that runs and in Nsight Systems.

    Like `annotate`, it costs next to nothing where nobody looks.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if _nvtx_is_on():
        return torch.cuda.nvtx.range(name)
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return torch.profiler.record_function(name) if profiled else nullcontext()


def _without_autocast(kernel: Callable[..., Any], device_type: str) -> Callable[..., Any]:
    """`kernel` with autocast off: PyTorch's operators in it must return the dtype that it reads by address."""

    def run(*args: Any) -> Any:
        if not torch.is_autocast_enabled(device_type):
            return kernel(*args)
        with torch.autocast(device_type, enabled=False):
            return kernel(*args)

    return run


def why_transformed(*tensors: Tensor | None) -> str | None:
    """Why no kernel takes `tensors`: a kernel has reverse-mode derivatives only and does not see through torch.func.

    Returns:
        The cause for a `limit` of `backends.choose`, or None.
    """
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
        if dual or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "forward-mode derivatives and the transforms of torch.func are for the reference"
    return None


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `spigan::<schema>` for CPU and CUDA tensors.

    Args:
        schema: schema in torch.library's notation, without the namespace.
        kernel: the implementation; it allocates the results.
        fake: makes tensors of the results' shapes and dtypes for compilers.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    for device_type in ("cpu", "cuda"):
        library.impl(name, annotate(f"spigan::{name}")(_without_autocast(kernel, device_type)), device_type.upper())
    torch.library.register_fake(f"spigan::{name}", fake, lib=library)


def launcher(backend: str, device: torch.device) -> tuple[ModuleType, int]:
    """Module with the compiled kernels of "cpp" or "cuda", and what each of its functions takes last.

    Returns:
        (module, number of threads) or (module, address of the current stream).
    """
    if backend == "cpp":
        return backends.extension(), torch.get_num_threads()
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return backends.extension().cuda, stream


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which kernels launch on `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def dtype_number(module: ModuleType, dtype: torch.dtype) -> int:
    """The number by which compiled kernels know `dtype`."""
    return int(module.DTYPES.index(str(dtype).removeprefix("torch.")))


def address(tensor: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
