"""An iteration queues its work on a GPU without waiting for it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_helpers import digits, train

import spigan
from spigan.training import pace
from spigan.training.pace import AHEAD, Pace
from spigan.training.processes import Processes
from spigan.training.trainer import Trainer
from spigan.training.updates import ADA_INTERVAL, on_device

PACKAGE = os.path.dirname(spigan.__file__)
# Values that are never on a GPU: drawn times, and a filter in the matrix products of the CPU's kernels.
ON_HOST = (
    "times = sorted({*torch.rand(k - 1, dtype=torch.float64).tolist(), 1.0})",
    "filter_y, filter_x = (4.0 * filter",
)
SETTINGS = {
    "default": {"r1_interval": 1, "pl_weight": 1.0, "pl_interval": 1, "xflip": True},
    "joint": {"updates": "joint", "intervals": 3, "batch_gpu": 2, "augment": "diffaug"},
    "ada": {"augment": "ada", "ada_target": -1, "ada_kimg": 0.1},
    "bf16": {"precision": "bf16"},
}


def place() -> str:
    """Return the innermost line of the package that is running."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{os.path.basename(frames[-1].filename)}: {frames[-1].line}" if frames else "outside of the package"


class Waits(TorchDispatchMode):
    """Notes operators that read values or sizes back from the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")

    def __init__(self, found: list[str], on_host: list[Tensor]) -> None:
        super().__init__()
        self.found, self.on_host = found, on_host

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        waits = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)
        if (waits or name.startswith(self.NAMES)) and not any(args[0] is x for x in self.on_host):
            self.found.append(f"{name} in {place()}")
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Notes copies between host and device that are not queued."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        ours = sys._getframe(1).f_code.co_filename.startswith(PACKAGE)
        made = name in ("tensor", "as_tensor", "asarray") and kwargs.get("device") is not None
        moves = name == "to" and any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device")))
        moves = (moves or name == "cuda") and not kwargs.get("non_blocking")
        reads = name in ("cpu", "numpy", "new_tensor") or (name == "tolist" and not any(x in place() for x in ON_HOST))
        if ours and (made or moves or reads):
            self.found.append(f"{name} in {place()}")
        return function(*args, **kwargs)


@contextmanager
def waits(on_host: list[Tensor]) -> Iterator[list[str]]:
    """The calls in the block that would wait if the tensors were on a GPU, except `on_host`."""
    found: list[str] = []
    with Copies(found), Waits(found, on_host):
        yield found


def as_on_gpu(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let a trainer on the CPU do only what it does on a GPU. Return what a GPU run has on the CPU."""
    trainer.algorithm.updates.check_every_step = False
    # Under a dispatch mode, as in a compiler, the filter is made anew in each call.
    module = importlib.import_module("spigan.ops.modulated_conv2d")
    monkeypatch.setattr(module, "is_in_torch_dispatch_mode", lambda: False)
    return [buffer for name, buffer in trainer.state.augment.named_buffers() if name == "p"]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("processes", [1, 2])
def test_no_call_of_an_iteration_waits(
    new_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, name: str, processes: int
) -> None:
    """But ADA's own, once in `ADA_INTERVAL` iterations of the discriminator."""
    trainer = new_trainer(**SETTINGS[name])
    on_host = as_on_gpu(trainer, monkeypatch)
    for p in on_host:
        p.fill_(0.5)
    train(trainer, 2)  # what is computed once
    monkeypatch.setattr(trainer.processes, "count", processes)
    monkeypatch.setattr(Processes, "_call", lambda self, name, x: x.clone())
    images = [digits(trainer, start=number * 4) for number in range(2 * ADA_INTERVAL if on_host else 2)]
    with waits(on_host) as found:
        for batch in images:
            trainer.train_iteration(batch)
    expected = ["state.augment.adapt(mean.item()"] if name == "ada" else []
    assert len(found) == len(expected), found
    assert all(text in wait for text, wait in zip(expected, found, strict=True)), found


