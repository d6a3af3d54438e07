"""Standard normal numbers from the counter-based generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3").

Element e of a seed's stream is the same number on every backend, however the stream is split into draws.

Twins: csrc/common/philox.h (arithmetic), csrc/cpu/philox_normal.cpp, csrc/cuda/philox_normal.cu,
kernels/philox_normal.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spigan.ops.checks import FLOATS, check_index, dtype_names
from spigan.ops.library import launch
from spigan.ops.operation import Operation

_MASK32 = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, ...]


def philox4x32_10(counter: Words, key: Words) -> Words:
    """Apply ten rounds of Philox4x32.

    Args:
        counter: Four int64 tensors that hold 32-bit words.
        key: Two int64 tensors that hold 32-bit words, broadcastable with the counter.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps into int64; an arithmetic shift and a mask recover its words.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1 = ((p1 >> 32) & _MASK32) ^ c1 ^ k0, p1 & _MASK32
        c2, c3 = ((p0 >> 32) & _MASK32) ^ c3 ^ k1, p0 & _MASK32
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _box_muller(word0: Tensor, word1: Tensor) -> tuple[Tensor, Tensor]:
    """Return two float32 normals from two 32-bit words."""
    # 2^-33 keeps the logarithm's argument above 0. A product with a power of two is exact, so the sum rounds once, with
    # or without a fused multiply-add.
    u1 = word0.to(torch.float32) * 2.0**-32 + 2.0**-33
    u2 = word1.to(torch.float32) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log(u1))
    angle = u2 * (2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def philox_normal_reference(seeds: Tensor, row_numel: int, offset: int) -> Tensor:
    """Plain PyTorch definition: element e = offset + column is lane e % 4 of block e // 4.

    Block b of seed s is `philox4x32_10((b_low, b_high, 0, 0), (s_low, s_high))`; its words 0, 1 give lanes 0, 1 by
    Box-Muller (cosine, sine) and its words 2, 3 give lanes 2, 3.

    Args:
        seeds: [R] int64.
        row_numel: Count of numbers to draw for each seed.
        offset: Index of the first element in every seed's stream.

    Returns:
        [R, row_numel] float32.
    """
    skip = offset % 4
    block = torch.arange(offset // 4, (offset + row_numel + 3) // 4, device=seeds.device)[None]  # [1, B]
    zero = torch.zeros_like(block)
    seed = seeds[:, None]
    words = philox4x32_10(
        (block & _MASK32, (block >> 32) & _MASK32, zero, zero), (seed & _MASK32, (seed >> 32) & _MASK32)
    )
    lanes = (*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3]))
    return torch.stack(lanes, dim=-1).flatten(1)[:, skip : skip + row_numel].contiguous()


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int | Tensor,
    offset: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Draw standard normal numbers that depend only on the seed and the element's index.

    The numbers are the same however a stream is split at `offset`. Backends and devices agree up to 1e-5: all compute
    in float32 whatever `dtype`, but libraries round the logarithm and the cosine differently.

    Args:
        shape: Shape of the result.
        seed: Integer in [0, 2^63), or an int64 tensor [N] of such integers. With a tensor, `shape[0]` must be N, and
            row i of the result equals `philox_normal(shape[1:], seed=seed[i], offset=offset)`.
        offset: Index of the first element in the stream, in [0, 2^63).
        device: Device of the result; by default that of a seed tensor, otherwise the CPU.
        dtype: float32, float64, bfloat16 or float16.
        backend: "auto" or one of `BACKENDS`; for the default see `spigan.ops.use_backend`.

    Returns:
        Tensor of `shape`. It carries no gradient.

    Raises:
        TypeError, ValueError: An argument has the wrong type or is out of range.
        BackendUnavailable: A backend requested by name cannot run.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be a sequence of sizes, got {type(shape).__name__}")
    size = tuple(check_index("each size in shape", s) for s in shape)
    offset = check_index("offset", offset)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be {dtype_names(FLOATS)}, got {dtype}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.ndim != 1:
            raise TypeError(f"a seed tensor must be int64 [N], got {dtype_names([seed.dtype])} {list(seed.shape)}")
        if not size or size[0] != seed.shape[0]:
            raise ValueError(f"a seed tensor [{seed.shape[0]}] needs a shape that starts with it, got {list(size)}")
        seeds = seed if device is None else seed.to(device)
        row_numel = math.prod(size[1:])
    else:
        seeds = torch.full((1,), check_index("seed", seed), dtype=torch.int64, device=device)
        row_numel = math.prod(size)

    row_numel = check_index("the number of elements of shape", row_numel)
    name, function = _OPERATION.choose(backend, seeds.device, (), dtype)
    if function is not None:
        return function(seeds, row_numel, offset).view(size).to(dtype)
    return _OPERATION.kernel(seeds, row_numel, offset, dtype, name).view(size)


def _limit(backend: str, dtype: torch.dtype) -> str | None:
    if backend == "triton" and dtype == torch.float64:
        return "it draws float32, bfloat16 or float16, not float64"
    return None


def _empty(args: Any) -> Tensor:
    return args.seeds.new_empty((args.seeds.shape[0], args.row_numel), dtype=args.dtype)


def _compiled(args: Any) -> Tensor:
    out = _empty(args)
    launch(args.backend, "philox_normal", out, args.dtype, args.seeds.contiguous(), *out.shape, args.offset)
    return out


def _triton(args: Any) -> Tensor:
    from spigan.kernels.philox_normal import philox_normal as draw

    out = _empty(args)
    draw(out, args.seeds.contiguous(), args.offset)
    return out


_OPERATION = Operation(
    "philox_normal(Tensor seeds, SymInt row_numel, SymInt offset, ScalarType dtype, str backend) -> Tensor",
    reference=philox_normal_reference,
    kernels={"cpp": _compiled, "triton": _triton, "cuda": _compiled},
    fake=_empty,
    limit=_limit,
)
