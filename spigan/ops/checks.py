"""Argument checks that the operations share. Their messages name what was given and what was expected."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_names(dtypes: Sequence[torch.dtype]) -> str:
    """Return a readable list of dtypes."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(
    name: str,
    value: object,
    layout: str,
    *,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    device: torch.device | None = None,
) -> Tensor:
    """Check that `value` is a tensor of the expected shape, dtype and device.

    Args:
        name: Name of the argument.
        value: The argument.
        layout: Its expected shape in words, such as "[N, D]"; the commas give the number of dimensions.
        shape: Expected sizes; None matches any size.
        dtypes: Allowed dtypes.
        device: Expected device.

    Raises:
        TypeError: It is not a tensor, or has the wrong dtype.
        ValueError: It has the wrong shape or is on the wrong device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {dtype_names(dtypes)}, got {dtype_names([value.dtype])}")
    if not (value.ndim == layout.count(",") + 1 if shape is None else _fits(value.shape, shape)):
        sizes = "" if shape is None else f" = [{', '.join('*' if s is None else str(s) for s in shape)}]"
        raise ValueError(f"{name} must have shape {layout}{sizes}, got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other arguments, got {value.device}")
    return value


def _fits(sizes: torch.Size, expected: Sequence[int | None]) -> bool:
    if len(sizes) != len(expected):
        return False
    for have, want in zip(sizes, expected, strict=True):  # noqa: SIM110  (`all` takes twice as long)
        if want is not None and have != want:
            return False
    return True


def check_times(times: Sequence[float]) -> tuple[float, ...]:
    """Check that `times` are increasing floats in (0, 1] and return them as a tuple."""
    if isinstance(times, Tensor):
        times = times.tolist()
    if isinstance(times, (int, float)):
        raise TypeError(f"times must be a sequence of floats such as [{float(times)}], got the number {times}")
    values = tuple(float(t) for t in times)
    if not values:
        raise ValueError("times must hold at least one time in (0, 1], got none")
    if not all(0.0 < t <= 1.0 for t in values) or any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"times must increase strictly within (0, 1], got {list(values)}")
    return values


def check_index(name: str, value: object, *, minimum: int = 0) -> int:
    """Check that `value` is an integer in [minimum, 2^63) and return it."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value}")
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # traced by torch.export: stands for an int
    if isinstance(value, int):
        number = value  # operator.index would make torch.compile recompile for each seed and size
    else:
        try:
            number = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not minimum <= number < 2**63:
        raise ValueError(f"{name} must be in [{minimum}, 2**63), got {number}")
    return number


def check_activation(activation: str) -> None:
    """Check the activation of a layer."""
    if activation not in ("linear", "lrelu"):
        raise ValueError(f'activation must be "linear" or "lrelu", got {activation!r}')


def check_clamp(clamp: float | None) -> None:
    """Check the bound of a layer's result."""
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp must be positive or None, got {clamp}")