def test_waits_are_seen() -> None:
    """The counter of the test above counts each kind of wait."""
    x = torch.arange(4.0)
    namespace = {"torch": torch, "x": x, "cpu": torch.device("cpu")}
    kinds = (
        *("x[0].item()", "x.tolist()", "bool(x[0])", "x.nonzero()", "x[x > 1]", "torch.equal(x, x)"),
        *("x.cpu()", "x.to(cpu)", "torch.tensor([1.0], device=cpu)", "torch.where(x > 1)"),
    )
    for text in kinds:
        with waits([]) as found:
            eval(compile(text, os.path.join(PACKAGE, "example.py"), "eval"), namespace)
        assert found, text
    for text in ("x.to(cpu, non_blocking=True)", "x.double()", "torch.full((2,), 0.5, device=cpu)", "x[1:] + x[[1]]"):
        with waits([]) as found:
            eval(compile(text, os.path.join(PACKAGE, "example.py"), "eval"), namespace)
        assert not found, text


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_no_call_of_an_iteration_waits_on_a_gpu(new_trainer: Callable[..., Trainer], name: str) -> None:
    trainer = new_trainer(device="cuda", **SETTINGS[name])
    if name == "ada":
        trainer.state.augment.p.fill_(0.5)
    images = [digits(trainer, start=number * 4).pin_memory() for number in range(4 * ADA_INTERVAL)]
    for batch in images[: 2 * ADA_INTERVAL]:  # what is computed once
        trainer.train_iteration(batch)
    torch.cuda.synchronize()
    waited = []
    for batch in images[2 * ADA_INTERVAL :]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_iteration(batch)
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            waited.append(traceback.format_exc())
            break  # the iteration was cut off
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if name == "ada":
        assert len(waited) == 1 and "state.augment.adapt(mean.item()" in waited[0]
    else:
        assert not waited, waited[0]


def test_times_keep_their_values() -> None:
    times = [0.1, 1 / 3, 0.7123456789012345, 1.0]
    assert torch.equal(on_device(times, torch.device("cpu")), torch.tensor(times))


# ---- Other processes, and the queue ----


def test_a_stop_is_agreed_on_without_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through CPU tensors and the group of the CPUs, whatever the device."""
    processes = Processes(torch.device("cpu"))
    processes.device, processes.count, processes._hosts = torch.device("cuda"), 2, object()
    for others in (0, 1):
        calls = []

        def all_reduce(x: Tensor, op: Any, group: Any, others: int = others, calls: list[Any] = calls) -> None:
            calls.append((x.device.type, group))
            x.copy_(max(x, torch.tensor(others)))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        assert [processes.any(False), processes.any(True)] == [bool(others), True]
        assert calls == [("cpu", processes._hosts)] * 2


def test_the_host_runs_a_little_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each iteration waits for the one `AHEAD` before it, not for its own, so that the queue is never empty."""
    log: list[tuple[str, int]] = []

    class Event:
        made = 0

        def __init__(self, **options: Any) -> None:
            Event.made += 1
            self.number = Event.made

        def record(self, stream: object) -> None:
            log.append(("queued", self.number))

        def synchronize(self) -> None:
            log.append(("waited", self.number))

    monkeypatch.setattr(pace.torch.cuda, "Event", Event)
    monkeypatch.setattr(pace.torch.cuda, "current_stream", lambda device: object())
    on_gpu, on_cpu = Pace(torch.device("cuda", 0)), Pace(torch.device("cpu"))
    for _ in range(AHEAD + 2):
        on_gpu.step()
        on_cpu.step()
    assert [number for what, number in log if what == "queued"] == list(range(1, AHEAD + 3))
    assert [log.index(("waited", number)) > log.index(("queued", number + AHEAD)) for number in (1, 2)] == [True, True]
    assert len(log) == AHEAD + 2 + 2


def test_training_keeps_the_pace(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    monkeypatch.setattr(Pace, "step", lambda self: steps.append(self))
    trainer = Trainer(tiny_config(total_kimg=0.008), tmp_path / "run", progress=False)
    trainer.fit()
    assert len(steps) == trainer.iteration == 4 and len(set(map(id, steps))) == 1
