"""CUDA graphs of a sampler's batches: when one is captured, replayed, captured again and dropped."""

from __future__ import annotations

import gc
import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCuda
from torch import Tensor

import spigan
from spigan import Sampler
from spigan.sampling import count_evaluations, cuda_graph
from spigan.sampling import sampler as sampler_module

# Another batch size may take another path through the CPU's convolutions and so round differently.
ROUNDING = {"rtol": 0.0, "atol": 2e-6}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A faked torch.cuda, with models on a CPU taken for models on a GPU that has no graphs yet."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    monkeypatch.setattr(cuda_graph, "_pools", {})
    monkeypatch.setattr(sampler_module, "supports_cuda_graph", lambda model: True)
    return fake


class Evaluated(cuda_graph.BatchGraph):
    """A graph whose replay, faked as it is, computes the images of its seeds."""

    made: list[Evaluated]

    def __init__(self, model: Any, evaluate: Any, batch_size: int, *rest: Any) -> None:
        super().__init__(model, evaluate, batch_size, *rest)
        self.evaluate, self.batch_size, self.replays = evaluate, batch_size, 0
        Evaluated.made.append(self)

    def replay(self, seeds: Tensor) -> Tensor:
        super().replay(seeds)
        self.replays += 1
        return self.evaluate(seeds)


