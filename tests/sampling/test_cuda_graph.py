"""CUDA graphs of a sampler's batches: when one is captured, replayed and captured again."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan import SPIGAN, Sampler
from spigan.sampling import count_evaluations, cuda_graph
from spigan.sampling import sampler as sampler_module

# Another batch size may take another path through the CPU's convolutions and so round differently.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


class FakeGraph:
    """Stands in for `BatchGraph` on a CPU: it evaluates at once into one buffer, and counts."""

    captured: list[FakeGraph]

    def __init__(self, model: SPIGAN, evaluate: Callable[[Tensor], Tensor], batch_size: int, state: Any) -> None:
        self.state, self.evaluate, self.batch_size, self.replays = state, evaluate, batch_size, 0
        self.buffer = torch.empty(0)
        FakeGraph.captured.append(self)

    def replay(self, seeds: Tensor) -> Tensor:
        assert seeds.shape == (self.batch_size,)
        self.replays += 1
        result = self.evaluate(seeds)
        self.buffer = result.clone() if self.replays == 1 else self.buffer.copy_(result)
        return self.buffer


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """The graphs captured so far, with the model on a CPU taken for one on a GPU."""
    FakeGraph.captured = []
    monkeypatch.setattr(cuda_graph, "BatchGraph", FakeGraph)
    monkeypatch.setattr(sampler_module, "supports_cuda_graph", lambda model: True)
    return FakeGraph.captured


def replays(captured: list[FakeGraph]) -> list[int]:
    return [graph.replays for graph in captured]


def test_full_batches_of_frozen_models_are_graphs(images: Tensor, make: Any, captured: list[FakeGraph]) -> None:
    model = make()
    sampler = Sampler(model, batch_size=4)
    sampler(range(4))
    assert not captured  # the parameters may be trained
    model.requires_grad_(False)
    torch.testing.assert_close(sampler(range(9)), images, **ROUNDING)
    assert replays(captured) == [2]  # the ninth image alone is not a full batch
    sampler(range(4, 8))
    assert replays(captured) == [3]  # other seeds, the same graph
    sampler.of_noise(torch.randn(4, 3, 8, 8))
    assert replays(captured) == [3]  # only seeds are an input of the graph


def test_changed_weights_are_captured_again(images: Tensor, make: Any, captured: list[FakeGraph]) -> None:
    model = make().requires_grad_(False)
    sampler = Sampler(model, batch_size=4)
    sampler(range(4))
    model.generator.b8.torgb.bias.add_(0.1)
    brighter = sampler(range(4))
    assert replays(captured) == [1, 1]
    assert (brighter - images[:4]).mean() > 0.03
    sampler.refresh()
    sampler(range(4))
    assert replays(captured) == [1, 1, 1]


def test_hooks_are_called(make: Any, captured: list[FakeGraph]) -> None:
    model = make().requires_grad_(False)
    sampler = Sampler(model, batch_size=4)
    with count_evaluations(model) as count:
        sampler(range(4))
    assert count == [4] and not captured


def test_without_graphs(make: Any, captured: list[FakeGraph]) -> None:
    Sampler(make().requires_grad_(False), batch_size=4, cuda_graph=False)(range(4))
    assert not captured


def test_batches_of_a_stream_outlive_the_next_replay(images: Tensor, make: Any, captured: list[FakeGraph]) -> None:
    batches = list(Sampler(make().requires_grad_(False), batch_size=3).stream(range(9)))
    assert replays(captured) == [3]
    torch.testing.assert_close(torch.cat(batches), images, **ROUNDING)
    assert not any(batch.is_inference() for batch in batches)


@pytest.mark.parametrize(
    ("changes", "device", "supported"),
    [
        ({}, "cuda", True),
        ({"ode_solver": "euler"}, "cuda", True),
        ({"ode_solver": "dopri5"}, "cuda", False),
        ({"ode_solver": "dopri5", "mapping": "mlp"}, "cuda", True),  # no ODE to solve
        ({}, "cpu", False),
    ],
)
def test_models_that_can_be_captured(make: Any, changes: dict[str, Any], device: str, supported: bool) -> None:
    parameter = SimpleNamespace(device=torch.device(device))
    model: Any = SimpleNamespace(config=make(**changes).config, parameters=lambda: iter([parameter]))
    assert cuda_graph.supports_cuda_graph(model) == supported


@pytest.fixture
def capture_options(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`BatchGraph` with a torch.cuda that does nothing; collects what torch.cuda.graph was called with."""
    seen: dict[str, Any] = {}
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def context(*args: Any, **options: Any) -> Any:
        seen.update(options)
        yield

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: stream)
    monkeypatch.setattr(torch.cuda, "device", context)
    monkeypatch.setattr(torch.cuda, "stream", context)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", context)
    return seen | {"stream": stream, "seen": seen}


def test_a_graph_is_captured_on_its_device(make: Any, capture_options: dict[str, Any]) -> None:
    """torch.cuda.graph without a stream takes that of the first device that ever captured."""
    cuda_graph.BatchGraph(make(), lambda seeds: seeds, 2, ())
    assert capture_options["seen"] == {"stream": capture_options["stream"], "capture_error_mode": "thread_local"}


@pytest.mark.usefixtures("capture_options")
def test_results_outlive_the_next_replay(make: Any) -> None:
    graph = cuda_graph.BatchGraph(make(), lambda seeds: seeds, 2, ())  # its input is its output
    first = graph.replay(torch.tensor([5, 6]))
    assert graph.replay(torch.tensor([7, 8])).tolist() == [7, 8] and first.tolist() == [5, 6]


@pytest.mark.usefixtures("capture_options")
def test_a_graph_keeps_the_weights_that_it_reads(make: Any) -> None:
    model = make().requires_grad_(False)
    graph = cuda_graph.BatchGraph(model, lambda seeds: model(torch.zeros(2, 3, 8, 8)), 2, ())
    prepared = weakref.ref(model.generator.prepared)
    assert model.generator.prepared.weights
    model.generator.b8.torgb.bias.add_(0.1)
    model(torch.zeros(2, 3, 8, 8))
    gc.collect()
    assert prepared() is not None and prepared() is not model.generator.prepared
    del graph
    gc.collect()
    assert prepared() is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampler_on_a_gpu(dtype: torch.dtype, images: Tensor, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    class Noted(cuda_graph.BatchGraph):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            captured.append(self)

    monkeypatch.setattr(cuda_graph, "BatchGraph", Noted)
    model = make().requires_grad_(False).cuda()
    sampler = Sampler(model, batch_size=4, dtype=dtype)
    atol = 1e-2 if dtype == torch.bfloat16 else 2e-3  # cuDNN rounds float32 to TF32 by default
    for _ in range(2):
        result = sampler(range(9), to="cpu")
        assert result.is_pinned() and len(captured) == 1
        torch.testing.assert_close(result, images, rtol=0, atol=atol)
    assert sampler(range(9)).is_cuda
    eager = Sampler(model, batch_size=4, dtype=dtype, cuda_graph=False)(range(9), to="cpu")
    torch.testing.assert_close(eager, result, rtol=0, atol=1e-5)
    model.generator.b8.torgb.bias.add_(0.1)
    assert (sampler(range(4), to="cpu") - images[:4]).mean() > 0.03
    assert len(captured) == 2
