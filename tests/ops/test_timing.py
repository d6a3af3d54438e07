"""spigan.ops.timing: what is inside the measured time, on a CPU and with a faked GPU."""

from __future__ import annotations

import contextlib
import time

import pytest
import torch

from spigan.ops import timing
from spigan.ops.timing import seconds_per_call, without_launches

CUDA = torch.device("cuda:1")


def test_mean_time_of_a_call_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += 0.25

    assert seconds_per_call(call, 8, torch.device("cpu")) == 0.25
    assert clock[0] == 2.0


class FakeGpu:
    """A GPU with a clock of its own: kernels queue up, and events note when their turn comes."""

    LAUNCH, KERNEL = 20e-6, 3e-6  # of the host and of the device, in seconds

    def __init__(self) -> None:
        self.host = self.busy_until = self.last_event = 0.0
        self.log: list[str] = []

    def enqueue(self, seconds: float) -> None:
        self.busy_until = max(self.busy_until, self.host) + seconds

    def kernel(self) -> None:
        self.host += self.LAUNCH
        self.enqueue(self.KERNEL)
        self.log.append("call")

    def spin(self, cycles: int) -> None:
        assert isinstance(cycles, int)
        self.enqueue(cycles / 2e9)
        self.log.append("spin")

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)


class Event:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.time = max(self.gpu.busy_until, self.gpu.host)
        self.gpu.log.append("event")

    def synchronize(self) -> None:
        self.gpu.host = max(self.gpu.host, self.time)

    def elapsed_time(self, stop: Event) -> float:
        assert self.gpu.host >= stop.time, "read before it was recorded"
        return 1e3 * (stop.time - self.time)


def test_a_gpu_is_timed_without_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, devices = FakeGpu(), []

    def device(chosen: torch.device) -> contextlib.nullcontext[None]:
        devices.append(chosen)
        return contextlib.nullcontext()

    monkeypatch.setattr(time, "perf_counter", lambda: gpu.host)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.spin, raising=False)
    # Twenty launches take longer than twenty kernels, so the device would wait for the host between them.
    assert seconds_per_call(gpu.kernel, 20, CUDA) == pytest.approx(FakeGpu.KERNEL)
    assert gpu.log == ["call"] * 20 + ["spin", "event"] + ["call"] * 20 + ["event"]
    assert devices == [CUDA]
    monkeypatch.setattr(timing, "MAX_SPIN_SECONDS", 0.0)
    assert seconds_per_call(gpu.kernel, 20, CUDA) > 5 * FakeGpu.KERNEL  # so the spin is what hides the launches


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of calls that `seconds_per_call` was asked for; its median is 5 us."""
    found: list[int] = []
    seconds = [5e-6, 9e-6, 3e-6, 4e-6, 5e-6, 6e-6, 7e-6, 1e-3, 2e-6]

    def fake(function: object, n: int, device: torch.device) -> float:
        assert device == CUDA
        found.append(n)
        return seconds[len(found) - 1]

    monkeypatch.setattr(timing, "seconds_per_call", fake)
    return found


def test_short_calls_of_a_gpu_are_timed_in_a_queue(calls: list[int]) -> None:
    assert without_launches(lambda: None, 1e-4, CUDA) == 5e-6  # the median
    assert calls == [200] * 9
    for long, device in ((2e-3, CUDA), (1e-5, torch.device("cpu"))):
        assert without_launches(lambda: None, long, device) == long
    assert len(calls) == 9


@pytest.mark.parametrize(("median", "n"), [(1e-7, 1000), (9e-4, 22), (1.0, 0)])
def test_length_of_a_queue(median: float, n: int, calls: list[int]) -> None:
    without_launches(lambda: None, median, CUDA)
    assert calls == ([n] * 9 if n else [])
