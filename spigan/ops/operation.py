"""The declaration of an operation: one name, a reference in plain PyTorch, and kernels of several backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spigan.ops import backends
from spigan.ops.library import register_operator, why_transformed

_AVAILABILITY = {
    "cpp": backends.extension_on_cpu,
    "triton": backends.triton_on_gpu,
    "cuda": backends.cuda_on_gpu,
}


def _no_limit(backend: str) -> str | None:
    return None


class Operation:
    """An operation with kernels. Creating one registers the reference, the kernels and their derivatives.

    References are not operators: they are plain PyTorch, which compilers trace and autograd differentiates.

    Args:
        schema: Of the kernels' operator, in torch.library's notation without the namespace. Its name is the operation's
            name, its first argument a tensor, and its last argument `str backend`.
        reference: Defines the result. It has its own arguments; a backend added by `register_backend` gets the same.
        kernels: By backend, a function of the schema's arguments, given as one named tuple, that returns the results.
        fake: Returns tensors with the shapes and dtypes of the results, from the same named tuple, for compilers.
        limit: limit(backend, *details) returns why the kernel of that backend does not accept a call, or None if it
            does. The details are those given to `choose`.
        forms: By name, further functions like the kernels. `kernel` accepts the name as its backend, users do not.
        setup_context: setup_context(ctx, args, output) saves what `backward` needs; see `register_operator`.
        backward: backward(ctx, *grads) returns the gradients of the schema's arguments.

    Attributes:
        name: Name of the operation.
        kernel: The operator `torch.ops.spigan.<name>.default`. Call it with all arguments by position.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        kernels: Mapping[str, Callable[..., Any]],
        fake: Callable[..., Any],
        limit: Callable[..., str | None] = _no_limit,
        forms: Mapping[str, Callable[..., Any]] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self.limit = limit
        functions = {**kernels, **(forms or {})}
        self.kernel = register_operator(
            schema, lambda args: functions[args.backend](args), fake, setup_context=setup_context, backward=backward
        )
        backends.register(self.name, "reference", backends.always_available, reference)
        for backend in kernels:
            backends.register(self.name, backend, _AVAILABILITY[backend])

    def choose(
        self, backend: str | None, device: torch.device, tensors: Sequence[Tensor | None], *details: Any
    ) -> tuple[str, Callable[..., Any] | None]:
        """Choose the backend of a call.

        Args:
            backend: The `backend` argument of the call.
            device: Device of the tensors.
            tensors: The arguments with derivatives. Kernels do not accept them inside a transform of torch.func.
            details: What `limit` needs to know about the call.

        Returns:
            (name, function): The function takes the arguments of the reference; None means `kernel`.

        Raises:
            BackendUnavailable: `backend` was requested by name and cannot run.
        """
        transformed = why_transformed(*tensors)

        def limit(name: str) -> str | None:
            if name not in backends.KERNELS:
                return None
            return transformed or self.limit(name, *details)

        name = backends.choose(self.name, backend, device, limit)
        return name, backends.implementations[self.name][name].function
