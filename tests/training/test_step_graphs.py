"""Steps as CUDA graphs: the same training in fewer calls. On a CPU, a tape of operators stands in for a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import digits, train

from spigan.ops import use_backend
from spigan.training import step_graphs, updates
from spigan.training.trainer import Trainer
from spigan.training.updates import Updates

SETTINGS: dict[str, tuple[dict[str, Any], int]] = {  # fields, and number of graphs
    "default": ({"r1_interval": 2, "pl_weight": 1.0, "pl_interval": 2, "xflip": True}, 2),
    "ada": ({"augment": "ada", "ada_target": -1, "ada_kimg": 0.08}, 3),  # another for D's steps while p = 0
    "diffaug, joint": ({"augment": "diffaug", "updates": "joint", "intervals": 3}, 2),
    "mlp": ({"model": {"mapping": "mlp"}, "intervals": 1}, 2),
    "bf16": ({"precision": "bf16"}, 2),
    # Times that float32 holds exactly. One after another, they are replayed by the same graphs.
    "analytic": ({"path": "analytic", "intervals": 4, "fixed_t": True}, 2),
    "split": ({"path": "analytic", "times": "split", "fixed_t": True, "path_latent": "t"}, 2),
}
for settings, _ in SETTINGS.values():
    settings["model"] = {"ode_steps": 1} | settings.get("model", {})
ITERATIONS = 10


@pytest.fixture(autouse=True)
def _short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs come, and p moves, within few iterations. A tape holds PyTorch's operators, not our kernels."""
    monkeypatch.setattr(step_graphs, "WARM_UP", 1)
    monkeypatch.setattr(updates, "ADA_INTERVAL", 2)
    if request.node.get_closest_marker("gpu"):
        yield
    else:
        with use_backend("reference"):
            yield


class Recorder(TorchDispatchMode):
    """Records operators with their very arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Tape:
    """Does on a CPU what a CUDA graph does: it knows numbers and addresses, and none of the Python that chose them."""

    made: list[Tape]

    def __init__(self, function: Callable[[], list[Tensor]], device: torch.device, pool: Any) -> None:
        with Recorder() as recorder:
            self.outputs = function()
        self.calls = [call for call in recorder.calls if not self._is_view(call[0])]
        for output in self.outputs:
            output.fill_(torch.nan)  # a capture computes nothing
        self.replays = 0
        Tape.made.append(self)

    @staticmethod
    def _is_view(function: Any) -> bool:
        infos = [returned.alias_info for returned in function._schema.returns]
        return any(info is not None and not info.is_write for info in infos)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            new = function(*args, **kwargs)
            for old, value in zip(*((x if isinstance(x, (tuple, list)) else [x]) for x in (result, new)), strict=True):
                if isinstance(old, Tensor) and old is not value:
                    old.copy_(value)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes recorded so far."""
    Tape.made = []
    monkeypatch.setattr(step_graphs, "CudaGraph", Tape)
    return Tape.made


def graphed(trainer: Trainer) -> Trainer:
    trainer.algorithm.updates.graphs.enabled = True
    return trainer


def differing(a: Trainer, b: Trainer) -> list[str]:
    (tensors, counters), (expected, expected_counters) = a.state.dump(), b.state.dump()
    assert counters | {"elapsed": 0} == expected_counters | {"elapsed": 0} and tensors.keys() == expected.keys()
    return [name for name in tensors if not torch.equal(tensors[name], expected[name])]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ("default", "ada") else []) for name in SETTINGS]
)
def test_the_same_training(new_trainer: Callable[..., Trainer], tapes: list[Tape], name: str) -> None:
    """To the bit: weights, optimisers, statistics, ADA's p and random states, with other times in every iteration."""
    settings, graphs = SETTINGS[name]
    eager = new_trainer(**settings)
    train(eager, ITERATIONS)
    assert not tapes
    replayed = graphed(new_trainer(**settings))
    train(replayed, ITERATIONS)
    assert len(tapes) == graphs and all(tape.replays > 2 for tape in tapes[-2:])
    assert replayed.algorithm.updates.graphs.enabled
    assert differing(replayed, eager) == []


