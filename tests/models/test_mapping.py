"""Mapping networks against SciPy's integrator and StyleGAN2's formula, and the incremental solve of several times."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.nn import functional as F

from spigan.models import MLPMapping, ODEMapping
from spigan.models.mapping import fold
from spigan.ops import use_backend

mapping_module = importlib.import_module("spigan.models.mapping")
op_module = importlib.import_module("spigan.ops.rk4_mlp")  # spigan.ops.rk4_mlp as an attribute is the function

DIM, LAYERS = 6, 3


def make(solver: str = "rk4", *, steps: int = 4, activation: str = "silu", seed: int = 0, **changes: Any) -> ODEMapping:
    """A tiny mapping network whose every parameter matters."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "resolution": 8,
        "img_channels": 1,
        "dim_h": DIM,
        "layers": LAYERS,
        "embed_channels": 3,
        "lr_multiplier": 0.01,
        "tolerance": 1e-5,
    }
    mapping = ODEMapping(solver=solver, steps=steps, activation=activation, **settings | changes)
    with torch.no_grad():
        mapping.bias.normal_().div_(0.01)
        for layer in (*mapping.embed.convs, mapping.embed.linear):
            layer.bias.normal_().div_(0.01)
    return mapping


def noise(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(5), dtype=dtype)


