"""rk4_mlp as large matrix products, and when "auto" takes them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spigan.ops import rk4_mlp, use_backend
from spigan.ops.rk4_mlp import ACTIVATIONS, rk4_mlp_reference, step_grid, takes_products
from spigan.ops.rk4_mlp_products import PRODUCT_ROWS, integrate_by_products


def problem(n: int, dim: int, layers: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (n, dim), (layers, dim, dim), (layers, dim), (layers, dim)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn[1] /= dim**0.5
    return [x.to(dtype) for x in drawn]


def solve(inputs: list[torch.Tensor], times: list[float], steps: int, every_step: bool, activation: str):
    return torch.ops.spigan.rk4_mlp.default(*inputs, times, steps, every_step, activation, "products")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n", "dim", "layers"), [(0, 4, 2), (1, 1, 1), (17, 33, 3)])
def test_products_give_the_states(assert_accurate, poisoned_memory, n, dim, layers, activation, dtype):
    inputs, times, steps = problem(n, dim, layers, dtype), [0.3, 1.0], 3
    exact = [x.double() for x in inputs]
    assert_accurate(
        solve(inputs, times, steps, False, activation),
        rk4_mlp_reference(*inputs, times, steps, activation),
        rk4_mlp_reference(*exact, times, steps, activation),
    )
    ends = [start + length for start, length, _ in step_grid(times, steps)]
    assert_accurate(
        solve(inputs, times, steps, True, activation),
        rk4_mlp_reference(*inputs, ends, steps, activation),
        rk4_mlp_reference(*exact, ends, steps, activation),
    )


def test_gradients_of_products():
    inputs = [x.requires_grad_() for x in problem(2, 3, 2, torch.float64)]
    assert gradcheck(lambda *x: solve(list(x), [0.4, 1.0], 2, False, "silu"), inputs)


def test_products_launch_little():
    """One launch for each product, activation and sum; the reference has more than 1.5 times as many."""

    def launches(function) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            function()
        names = ("aten::addmm", "aten::silu", "aten::add", "aten::mul")
        return sum(row.count for row in profile.key_averages() if row.key in names)

    h0, *parameters = inputs = problem(8, 16, 3, torch.float32)
    out, grid = h0.new_empty(1, 8, 16), list(step_grid([1.0], 4))
    counted = launches(lambda: integrate_by_products(h0, *parameters, grid, ACTIVATIONS["silu"], out))
    # 16 evaluations of 3 products and 2 activations; 4 steps with sums of 3 biases, 3 stages, 3 slopes and 1 state.
    assert counted == 16 * 5 + 4 * 10
    assert launches(lambda: rk4_mlp_reference(*inputs, [1.0], 4, "silu")) > 1.5 * counted


def test_auto_takes_products_of_many_rows_on_cuda(monkeypatch):
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)
    for kernel in ("cuda", "triton"):
        assert takes_products(None, kernel, PRODUCT_ROWS) and takes_products("auto", kernel, 4096)
        assert not takes_products(None, kernel, PRODUCT_ROWS - 1)
        assert not takes_products(kernel, kernel, 4096), "a backend requested by name runs itself"
        with use_backend(kernel):
            assert not takes_products(None, kernel, 4096)
    assert not takes_products(None, "cpp", 4096) and not takes_products(None, "reference", 4096)


@pytest.mark.parametrize("grad", [False, True])
def test_many_rows_run_as_products(monkeypatch, noted_kernels, grad):
    """Chosen as on a GPU, executed here."""
    monkeypatch.setattr("spigan.ops.backends.choose", lambda *args: "cuda")
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)
    inputs = [x.requires_grad_(grad) for x in problem(PRODUCT_ROWS, 16, 2, torch.float32)]
    with noted_kernels:
        states = rk4_mlp(*inputs, [0.5, 1.0], steps=2)
    assert noted_kernels.calls == [("rk4_mlp", "products")]
    assert states.shape == (2, PRODUCT_ROWS, 16) and states.requires_grad == grad
