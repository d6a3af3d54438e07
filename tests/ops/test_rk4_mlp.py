"""rk4_mlp against scipy's DOP853, torchdiffeq's dopri5 and Runge-Kutta written out here; order and derivatives."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torchdiffeq import odeint

from spigan.models.mapping import euler_step
from spigan.ops import BACKENDS, rk4_mlp
from spigan.ops.backends import why_unavailable
from spigan.ops.rk4_mlp import ACTIVATIONS, integrate, mlp_vector_field, step_grid

RUNNING = [b for b in BACKENDS if why_unavailable("rk4_mlp", b, torch.device("cpu")) is None]
KERNELS = [b for b in RUNNING if b != "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALF = (torch.bfloat16, torch.float16)
SMOOTH = ["silu", "tanh", "softplus"]


def problem(n=3, dim=5, layers=3, dtype=torch.float64, scale=1.0, seed=0):
    """h0, weight, bias, time_weight of an ODE whose solution changes by about its own size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h0, weight = draw(n, dim), scale * draw(layers, dim, dim) / dim**0.5
    return tuple(x.to(dtype) for x in (h0, weight, scale * draw(layers, dim), scale * draw(layers, dim)))


def numpy_field(h, t, weight, bias, time_weight, activation):
    """r(h, t) in numpy: the time as one more column of each layer's input."""
    functions = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "tanh": np.tanh,
        "softplus": lambda x: np.logaddexp(0, x),
        "lrelu": lambda x: np.maximum(x, 0.2 * x),
    }
    for layer in range(len(weight)):
        matrix = np.column_stack([weight[layer], time_weight[layer]])
        h = np.column_stack([h, np.full(len(h), t)]) @ matrix.T + bias[layer]
        if layer + 1 < len(weight):
            h = functions[activation](h)
    return h


def scipy_solution(h0, weight, bias, time_weight, times, activation):
    """[K, N, D] in float64 by an adaptive method of order 8."""
    arrays = [x.double().numpy() for x in (weight, bias, time_weight)]
    shape = tuple(h0.shape)
    solution = solve_ivp(
        lambda t, h: numpy_field(h.reshape(shape), t, *arrays, activation).ravel(),
        (0, times[-1]),
        h0.double().numpy().ravel(),
        method="DOP853",
        t_eval=times,
        rtol=1e-12,
        atol=1e-13,
    )
    assert solution.success
    return torch.from_numpy(solution.y.T.reshape(-1, *shape).copy())


def written_out(h0, weight, bias, time_weight, times, steps, activation):
    """Classical Runge-Kutta, each stage written out in plain PyTorch in the dtype of the inputs."""
    act = {"silu": F.silu, "tanh": torch.tanh, "softplus": F.softplus, "lrelu": lambda x: F.leaky_relu(x, 0.2)}[
        activation
    ]

    def r(h, t):
        for w, b, u in zip(weight[:-1], bias[:-1], time_weight[:-1], strict=True):
            h = act(h @ w.T + b + t * u)
        return h @ weight[-1].T + bias[-1] + t * time_weight[-1]

    h, start, states = h0, 0.0, []
    for end in times:
        count = ceil(Fraction(steps) * (Fraction(str(end)) - Fraction(str(start))))
        dt = (end - start) / count
        for i in range(count):
            t = start + i * dt
            k1 = r(h, t)
            k2 = r(h + 0.5 * dt * k1, t + 0.5 * dt)
            k3 = r(h + 0.5 * dt * k2, t + 0.5 * dt)
            k4 = r(h + dt * k3, t + dt)
            h = h + dt / 6 * k1 + dt / 3 * k2 + dt / 3 * k3 + dt / 6 * k4
        states.append(h)
        start = end
    return torch.stack(states)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("t", [0.0, 0.37, 1.0])