def embedding(mapping: ODEMapping, z: Tensor) -> Tensor:
    """o(z) written out: 8x8 noise, one stride-2 convolution, linear layer, rows of mean square 1; multiplier 0.01."""
    conv, linear = mapping.embed.convs[0], mapping.embed.linear
    x = F.conv2d(z, 0.01 * conv.weight / math.sqrt(9), 0.01 * conv.bias, stride=2, padding=1)
    x = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    x = x.flatten(1) @ linear.weight.T * 0.01 / math.sqrt(3 * 16) + linear.bias * 0.01
    return x / (x.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()


def exact(mapping: ODEMapping, z: Tensor, times: Sequence[float]) -> np.ndarray:
    """h(t) by SciPy's order-8 method; the time is concatenated to the input of each of r's layers."""
    weights = [mapping.weight / math.sqrt(DIM), mapping.time_weight[:, :, None]]
    weight = torch.cat(weights, dim=2).detach().numpy() * 0.01
    bias = mapping.bias.detach().numpy() * 0.01

    def field(t: float, state: np.ndarray) -> np.ndarray:
        y = state.reshape(-1, DIM)
        for layer in range(LAYERS):
            y = np.concatenate([y, np.full((len(y), 1), t)], axis=1) @ weight[layer].T + bias[layer]
            if layer < LAYERS - 1:
                y = y / (1 + np.exp(-y))  # silu
        return y.ravel()

    h0 = embedding(mapping, z).detach().numpy()
    solution = solve_ivp(field, (0.0, 1.0), h0.ravel(), method="DOP853", t_eval=times, rtol=1e-11, atol=1e-12)
    return solution.y.T.reshape(len(times), -1, DIM)


@pytest.mark.parametrize(("solver", "order"), [("rk4", 4), ("euler", 1)])
def test_solver_converges_with_its_order(solver: str, order: int) -> None:
    z, times = noise(dtype=torch.float64), [0.25, 0.75, 1.0]
    errors = []
    for steps in (16, 32):
        mapping = make(solver, steps=steps).double()
        h = mapping(z, times).detach().numpy()
        errors.append(np.abs(h - exact(mapping, z, times)).max(axis=(1, 2)))
    assert (errors[0] > 1e-9).all()  # else the ratio would measure rounding
    ratio = errors[0] / errors[1]
    assert (ratio > 0.8 * 2**order).all() and (ratio < 1.25 * 2**order).all()


def test_dopri5_is_within_its_tolerance() -> None:
    z, times = noise(dtype=torch.float64), [0.3, 0.31, 1.0]
    errors = {}
    for tolerance in (1e-4, 1e-9):
        mapping = make("dopri5", tolerance=tolerance).double()
        errors[tolerance] = np.abs(mapping(z, times).detach().numpy() - exact(mapping, z, times)).max()
    assert errors[1e-4] < 1e-2
    assert errors[1e-9] < 1e-6 < errors[1e-4]


def test_default_solver_in_float32() -> None:
    """rk4 with 4 steps, as the presets use it, is near the true solution; the solvers agree."""
    times = [0.25, 0.5, 1.0]
    mapping = make()
    z = noise()
    expected = exact(make().double(), z.double(), times)
    size = np.abs(expected).max()
    assert np.abs(mapping(z, times).detach().numpy() - expected).max() < 2e-3 * size
    assert np.abs(make("euler", steps=512)(z, times).detach().numpy() - expected).max() < 2e-2 * size
    assert np.abs(make("dopri5")(z, times).detach().numpy() - expected).max() < 1e-4 * size


@pytest.mark.parametrize("solver", ["rk4", "euler", "dopri5"])
def test_times_in_any_order_with_duplicates_and_zero(solver: str) -> None:
    mapping, z = make(solver), noise()
    h = mapping(z, [1.0, 0.0, 0.5, 1.0, 0.0, 0.25])
    in_order = mapping(z, [0.25, 0.5, 1.0])
    assert h.shape == (6, 3, DIM)
    for row, expected in enumerate([in_order[2], embedding(mapping, z), in_order[1], in_order[2], h[1], in_order[0]]):
        torch.testing.assert_close(h[row], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(h[0], h[3]) and torch.equal(h[1], h[4])
    assert (h[0] - h[1]).abs().max() > 0.05  # the ODE moves h


@pytest.mark.parametrize("solver", ["rk4", "euler", "dopri5"])
def test_shapes_of_one_time_and_of_a_list(solver: str) -> None:
    mapping, z = make(solver), noise()
    for t in (0, 0.0, 0.5, 1, 1.0):
        assert mapping(z, t).shape == (3, DIM)
        assert torch.equal(mapping(z, [t]), mapping(z, t)[None])
    assert torch.equal(mapping(z), mapping(z, 1.0))
    assert torch.equal(mapping(z, (0.5, 1.0)), mapping(z, [0.5, 1.0]))
    assert mapping(z[:0], [0.5, 1.0]).shape == (2, 0, DIM)


@pytest.mark.parametrize("solver", ["rk4", "euler"])
def test_list_equals_separate_calls_where_the_steps_coincide(solver: str) -> None:
    mapping, z = make(solver, steps=4), noise()
    h = mapping(z, [0.25, 0.5, 1.0])
    for row, t in enumerate([0.25, 0.5, 1.0]):
        assert torch.equal(h[row], mapping(z, t))
    # A time off the grid of four steps changes the steps, hence the discretisation error, and nothing else.
    off_grid = mapping(z, [0.3, 1.0])
    assert torch.equal(off_grid[0], mapping(z, 0.3))
    assert not torch.equal(off_grid[1], h[2])
    torch.testing.assert_close(off_grid[1], h[2], rtol=0, atol=1e-2 if solver == "rk4" else 0.3)


@pytest.mark.parametrize(("solver", "stages"), [("rk4", 4), ("euler", 1)])
def test_several_times_cost_one_solve(monkeypatch: pytest.MonkeyPatch, solver: str, stages: int) -> None:
    """The paper's trick (section 3.5): from t_{k-1} to t_k, never again from 0."""
    asked: list[float] = []
    original = op_module.mlp_vector_field

    def counting(h: Tensor, t: float, *rest: Any) -> Tensor:
        asked.append(t)
        return original(h, t, *rest)

    monkeypatch.setattr(op_module, "mlp_vector_field", counting)
    monkeypatch.setattr(mapping_module, "mlp_vector_field", counting)
    mapping, z = make(solver, steps=4), noise()
    with use_backend("reference"):
        mapping(z, 1.0)
        alone = asked.copy()
        asked.clear()
        mapping(z, [0.25, 0.5, 1.0])
    assert len(alone) == 4 * stages
    assert asked == alone
    assert asked == sorted(asked) and asked.count(0.0) == 1


def test_dopri5_solves_once_for_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchdiffeq

    calls = []
    original = torchdiffeq.odeint

    def counting(field: Any, h0: Tensor, times: Tensor, **options: Any) -> Tensor:
        calls.append(times.tolist())
        return original(field, h0, times, **options)

    monkeypatch.setattr(torchdiffeq, "odeint", counting)
    make("dopri5")(noise(), [1.0, 0.0, 0.25])
    assert calls == [[0.0, 0.25, 1.0]]


def test_dopri5_without_torchdiffeq_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r'"dopri5" needs torchdiffeq: pip install "spigan\[ode\]"'):
        make("dopri5")(noise())
    assert make("dopri5")(noise(), 0.0).shape == (3, DIM)  # nothing to solve, nothing needed


@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan, [], [0.5, 2.0]])
def test_time_out_of_range(t: Any) -> None:
    with pytest.raises(ValueError, match=r"t must be a time in \[0, 1\] or a non-empty list"):
        make()(noise(), t)


