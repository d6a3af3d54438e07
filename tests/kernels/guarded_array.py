"""A tensor in guarded memory, for functions that take addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

GUARD = 64  # bytes before and after every array


class Array:
    """A tensor of NaN with guards around it, `shift` elements off alignment."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, shift: int = 0) -> None:
        size = math.prod(shape) * dtype.itemsize
        self.start, self.end = GUARD + shift * dtype.itemsize, GUARD + shift * dtype.itemsize + size
        self.memory = torch.full((self.end + GUARD,), 0xA5, dtype=torch.uint8)
        assert self.memory.data_ptr() % 16 == 0
        self.memory[self.start : self.end] = 0xFF
        self.tensor = self.memory[self.start : self.end].view(dtype).view(tuple(shape))

    @classmethod
    def of(cls, value: Tensor, shift: int = 0) -> Array:
        array = cls(value.shape, value.dtype, shift)
        array.tensor.copy_(value)
        return array

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start

    def checked(self) -> Tensor:
        assert (self.memory[: self.start] == 0xA5).all(), "written before the array"
        assert (self.memory[self.end :] == 0xA5).all(), "written after the array"
        return self.tensor