def test_vector_field(activation, t):
    h0, weight, bias, time_weight = problem(layers=4)
    actual = mlp_vector_field(h0, t, weight, bias, time_weight, activation)
    expected = numpy_field(
        *(x.numpy() if torch.is_tensor(x) else x for x in (h0, t, weight, bias, time_weight)), activation
    )
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("backend", RUNNING)
def test_solves_the_equation(activation, backend):
    inputs, times = problem(), [0.2, 0.55, 1.0]
    exact = scipy_solution(*inputs, times, activation)
    assert (exact[-1] - inputs[0]).abs().max() > 0.3, "the problem is too easy to prove anything"
    actual = rk4_mlp(*inputs, times, steps=200, activation=activation, backend=backend)
    torch.testing.assert_close(actual, exact, rtol=0, atol=1e-8)


def test_agrees_with_torchdiffeq():
    # Its "rk4" is the 3/8 rule, so that only solutions can be compared, not steps.
    h0, weight, bias, time_weight = inputs = problem(seed=1)
    times = [0.3, 0.9, 1.0]
    grid = torch.tensor([0.0, *times], dtype=torch.float64)
    expected = odeint(
        lambda t, h: mlp_vector_field(h, t, weight, bias, time_weight, "silu"),
        h0,
        grid,
        rtol=1e-11,
        atol=1e-12,
        method="dopri5",
    )
    torch.testing.assert_close(rk4_mlp(*inputs, times, steps=200), expected[1:], rtol=0, atol=1e-8)


def convergence_ratios(errors):
    return [coarse / fine for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("backend", RUNNING)
def test_order_is_four(activation, backend):
    inputs = problem(scale=0.7, seed=2)
    exact = scipy_solution(*inputs, [1.0], activation)
    errors = [
        (rk4_mlp(*inputs, [1.0], steps=steps, activation=activation, backend=backend) - exact).norm().item()
        for steps in (8, 16, 32, 64)
    ]
    assert errors[-1] > 1e-11, "the error of the reference solution would be measured"
    assert all(12 <= ratio <= 20 for ratio in convergence_ratios(errors)), convergence_ratios(errors)


@pytest.mark.parametrize("activation", SMOOTH)
def test_order_of_euler_is_one(activation):
    h0, *parameters = inputs = problem(scale=0.7, seed=2)
    exact = scipy_solution(*inputs, [1.0], activation)

    def field(h, t):
        return mlp_vector_field(h, t, *parameters, activation)

    errors = [(integrate(euler_step, field, h0, [1.0], steps) - exact).norm().item() for steps in (32, 64, 128, 256)]
    assert all(1.9 <= ratio <= 2.1 for ratio in convergence_ratios(errors)), convergence_ratios(errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize(("n", "dim", "layers"), [(3, 5, 3), (1, 1, 1), (7, 16, 2), (2, 33, 4), (17, 64, 8)])
def test_equals_a_runge_kutta_method_written_out(
    dtype, activation, backend, n, dim, layers, assert_accurate, poisoned_memory
):
    inputs, times = problem(n, dim, layers, dtype), [0.3, 0.7, 1.0]
    exact = written_out(*(x.double() for x in inputs), times, 4, activation)
    plain = written_out(*inputs, times, 4, activation)
    actual = rk4_mlp(*inputs, times, activation=activation, backend=backend)
    assert_accurate(actual, plain, exact)


def computed_in_float64(inputs, times, steps, activation):
    return written_out(*(x.detach().double() for x in inputs), times, steps, activation)


@pytest.mark.parametrize("backend", KERNELS)
@settings(max_examples=50)
@given(
    n=st.integers(0, 12) | st.integers(13, 130),
    dim=st.integers(1, 100),
    layers=st.integers(1, 8),
    cents=st.sets(st.integers(1, 100), min_size=1, max_size=5).map(sorted),
    steps=st.integers(1, 6),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 3),
)
def test_any_problem(assert_accurate, backend, n, dim, layers, cents, steps, activation, dtype, seed):
    inputs, times = problem(n, dim, layers, dtype, scale=0.7, seed=seed), [c / 100 for c in cents]
    actual = rk4_mlp(*inputs, times, steps=steps, activation=activation, backend=backend)
    plain = written_out(*inputs, times, steps, activation)
    exact = computed_in_float64(inputs, times, steps, activation)
    # With several rows and layers the largest of few errors is a matter of luck: 4 units in the last place at least.
    assert_accurate(actual, plain, exact, 4.0)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "dim", "layers", "steps"), [(2, 512, 3, 4), (5, 1024, 2, 1)])