@pytest.mark.parametrize("activation", ["silu", "lrelu", "tanh", "softplus"])
def test_activation_is_used_and_gradients_reach_every_parameter(activation: str) -> None:
    mapping = make(activation=activation)
    h = mapping(noise(), [0.5, 1.0])
    for other in {"silu", "lrelu", "tanh", "softplus"} - {activation}:
        assert not torch.allclose(h, make(activation=other)(noise(), [0.5, 1.0]))
    (h * torch.randn(h.shape)).sum().backward()
    for name, parameter in mapping.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_embedding_halves_down_to_4x4() -> None:
    mapping = make(resolution=64, img_channels=3, embed_channels=2)
    widths = [(conv.weight.shape[1], conv.weight.shape[0]) for conv in mapping.embed.convs]
    assert widths == [(3, 2), (2, 4), (4, 6), (6, 6)]  # doubled at each convolution, never above dim_h = 6
    assert mapping.embed.linear.weight.shape == (DIM, 6 * 16)
    assert mapping(torch.randn(2, 3, 64, 64)).shape == (2, DIM)


@pytest.mark.parametrize("kind", ["ode", "mlp"])
def test_autocast_leaves_the_mapping_in_float32(kind: str) -> None:
    torch.manual_seed(0)
    mapping: Any = make() if kind == "ode" else MLPMapping(dim_h=8, layers=3, lr_multiplier=0.01)
    z = noise() if kind == "ode" else torch.randn(3, 8)
    expected = mapping(z)
    with torch.autocast("cpu", torch.bfloat16):
        h = mapping(z)
    assert h.dtype == torch.float32
    assert torch.equal(h, expected)


@pytest.mark.parametrize("lr_multiplier", [0.01, 1.0])
def test_mlp_mapping_is_stylegan2s(lr_multiplier: float) -> None:
    torch.manual_seed(1)
    mapping = MLPMapping(dim_h=8, layers=3, lr_multiplier=lr_multiplier)
    z = 3 * torch.randn(4, 8)
    x = z.numpy().astype(np.float64)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-8)
    assert len(mapping.layers) == 3
    for layer in mapping.layers:
        torch.nn.init.normal_(layer.bias, std=1 / lr_multiplier)
        weight, bias = layer.weight.detach().numpy().astype(np.float64), layer.bias.detach().numpy()
        x = x @ weight.T * (lr_multiplier / math.sqrt(8)) + bias * lr_multiplier
        x = np.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    h = mapping(z)
    np.testing.assert_allclose(h.detach().numpy(), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(mapping(z, 1), h)
    assert torch.equal(mapping(z, [1.0]), h[None])
    torch.testing.assert_close(mapping(7 * z), h)  # z is normalised first


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 5), (2, 2, 2), (16,)])
def test_mlp_mapping_of_noise_images(shape: tuple[int, ...]) -> None:
    """More than D values are folded to D standard normal ones, each a scaled sum of its own share of the pixels."""
    values = math.prod(shape)
    mapping = MLPMapping(dim_h=16, layers=2, lr_multiplier=1.0, dim_z=values)
    z = torch.randn(20_000, *shape, generator=torch.Generator().manual_seed(0))
    assert mapping(z[:3]).shape == (3, 16) and mapping.layers[0].weight.shape == (16, min(values, 16))
    folded = fold(z.flatten(1), min(values, 16))
    assert folded.mean(0).abs().max() < 0.05 and (torch.cov(folded.T) - torch.eye(len(folded[0]))).abs().max() < 0.06
    flat = z.flatten(1)
    expected = torch.stack([flat[:, j::16].sum(1) / flat[0, j::16].numel() ** 0.5 for j in range(folded.shape[1])], 1)
    torch.testing.assert_close(folded, expected)


@pytest.mark.parametrize("t", [0.5, 0, [0.5, 1.0], [1.0, 1.0], []])
def test_mlp_mapping_has_no_time(t: Any) -> None:
    with pytest.raises(ValueError, match=r'mapping="mlp" has no time: t must be 1\.0, got'):
        MLPMapping(dim_h=8, layers=1, lr_multiplier=1.0)(torch.randn(2, 8), t)
