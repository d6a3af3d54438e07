"""Register kernels with PyTorch and launch them.

Every kernel is an operator `spigan::<name>` of torch.library, so that torch.compile, torch.export and the profiler see
it as one node. spigan/ops/operation.py adds what makes it an operation: a reference, and a choice of backends.
"""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from spigan.ops import backends

library = torch.library.Library("spigan", "FRAGMENT")
"""The namespace `spigan::`."""

Function = TypeVar("Function", bound=Callable[..., Any])


# ---- Ranges in profilers ----


def _nvtx_is_on() -> bool:
    return os.environ.get("SPIGAN_NVTX") == "1" and torch.cuda.is_available()


def annotate(name: str, enabled: bool | None = None) -> Callable[[Function], Function]:
    """Decorator that makes each call an NVTX range `name`, which Nsight Systems shows.

    Args:
        name: Name of the range.
        enabled: By default, ranges are on if SPIGAN_NVTX=1 is set and CUDA is available. If they are off, the function
            is returned unchanged, so that they cost nothing.
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
    """Mark a part of the model as a range `name` in PyTorch's profiler and in Nsight Systems.

    Like `annotate`, it costs next to nothing while neither is running.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    if _nvtx_is_on():
        return torch.cuda.nvtx.range(name)
    profiled = torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
    return torch.profiler.record_function(name) if profiled else nullcontext()


# ---- Operators ----


def register_operator(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register `spigan::<schema>` for CPU and CUDA tensors.

    The schema is the only list of the operator's arguments: the functions receive them as one named tuple `args`. The
    first argument must be a tensor. It determines the device on which kernels run.

    Args:
        schema: In torch.library's notation, without the namespace.
        kernel: kernel(args) allocates, computes and returns the results. It runs without autocast, because it passes
            tensors by address and so relies on their dtypes, and with the tensors' device as the current one.
        fake: fake(args) returns tensors with the shapes and dtypes of the results, for compilers.
        setup_context: setup_context(ctx, args, output) saves what `backward` needs.
        backward: backward(ctx, *grads) returns the gradients of the arguments. Without it there are none.

    Returns:
        The operator, to be called with all arguments by position.
    """
    name = schema.partition("(")[0]
    library.define(schema)
    operator = getattr(torch.ops.spigan, name).default
    arguments = namedtuple(name, [argument.name for argument in operator._schema.arguments])  # type: ignore[misc]

    def run_on_cpu(*args: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return kernel(arguments(*args))
        with torch.autocast("cpu", enabled=False):
            return kernel(arguments(*args))

    def run_on_cuda(*args: Any) -> Any:
        with torch.cuda.device(args[0].device), torch.autocast("cuda", enabled=False):
            return kernel(arguments(*args))

    for key, run in (("CPU", run_on_cpu), ("CUDA", run_on_cuda)):
        library.impl(name, annotate(f"spigan::{name}")(run), key)
    torch.library.register_fake(f"spigan::{name}", lambda *args: fake(arguments(*args)), lib=library)
    if backward is not None:
        save = setup_context
        if save is None:
            raise ValueError("backward needs setup_context")
        torch.library.register_autograd(
            f"spigan::{name}",
            backward,
            setup_context=lambda ctx, inputs, output: save(ctx, arguments(*inputs), output),
            lib=library,
        )
    return operator


def why_transformed(*tensors: Tensor | None) -> str | None:
    """Return why no kernel accepts `tensors`, or None if kernels do.

    Kernels have reverse-mode derivatives only and do not see through torch.func.
    """
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
        if dual or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return "only the reference supports forward-mode derivatives and the transforms of torch.func"
    return None


# ---- Compiled kernels ----


def compiled(backend: str) -> ModuleType:
    """Return the module with the compiled kernels of "cpp" or "cuda"."""
    return backends.extension() if backend == "cpp" else backends.extension().cuda


@cache
def dtype_number(dtype: torch.dtype) -> int:
    """Return the number that stands for `dtype` in compiled kernels."""
    return int(backends.extension().DTYPES.index(str(dtype).removeprefix("torch.")))


_PLAIN = frozenset((int, float, bool, list, tuple))  # passed as they are, without a call of `_native`


def _native(value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    return dtype_number(value) if isinstance(value, torch.dtype) else value


def launch(backend: str, kernel: str, *args: Any, **options: Any) -> None:
    """Call a compiled kernel.

    Tensors are passed as the addresses of their first elements, None as 0, and dtypes as numbers. The number of threads
    or the current CUDA stream, which every kernel takes after its other arguments, is added.

    Args:
        backend: "cpp", or "cuda" for the current CUDA device.
        kernel: Name of a function of `spigan._C` or `spigan._C.cuda`.
        args: Its arguments. Tensors must be contiguous. By position, because 25 arguments by name take 6 us longer.
        options: Its optional arguments, which follow the stream.
    """
    context = torch.get_num_threads() if backend == "cpp" else torch.cuda.current_stream().cuda_stream
    values = [arg if type(arg) in _PLAIN else _native(arg) for arg in args]
    named = {name: _native(arg) for name, arg in options.items()}
    getattr(compiled(backend), kernel)(*values, context, **named)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Context in which `device` is the current device, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
