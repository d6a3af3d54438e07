"""`rk4_mlp` of many rows as large matrix products of PyTorch's library, for the choice "auto" on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

PRODUCT_ROWS = 512
"""From this number of rows on, "auto" takes products instead of a kernel on CUDA. A kernel reads all weights again for
every tile of rows; a product reads them once. See docs/kernels.md for the estimate."""


def integrate_by_products(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor,
    time_weight: Tensor,
    steps: Iterable[tuple[float, float, bool]],
    act: Callable[[Tensor], Tensor],
    out: Tensor,
) -> Tensor:
    """Take classical Runge-Kutta steps with one launch for each product and each sum of tensors.

    Products have the dtype of the weights; with float32 they follow the precision that torch.backends.cuda.matmul sets.
    States and sums are float32 for half types, as in the kernels.

    Args:
        h0: [N, D].
        weight: [L, D, D] (out, in).
        bias: [L, D].
        time_weight: [L, D].
        steps: (start, length, whether to write the state after it) of each step.
        act: The activation.
        out: [K, N, D] for the K states to write, in order.

    Returns:
        `out`.
    """
    dtype = h0.dtype
    matrices = weight.unbind()
    last = len(matrices) - 1

    def slope(x: Tensor, biases: tuple[Tensor, ...]) -> Tensor:
        for layer, (matrix, vector) in enumerate(zip(matrices, biases, strict=True)):
            x = F.linear(x, matrix, vector)
            x = act(x) if layer < last else x
        return x.to(h.dtype)

    h = h0.to(torch.promote_types(dtype, torch.float32))
    written = iter(out.unbind())
    for t, dt, wanted in steps:
        start, middle, end = (torch.add(bias, time_weight, alpha=time).unbind() for time in (t, t + dt / 2, t + dt))
        k = slope(h.to(dtype), start)
        total = k
        for biases, length, factor in ((middle, dt / 2, 2.0), (middle, dt / 2, 2.0), (end, dt, 1.0)):
            k = slope(torch.add(h, k, alpha=length).to(dtype), biases)
            total = torch.add(total, k, alpha=factor)
        h = torch.add(h, total, alpha=dt / 6)
        if wanted:
            next(written).copy_(h)
    return out
