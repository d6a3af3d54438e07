"""`FakeCuda`: the parts of torch.cuda that CUDA graphs need, on a CPU. It runs everything at once and takes notes."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Stream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        if event.stream is not None:
            self.cuda.log.append(f"{self.name} waits for the event of {event.stream}")


class Event:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.stream = cuda, None

    def record(self) -> None:
        self.stream = self.cuda.current.name

    def synchronize(self) -> None:
        self.cuda.log.append("the host waits")


class Graph:
    """A captured graph, which takes `graph_bytes` of its pool until it is garbage."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.pool = cuda, None

    def replay(self) -> None:
        self.cuda.log.append(f"{self.cuda.current.name} replays")

    def __del__(self) -> None:
        self.cuda.memory.pop(id(self), None)


class FakeCuda:
    """What torch.cuda is replaced by.

    Attributes:
        log: what streams waited for and did.
        captures: options of each torch.cuda.graph.
        current: the current stream.
        graph_bytes: memory that the next captured graph keeps.
        memory: by graph, (pool, bytes); a pool is returned to the device with its last graph only.
        fails: raised at the end of the next capture, as by an operation that cannot be captured.
        capturing: whether the caller captures a graph of its own.
    """

    TOTAL = 4000  # bytes of the device

    def __init__(self) -> None:
        self.log: list[str] = []
        self.captures: list[dict[str, Any]] = []
        self.graph_bytes = 100
        self.memory: dict[int, tuple[tuple[int, int], int]] = {}
        self.fails: Exception | None = None
        self.capturing = False
        self.current = self.stream_of("main")
        self._names, self._pools = (f"side {n}" for n in itertools.count()), itertools.count(1)

    def stream_of(self, name: str) -> Stream:
        return Stream(self, name)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Graph, **options: Any) -> Iterator[None]:
        self.captures.append(options)
        before, self.current = self.current, options["stream"]
        yield
        if self.fails is not None:
            raise self.fails  # like PyTorch, without going back to the stream before
        self.memory[id(graph)] = (options["pool"], self.graph_bytes)
        self.current = before

    def snapshot(self) -> list[dict[str, Any]]:
        """Memory segments: one for each graph, and another one."""
        return [{"segment_pool_id": pool, "total_size": size} for pool, size in self.memory.values()] + [
            {"segment_pool_id": (0, 0), "total_size": 10**9}  # not of graphs
        ]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        changes = {
            "Stream": lambda: self.stream_of(next(self._names)),
            "Event": lambda: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "graph": self.graph,
            "stream": self.stream,
            "device": lambda device: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "current_stream": lambda: self.current,
            "is_current_stream_capturing": lambda: self.capturing,
            "graph_pool_handle": lambda: (0, next(self._pools)),
            "memory_snapshot": self.snapshot,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=self.TOTAL),
        }
        for name, change in changes.items():
            monkeypatch.setattr(torch.cuda, name, change)