def test_wide_layers(n, dim, layers, steps, dtype, backend, assert_accurate, poisoned_memory):
    inputs, times = problem(n, dim, layers, dtype), [0.3, 1.0]
    actual = rk4_mlp(*inputs, times, steps=steps, backend=backend)
    exact = computed_in_float64(inputs, times, steps, "silu")
    assert_accurate(actual, written_out(*inputs, times, steps, "silu"), exact)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
# By the sizes: one thread; one group of several threads; several groups; several blocks of rows in each.
@pytest.mark.parametrize(("n", "dim"), [(3, 20), (5, 256), (40, 96), (330, 33)])
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it(n, dim, dtype, backend, set_threads):
    h0, *parameters = problem(n, dim, 3, dtype)

    def solve(h0, threads=1):
        set_threads(threads)
        return rk4_mlp(h0, *parameters, [0.4, 1.0], steps=2, backend=backend)

    expected = solve(h0)
    assert expected.isfinite().all()
    for threads in (2, 5):
        assert torch.equal(solve(h0, threads), expected)
    for row in {0, 1, n // 2, n - 1}:
        assert torch.equal(solve(h0[row : row + 1]), expected[:, row : row + 1])
    for part in (slice(1, None), slice(0, n - 1), slice(n // 3, n // 3 + 2)):
        assert torch.equal(solve(h0[part], threads=3), expected[:, part])
    neighbours = h0.clone()
    neighbours[::2] = torch.nan
    if n > 2:
        neighbours[2] = torch.inf
    assert torch.equal(solve(neighbours, threads=2)[:, 1::2], expected[:, 1::2])


@pytest.mark.parametrize("backend", RUNNING)
def test_later_times_do_not_change_earlier_states(backend):
    inputs = problem(dtype=torch.float32)
    times = [0.13, 0.4, 0.77, 1.0]
    states = rk4_mlp(*inputs, times, backend=backend)
    assert states.shape == (4, 3, 5)
    for k in range(1, 5):
        assert torch.equal(rk4_mlp(*inputs, times[:k], backend=backend), states[:k])


@pytest.mark.parametrize("backend", RUNNING)
def test_states_continue_from_the_previous_one(backend):
    # With equal steps in both, 0 -> 1/2 -> 1 is 0 -> 1: the interval is never solved again from 0.
    inputs = problem()
    through = rk4_mlp(*inputs, [0.5, 1.0], steps=4, backend=backend)[1]
    torch.testing.assert_close(through, rk4_mlp(*inputs, [1.0], steps=4, backend=backend)[0], rtol=0, atol=1e-14)


def steps_of(times, steps):
    """Number of steps to each time, from the grid."""
    counts, count = [], 0
    for _, _, wanted in step_grid(times, steps):
        count += 1
        if wanted:
            counts.append(count)
            count = 0
    assert count == 0, "steps after the last time"
    return counts


@pytest.mark.parametrize(
    ("times", "steps", "expected"),
    [
        ([1.0], 4, [4]),
        ([0.25, 0.5, 0.75, 1.0], 4, [1, 1, 1, 1]),
        ([0.2, 0.7, 1.0], 4, [1, 2, 2]),  # 0.7 - 0.2 and 1 - 0.7 are not 0.5 and 0.3
        ([0.2, 0.7, 1.0], 10, [2, 5, 3]),
        ([0.7, 0.8], 10, [7, 1]),  # 10 (0.8 - 0.7) rounds to more than 1
        ([0.1, 0.2, 0.3], 10, [1, 1, 1]),  # so does 10 (0.3 - 0.2)
        ([1 / 3, 2 / 3, 1.0], 3, [1, 1, 1]),
        ([0.26], 4, [2]),
        ([1e-12, 1.0], 4, [1, 4]),
        ([0.999999, 1.0], 1, [1, 1]),
        ([0.3], 1, [1]),
    ],
)
def test_steps_of_an_interval(times, steps, expected):
    assert steps_of(times, steps) == expected


@settings(max_examples=100)
@given(cents=st.sets(st.integers(1, 100), min_size=1, max_size=8), steps=st.integers(1, 40))
def test_step_grid_takes_ceil_steps_times_length(cents, steps):
    cents = sorted(cents)
    times = [c / 100 for c in cents]
    exact = [ceil(Fraction(steps * (b - a), 100)) for a, b in zip([0, *cents], cents, strict=False)]
    assert steps_of(times, steps) == exact


@settings(max_examples=100)
@given(
    times=st.sets(st.floats(1e-3, 1.0), min_size=1, max_size=6).map(sorted),
    steps=st.integers(1, 40),
)
def test_step_grid_leads_without_gaps_through_all_times(times, steps):
    position, reached = 0.0, []
    for start, length, wanted in step_grid(times, steps):
        assert start == pytest.approx(position, rel=0, abs=1e-12)
        assert 0 < length <= (1 + 2e-6) / steps
        position = start + length
        if wanted:
            reached.append(position)
    assert reached == pytest.approx(times, rel=0, abs=1e-12)


@pytest.mark.parametrize(("times", "evaluations"), [([1.0], 16), ([0.2, 0.7, 1.0], 20), ([0.5, 1.0], 16)])
def test_number_of_evaluations(times, evaluations, monkeypatch):
    calls = []

    def counted(x):
        calls.append(None)
        return torch.tanh(x)

    monkeypatch.setitem(ACTIVATIONS, "tanh", counted)
    rk4_mlp(*problem(layers=2), times, steps=4, activation="tanh", backend="reference")
    assert len(calls) == evaluations  # of r, which has one activation


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("k", [1, 3])
def test_empty_batch(k, backend):
    _, *parameters = problem()
    times = [0.2, 0.5, 1.0][-k:]
    assert rk4_mlp(torch.zeros(0, 5, dtype=torch.float64), *parameters, times, backend=backend).shape == (k, 0, 5)


@pytest.mark.parametrize("backend", RUNNING)
def test_rows_are_independent(backend):
    h0, *parameters = problem(n=6)
    together = rk4_mlp(h0, *parameters, [0.5, 1.0], backend=backend)
    poisoned = h0.clone()
    poisoned[0] = torch.nan
    beside_nan = rk4_mlp(poisoned, *parameters, [0.5, 1.0], backend=backend)
    assert beside_nan[:, 0].isnan().all()
    torch.testing.assert_close(beside_nan[:, 1:], together[:, 1:], rtol=0, atol=1e-14)
    alone = rk4_mlp(h0[4:5], *parameters, [0.5, 1.0], backend=backend)
    torch.testing.assert_close(alone[:, 0], together[:, 4], rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", RUNNING)
def test_inputs_need_not_be_contiguous(backend):
    h0, weight, bias, time_weight = problem(n=4, dim=6)
    expected = rk4_mlp(h0, weight, bias, time_weight, [0.4, 1.0], backend=backend)
    views = (
        torch.full((6, 8), torch.nan, dtype=torch.float64).t()[::2].copy_(h0),
        weight.transpose(1, 2).contiguous().transpose(1, 2),
        torch.full((3, 12), torch.nan, dtype=torch.float64)[:, 1::2].copy_(bias),
        time_weight.t().contiguous().t(),
    )
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(rk4_mlp(*views, [0.4, 1.0], backend=backend), expected, rtol=0, atol=1e-14)
    expanded = rk4_mlp(h0[:1].expand(4, 6), weight, bias, time_weight, [0.4, 1.0], backend=backend)
    torch.testing.assert_close(expanded, expected[:, :1].expand(2, 4, 6), rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", RUNNING)
def test_inputs_are_left_alone(backend):
    inputs = problem()
    copies = [x.clone() for x in inputs]
    states = rk4_mlp(*inputs, [0.5, 1.0], backend=backend)
    states.fill_(torch.nan)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


def test_times_may_be_any_sequence():
    inputs = problem()
    expected = rk4_mlp(*inputs, [0.25, 1.0])
    for times in ((0.25, 1), np.array([0.25, 1.0]), torch.tensor([0.25, 1.0])):
        assert torch.equal(rk4_mlp(*inputs, times), expected)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives(activation, backend):
    inputs = [x.requires_grad_() for x in problem(n=2, dim=3, layers=2)]

    def solve(*tensors):
        return rk4_mlp(*tensors, [0.3, 1.0], steps=2, activation=activation, backend=backend)

    assert gradcheck(solve, inputs)
    assert gradgradcheck(solve, inputs)


def gradients(inputs, times, steps, activation, solve=rk4_mlp, **options):
    """Gradients of all inputs, for a fixed random gradient of the result."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = solve(*leaves, times, steps=steps, activation=activation, **options)
    generator = torch.Generator().manual_seed(5)
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64) / max(1, len(output[0]))
    return torch.autograd.grad(output, leaves, upstream.to(output.dtype))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n", "dim", "layers", "times", "steps"),
    [(3, 5, 3, [0.3, 1.0], 4), (1, 16, 1, [1.0], 2), (20, 33, 2, [0.1, 0.2, 0.9], 3), (6, 64, 4, [0.5], 2)],
)
def test_gradients(n, dim, layers, times, steps, activation, dtype, backend, assert_accurate, poisoned_memory):
    inputs = problem(n, dim, layers, dtype, scale=0.7)
    if activation == "lrelu" and dtype in HALF:
        # An input of the kink's other side has another gradient: none may lie so near 0 that rounding moves it there.
        inputs = (inputs[0], inputs[1] / 8, inputs[2].sign() * (1 + inputs[2].abs()), inputs[3] / 16)
    actual = gradients(inputs, times, steps, activation, backend=backend)
    plain = gradients(inputs, times, steps, activation, backend="reference")
    exact = gradients([x.double() for x in inputs], times, steps, activation, backend="reference")
    for name, *gradient in zip(("h0", "weight", "bias", "time_weight"), actual, plain, exact, strict=True):
        assert gradient[2].abs().max() > 1e-3 or layers == 1, name
        assert_accurate(*gradient)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("n", [0, 3])
def test_gradients_of_only_some_inputs(n, backend):
    inputs, names = problem(n, 6, 2, torch.float32), ("h0", "weight", "bias", "time_weight")
    expected = dict(zip(names, gradients(inputs, [0.4, 1.0], 2, "silu", backend="reference"), strict=True))
    for needed in (["h0"], ["weight"], ["bias"], ["time_weight"], ["weight", "time_weight"], ["h0", "bias"]):
        leaves = [x.clone().requires_grad_(name in needed) for name, x in zip(names, inputs, strict=True)]
        output = rk4_mlp(*leaves, [0.4, 1.0], steps=2, backend=backend)
        generator = torch.Generator().manual_seed(5)
        upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64) / max(1, n)
        output.backward(upstream.to(output.dtype))
        for name, leaf in zip(names, leaves, strict=True):
            assert (leaf.grad is not None) == (name in needed)
            if name in needed:
                torch.testing.assert_close(leaf.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_without_the_states_between(backend):
    # What a compiler may ask for: the operator itself with the states at the requested times alone.
    def operator(*tensors, steps, activation):
        *tensors, times = tensors
        return torch.ops.spigan.rk4_mlp(*tensors, times, steps, False, activation, backend)

    inputs, times = problem(dtype=torch.float32), [0.35, 1.0]
    actual = gradients(inputs, times, 3, "tanh", operator)
    for a, e in zip(actual, gradients(inputs, times, 3, "tanh", backend="reference"), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_in_float32(backend):
    inputs, found = [x.requires_grad_() for x in problem(n=2, dim=4, layers=2, dtype=torch.float32)], []
    for name in (backend, "reference"):
        output = rk4_mlp(*inputs, [0.3, 1.0], steps=2, backend=name)
        first = torch.autograd.grad(output.pow(2).sum(), inputs[:2], create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    for a, e in zip(*found, strict=True):
        assert e.abs().max() > 1e-2
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_backward_pass_keeps_one_state_per_step(backend):
    n, dim, layers, times, steps = 6, 8, 3, [0.3, 1.0], 5
    inputs = [x.requires_grad_() for x in problem(n, dim, layers, torch.float32)]
    count = len(list(step_grid(times, steps)))
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = rk4_mlp(*inputs, times, steps=steps, backend=backend)
    assert count == 6 and output.shape == (2, n, dim)
    assert sum(kept.values()) == sum(x.numel() for x in inputs) + count * n * dim
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: pytest.fail("saved")):
        kept.clear()
        rk4_mlp(*inputs, times, steps=steps, backend=backend)
    assert not kept


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h0": [[1.0]]}, TypeError, r"h0 must be a torch.Tensor \[N, D\], got list"),
        ({"h0": torch.zeros(5)}, ValueError, r"h0 must have shape \[N, D\], got \[5\]"),
        ({"h0": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "h0 must have dtype float32, .*, got int64"),
        ({"h0": torch.zeros(3, 6)}, ValueError, r"weight must have shape \[L, D, D\] = \[3, 6, 6\], got \[3, 5, 5\]"),
        ({"h0": torch.zeros(3, 5, dtype=torch.float64)}, TypeError, "weight must have dtype float64, got float32"),
        (
            {"h0": torch.zeros(3, 5, device="meta")},
            ValueError,
            "weight must be on meta like the other arguments, got cpu",
        ),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
        ({"weight": torch.tensor(1.0)}, ValueError, r"weight must have shape \[L, D, D\]"),
        ({"weight": torch.zeros(5, 5)}, ValueError, r"weight must have shape \[L, D, D\]"),
        (
            {"weight": torch.zeros(3, 5, 4)},
            ValueError,
            r"weight must have shape \[L, D, D\] = \[3, 5, 5\], got \[3, 5, 4\]",
        ),
        (
            {"weight": torch.zeros(0, 5, 5), "bias": torch.zeros(0, 5), "time_weight": torch.zeros(0, 5)},
            ValueError,
            "weight must hold at least one layer",
        ),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must have shape \[L, D\] = \[3, 5\], got \[5\]"),
        ({"bias": torch.zeros(2, 5)}, ValueError, r"bias must have shape \[L, D\] = \[3, 5\], got \[2, 5\]"),
        ({"bias": torch.zeros(3, 5, dtype=torch.bfloat16)}, TypeError, "bias must have dtype float32, got bfloat16"),
        (
            {"time_weight": torch.zeros(3, 4)},
            ValueError,
            r"time_weight must have shape \[L, D\] = \[3, 5\], got \[3, 4\]",
        ),
        ({"time_weight": 0.0}, TypeError, "time_weight must be a torch.Tensor"),
        ({"times": []}, ValueError, "times must hold at least one time"),
        ({"times": 1.0}, TypeError, r"times must be a sequence of floats such as \[1.0\]"),
        ({"times": [0.0, 1.0]}, ValueError, r"times must increase strictly within \(0, 1\], got \[0.0, 1.0\]"),
        ({"times": [0.5, 0.5]}, ValueError, "times must increase strictly"),
        ({"times": [0.7, 0.5]}, ValueError, "times must increase strictly"),
        ({"times": [0.5, 1.1]}, ValueError, "times must increase strictly"),
        ({"times": [float("nan")]}, ValueError, "times must increase strictly"),
        ({"steps": 0}, ValueError, r"steps must be in \[1, 2\*\*63\), got 0"),
        ({"steps": 2.0}, TypeError, "steps must be an integer, got float"),
        ({"activation": "relu"}, ValueError, "activation must be one of silu, lrelu, tanh, softplus, got 'relu'"),
        ({"backend": "fast"}, ValueError, "backend= names the backend 'fast'"),
    ],
)
@pytest.mark.parametrize("backend", RUNNING)
def test_errors_name_the_argument(change, error, message, backend):
    names = ("h0", "weight", "bias", "time_weight")
    arguments = {**dict(zip(names, problem(dtype=torch.float32), strict=True)), "times": [0.5, 1.0]}
    with pytest.raises(error, match=message):
        rk4_mlp(**{**arguments, "backend": backend, **change})