@pytest.mark.slow
def test_a_baked_number_is_noticed(
    new_trainer: Callable[..., Trainer], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tape is no mere second call: times that are numbers would stay those of the capture."""
    eager = new_trainer()
    train(eager, ITERATIONS)
    trainer = graphed(new_trainer())
    logits = Updates._logits

    def baked(self: Any, images: Tensor, times: Any) -> Tensor:
        return logits(self, images, times.tolist() if isinstance(times, Tensor) else times)

    monkeypatch.setattr(Updates, "_logits", baked)
    train(trainer, ITERATIONS)
    assert tapes and "model.generator.b8.conv1.weight" in differing(trainer, eager)


@pytest.mark.parametrize(
    "kind", ["wrong", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("raises", "stale"))]
)
def test_training_goes_on_without_a_graph_that_fails(
    new_trainer: Callable[..., Trainer], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """To the bit as if there had been none, and with one warning."""

    class Broken(Tape):
        def __init__(self, function: Callable[[], list[Tensor]], device: torch.device, pool: Any) -> None:
            super().__init__(function, device, pool)
            torch.rand(3)  # draws that must not count
            if kind == "raises":
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

        def replay(self) -> None:
            super().replay()
            if kind == "wrong":
                self.outputs[1].mul_(3.0)
            elif kind == "stale":
                for output in self.outputs:
                    output.zero_()

    eager = new_trainer()
    train(eager, 8)
    trainer = graphed(new_trainer())
    monkeypatch.setattr(step_graphs, "CudaGraph", Broken)
    with pytest.warns(UserWarning, match="without CUDA graphs.*discriminator_part.*cuda_graph to false") as warned:
        train(trainer, 8)
    assert len(warned) == 1 and "more" not in str(warned[0].message)
    assert not trainer.algorithm.updates.graphs.enabled
    assert differing(trainer, eager) == []


def test_parts_of_a_minibatch_are_no_graphs(new_trainer: Callable[..., Trainer], tapes: list[Tape]) -> None:
    train(graphed(new_trainer(batch_gpu=2)), 6)
    assert not tapes


@pytest.mark.slow
def test_penalties_come_before_graphs(new_trainer: Callable[..., Trainer], tapes: list[Tape]) -> None:
    """Their memory must be known: a run resumed between them waits for the next ones."""
    trainer = graphed(new_trainer(r1_interval=4, pl_weight=1.0, pl_interval=2))
    trainer.state.iteration = 2
    train(trainer, 6)  # up to the path lengths of iteration 5; R1 comes in iteration 8
    assert not tapes
    train(trainer, 8)
    assert len(tapes) == 2


@pytest.mark.slow
def test_graphs_are_few(
    new_trainer: Callable[..., Trainer], tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_graphs, "MAX_GRAPHS", 3)
    trainer = graphed(new_trainer(mbstd_group=1))
    for number in range(4):
        for n in (4, 3, 2):
            for _ in range(2):
                trainer.train_iteration(digits(trainer, n, start=number))
    assert len(tapes) == 3


def test_a_cpu_has_no_graphs(new_trainer: Callable[..., Trainer]) -> None:
    assert new_trainer().config.cuda_graph and not new_trainer().algorithm.updates.graphs.enabled


def test_most_calls_are_in_the_graphs(new_trainer: Callable[..., Trainer], tapes: list[Tape]) -> None:
    """What is left in an iteration: the path, the mapping, the optimiser and averages."""
    trainer = graphed(new_trainer(updates="joint", r1_gamma=0, model={"ode_steps": 1}))
    images = digits(trainer)
    with Recorder() as eager:
        for _ in range(2):
            trainer.train_iteration(images)
    train(trainer, 4)
    assert len(tapes) == 2
    inside = sum(len(tape.calls) for tape in tapes)
    for tape in tapes:
        tape.calls = []
    with Recorder() as left:
        for _ in range(2):
            trainer.train_iteration(images)
    assert inside > 300 and len(left.calls) < 0.5 * len(eager.calls), (inside, len(left.calls), len(eager.calls))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SETTINGS])
def test_graphs_on_a_gpu(new_trainer: Callable[..., Trainer], name: str) -> None:
    """They are made without a warning, and train as without."""
    settings, graphs = SETTINGS[name]
    ends = []
    for cuda_graph in (False, True):
        trainer = new_trainer(device="cuda", cuda_graph=cuda_graph, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(trainer, ITERATIONS)
        assert len(trainer.algorithm.updates.graphs._graphs) == (graphs if cuda_graph else 0)
        ends.append(trainer.state.dump()[0])
    assert torch.equal(ends[0]["rng.cuda"], ends[1]["rng.cuda"])
    for key in ("statistics.loss_d", "statistics.loss_g"):
        torch.testing.assert_close(ends[1][key], ends[0][key], rtol=0.05, atol=0.02)