@pytest.fixture
def graphs(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[Evaluated]:
    """The graphs captured so far."""
    Evaluated.made = []
    monkeypatch.setattr(cuda_graph, "BatchGraph", Evaluated)
    return Evaluated.made


def replays(graphs: list[Evaluated]) -> list[tuple[int, int]]:
    return [(graph.batch_size, graph.replays) for graph in graphs]


def test_a_size_is_captured_at_its_second_use(images: Tensor, make: Any, graphs: list[Evaluated]) -> None:
    model = make()
    sampler = Sampler(model, batch_size=4)
    sampler(range(8))
    assert not graphs  # the parameters may be trained
    model.requires_grad_(False)
    torch.testing.assert_close(sampler(range(9)), images, **ROUNDING)
    assert replays(graphs) == [(4, 1)]  # the second of two batches; the ninth image is the first batch of its size
    torch.testing.assert_close(sampler(range(9)), images, **ROUNDING)
    assert replays(graphs) == [(4, 3), (1, 1)]
    sampler(range(4, 8))
    assert replays(graphs) == [(4, 4), (1, 1)]  # other seeds, the same graph
    sampler.of_noise(torch.randn(4, 3, 8, 8))
    assert replays(graphs) == [(4, 4), (1, 1)]  # only seeds are an input of the graph


def test_every_number_of_images_shares_the_sampler_of_sample(make: Any, graphs: list[Evaluated]) -> None:
    model = make().requires_grad_(False)
    for n in (3, 5, 3, 5):
        spigan.sample(n, model=model)
    assert len(model.kept_samplers) == 1 and replays(graphs) == [(3, 1), (5, 1)]


def test_changed_weights_are_captured_again(images: Tensor, make: Any, graphs: list[Evaluated]) -> None:
    model = make().requires_grad_(False)
    sampler = Sampler(model, batch_size=4)
    sampler(range(8))
    model.generator.b8.torgb.bias.add_(0.1)
    brighter = sampler(range(4))
    assert replays(graphs) == [(4, 1)] and graphs[0].freed  # its use counts anew
    sampler(range(4))
    assert replays(graphs) == [(4, 1), (4, 1)]
    assert (brighter - images[:4]).mean() > 0.03
    sampler.refresh()
    sampler(range(8))
    assert replays(graphs) == [(4, 1), (4, 1), (4, 1)]


def test_hooks_are_called(make: Any, graphs: list[Evaluated]) -> None:
    model = make().requires_grad_(False)
    sampler = Sampler(model, batch_size=4)
    with count_evaluations(model) as count:
        sampler(range(8))
    assert count == [8] and not graphs


def test_without_graphs(make: Any, graphs: list[Evaluated]) -> None:
    Sampler(make().requires_grad_(False), batch_size=4, cuda_graph=False)(range(12))
    assert not graphs


def test_the_caller_captures_a_graph_itself(make: Any, cuda: FakeCuda, graphs: list[Evaluated]) -> None:
    sampler = Sampler(make().requires_grad_(False), batch_size=4)
    cuda.capturing = True
    sampler(range(12))
    assert not graphs


def test_batches_of_a_stream_outlive_the_next_replay(images: Tensor, make: Any, graphs: list[Evaluated]) -> None:
    batches = list(Sampler(make().requires_grad_(False), batch_size=3).stream(range(9)))
    assert replays(graphs) == [(3, 2)]
    torch.testing.assert_close(torch.cat(batches), images, **ROUNDING)
    assert not any(batch.is_inference() for batch in batches)


def test_a_failing_capture_warns_once_and_sampling_continues(
    images: Tensor, make: Any, cuda: FakeCuda, graphs: list[Evaluated]
) -> None:
    sampler = Sampler(make().requires_grad_(False), batch_size=4)
    cuda.fails = RuntimeError("operation not permitted when stream is capturing")
    with pytest.warns(UserWarning, match="batch of 4 could not be captured.*not permitted when stream") as caught:
        results = [sampler(range(9)) for _ in range(3)]
    assert len(caught) == 1 and not graphs and len(cuda.captures) == 1
    torch.testing.assert_close(torch.stack(results), images.expand(3, -1, -1, -1, -1), **ROUNDING)
    assert cuda.current.name == "main"  # torch.cuda.graph itself leaves the stream of the capture as the current one
    cuda.fails = None
    sampler.refresh()
    sampler(range(8))
    assert replays(graphs) == [(4, 1)]


def test_graphs_of_all_samplers_share_a_pool_and_a_stream(make: Any, cuda: FakeCuda, graphs: list[Evaluated]) -> None:
    samplers = [Sampler(make().requires_grad_(False), batch_size=n) for n in (2, 3)]
    for sampler in samplers:
        sampler(range(6))
    assert len(graphs) == 2
    assert cuda.captures[0] == cuda.captures[1]  # the same pool and the same stream, which PyTorch asks for
    assert cuda.captures[0].keys() == {"pool", "stream", "capture_error_mode"}
    assert cuda.captures[0]["capture_error_mode"] == "thread_local"
    del samplers, sampler
    graphs.clear()
    gc.collect()
    Sampler(make().requires_grad_(False), batch_size=2)(range(4))
    assert cuda.captures[2]["pool"] != cuda.captures[0]["pool"]  # PyTorch does not take the handle of a dead pool


@pytest.mark.usefixtures("graphs")
def test_a_replay_waits_for_that_of_another_stream(make: Any, cuda: FakeCuda) -> None:
    first, second = (Sampler(make().requires_grad_(False), batch_size=n) for n in (2, 3))
    first(range(4))
    second(range(6))
    cuda.log.clear()
    with cuda.stream(cuda.stream_of("other")):
        first(range(2))
    second(range(3))
    assert cuda.log == [
        "other waits for the event of main", "other replays", "main waits for the event of other", "main replays",
    ]  # fmt: skip


def test_kept_memory_is_bounded_in_bytes(images: Tensor, make: Any, cuda: FakeCuda, graphs: list[Evaluated]) -> None:
    sampler = Sampler(make().requires_grad_(False), batch_size=9)
    cuda.graph_bytes = 400  # of 1000, a quarter of the device
    for n in (1, 1, 2, 2):
        sampler(range(n))
    assert replays(graphs) == [(1, 1), (2, 1)]
    for _ in range(2):
        torch.testing.assert_close(sampler(range(3)), images[:3], **ROUNDING)
    # Three do not fit. A pool gives its memory back only as a whole, so the third is captured again in a new one.
    assert [(graph.batch_size, graph.freed) for graph in graphs] == [(1, True), (2, True), (3, True), (3, False)]
    gc.collect()
    assert len({pool for pool, _ in cuda.memory.values()}) == 1 and len(cuda.memory) == 1
    for _ in range(3):
        sampler(range(1))
    assert len(graphs) == 4  # what was evicted waits for twice as many uses
    sampler(range(1))
    assert replays(graphs)[4:] == [(1, 1)]


def test_a_graph_that_is_too_large_is_not_kept(make: Any, cuda: FakeCuda, graphs: list[Evaluated]) -> None:
    sampler = Sampler(make().requires_grad_(False), batch_size=4)
    cuda.graph_bytes = 1001
    with pytest.warns(UserWarning, match="GraphMemoryError: it takes .* MiB; a smaller batch_size") as caught:
        sampler(range(16))
    assert len(caught) == 1
    assert [graph.freed for graph in graphs] == [True] and not cuda.memory


def test_outdated_graphs_are_freed_before_the_next_capture(make: Any, graphs: list[Evaluated]) -> None:
    model = make().requires_grad_(False)
    first, second = Sampler(model, batch_size=2), Sampler(model, batch_size=3)
    first(range(4))
    model.generator.b8.torgb.bias.add_(0.1)
    second(range(6))
    assert [(graph.batch_size, graph.freed) for graph in graphs] == [(2, True), (3, False)]


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


def test_results_outlive_the_next_replay(make: Any, cuda: FakeCuda) -> None:
    graph = cuda_graph.BatchGraph(make(), lambda seeds: seeds, 2, (), (0, 1), cuda.stream_of("side"))
    first = graph.replay(torch.tensor([5, 6]))  # its input is its output
    assert graph.replay(torch.tensor([7, 8])).tolist() == [7, 8] and first.tolist() == [5, 6]


def test_a_graph_keeps_the_weights_that_it_reads(make: Any, cuda: FakeCuda) -> None:
    model = make().requires_grad_(False)
    z = torch.zeros(2, 3, 8, 8)
    graph = cuda_graph.BatchGraph(model, lambda seeds: model(z), 2, (), (0, 1), cuda.stream_of("side"))
    prepared = weakref.ref(model.generator.prepared)
    assert model.generator.prepared.weights
    model.generator.b8.torgb.bias.add_(0.1)
    model(z)
    gc.collect()
    assert prepared() is not None and prepared() is not model.generator.prepared
    graph.free()
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
    for uses in (1, 2):
        result = sampler(range(9), to="cpu")
        assert result.is_pinned() and len(captured) == uses  # of 4 images, then also of the ninth alone
        torch.testing.assert_close(result, images, rtol=0, atol=atol)
    assert sampler(range(9)).is_cuda
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.testing.assert_close(sampler(range(9), to="cpu"), result, rtol=0, atol=0)
    eager = Sampler(model, batch_size=4, dtype=dtype, cuda_graph=False)(range(9), to="cpu")
    torch.testing.assert_close(eager, result, rtol=0, atol=1e-5)
    model.generator.b8.torgb.bias.add_(0.1)
    assert (sampler(range(8), to="cpu")[:4] - images[:4]).mean() > 0.03
    assert len(captured) == 3 and captured[0].freed


@pytest.mark.gpu
def test_a_failing_capture_on_a_gpu(images: Tensor, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().requires_grad_(False).cuda()
    sampler = Sampler(model, batch_size=4)

    evaluate = sampler._evaluate

    def reads_back(seeds: Tensor) -> Tensor:
        seeds.sum().item()  # waits for the device, which a capture does not permit
        return evaluate(seeds)

    monkeypatch.setattr(sampler, "_evaluate", reads_back)
    before = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="could not be captured") as caught:
        result = sampler(range(9), to="cpu")
    assert len(caught) == 1 and torch.cuda.current_stream() == before
    torch.testing.assert_close(result, images, rtol=0, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(model, batch_size=2)(range(8))  # graphs of other samplers still work
