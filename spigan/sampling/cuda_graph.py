"""A sampler's batches, from seeds to pixels, as CUDA graphs.

All graphs of a device share one memory pool, because they never run at the same time: the memory that one graph needs
while it runs serves the others too. `GraphPool` bounds that memory and orders the replays.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spigan.models import SPIGAN
from spigan.models.frozen_synthesis import frozen_state, has_forward_hooks

Evaluate = Callable[[Tensor], Tensor]
"""int64 [B] seeds -> images."""

CAPTURE_AT_USE = 2
"""Use of a batch size from which it is a graph: a capture takes as long as several batches, so one batch is no gain."""

MAX_POOL_SHARE = 0.25
"""Largest part of a GPU's memory that the graphs of all samplers may keep."""


def supports_cuda_graph(model: SPIGAN) -> bool:
    """Return whether batches of `model` can be captured. It must be on a GPU, and its solver must have fixed steps."""
    # An adaptive solver reads its step sizes back from the device, which is impossible inside a graph.
    return next(model.parameters()).device.type == "cuda" and not model.config.adaptive


class GraphMemoryError(RuntimeError):
    """A graph alone takes more memory than all graphs may keep."""


@dataclass
class _Size:
    """A batch size: how often it was used without a graph, from which use on it is captured, and the graph."""

    uses: int = 0
    capture_at: int = CAPTURE_AT_USE
    graph: BatchGraph | None = None


class GraphedBatches:
    """Replays the batches of a sampler as CUDA graphs, one for each batch size that is used at least twice.

    The graphs are captured again after the model has changed. If a capture fails, there is one warning, and all batches
    run without graphs from then on.

    Args:
        model: the model, for which `supports_cuda_graph` must be true.
    """

    def __init__(self, model: SPIGAN) -> None:
        self._model = model
        self._state: tuple[Any, ...] | None = None
        self._sizes: dict[int, _Size] = {}
        self._failed = False

    def replay(self, seeds: Tensor, evaluate: Evaluate) -> Tensor | None:
        """Return the images of int64 [B] seeds, which are on the CPU.

        Return None if no graph makes the images, because the size is new, the model has forward hooks, its parameters
        may change undetected, a capture has failed, or the caller captures a graph.

        Args:
            seeds: one seed for each image.
            evaluate: function that makes the images, always the same one.
        """
        if self._failed or has_forward_hooks(self._model.modules()):
            return None
        if (state := frozen_state(self._model)) is None:
            return None
        device = next(self._model.parameters()).device
        pool = graph_pool(device)
        with torch.cuda.device(device), pool.lock:  # `sample` shares its samplers between threads
            if torch.cuda.is_current_stream_capturing():
                return None
            if state != self._state:
                self.forget()
                self._state = state
            graph = self._graph(len(seeds), evaluate, pool, state)
            return None if graph is None else pool.replay(graph, seeds)

    def forget(self) -> None:
        """Drop all graphs. A size is captured again at its second use."""
        if graphs := [size.graph for size in self._sizes.values() if size.graph is not None]:
            graph_pool(next(self._model.parameters()).device).free(graphs)
        self._sizes.clear()
        self._failed = False

    def _graph(self, batch_size: int, evaluate: Evaluate, pool: GraphPool, state: tuple[Any, ...]) -> BatchGraph | None:
        size = self._sizes.setdefault(batch_size, _Size())
        if size.graph is not None and size.graph.freed:
            # The pool was full. Waiting longer each time keeps samplers from evicting each other in every call.
            size.graph, size.uses, size.capture_at = None, 0, 2 * size.capture_at
        if size.graph is None:
            size.uses += 1
            if size.uses < size.capture_at:
                return None
            try:
                size.graph = pool.capture(
                    lambda handle, stream: BatchGraph(self._model, evaluate, batch_size, state, handle, stream)
                )
            except Exception as error:  # of CUDA, a library or a compiler; without a graph it may still work
                self._failed = True
                warnings.warn(
                    f"sampling continues without CUDA graphs, which is slower for small batches: the graph of a batch "
                    f"of {batch_size} could not be captured ({type(error).__name__}: {error}). "
                    "Sampler(cuda_graph=False) does not try",
                    stacklevel=2,
                )
        return size.graph


class BatchGraph:
    """The graph of one batch size and one state of a model. The current device must be that of the model.

    Args:
        model: the model, on a GPU.
        evaluate: function that makes the images of a batch; it has been called before.
        batch_size: B.
        state: `frozen_state` of the model.
        pool: handle of the memory pool from which the graph allocates.
        stream: stream on which to capture, the same for all graphs of a pool.
    """

    def __init__(
        self,
        model: SPIGAN,
        evaluate: Evaluate,
        batch_size: int,
        state: tuple[Any, ...],
        pool: Any,
        stream: torch.cuda.Stream,
    ) -> None:
        self._model, self._state = weakref.ref(model), state
        self._seeds = torch.zeros(batch_size, dtype=torch.int64, device=next(model.parameters()).device)
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            evaluate(self._seeds)  # the libraries allocate their workspaces for this stream
        current.wait_stream(stream)
        self._graph: torch.cuda.CUDAGraph | None = torch.cuda.CUDAGraph()
        # After a failed capture, torch.cuda.graph leaves its own stream as the current one; the outer block does not.
        # With "thread_local", allocations by other threads, such as a loader's pinned memory, do not break the capture.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._images: Tensor | None = evaluate(self._seeds)
        # The generator drops these when it is called with other weights, but the graph still reads them.
        self._prepared: Any = model.generator.prepared

    @property
    def freed(self) -> bool:
        """Whether the memory was given back, so that the graph can no longer be replayed."""
        return self._graph is None

    def outdated(self) -> bool:
        """Return whether the model is gone or has changed, so that the graph will never be replayed again."""
        model = self._model()
        return model is None or frozen_state(model) != self._state

    def free(self) -> None:
        """Give the memory back, which `GraphPool.free` does at the right time."""
        self._graph = self._images = self._prepared = None

    def replay(self, seeds: Tensor) -> Tensor:
        """Return the images of int64 [B] seeds, in memory of their own."""
        assert self._graph is not None and self._images is not None
        self._seeds.copy_(seeds, non_blocking=True)
        self._graph.replay()
        return self._images.clone()


class GraphPool:
    """The memory of all graphs of one device, which is the current one, and the order of their replays.

    Args:
        max_bytes: largest size of the memory that is kept.

    Attributes:
        lock: held while graphs are captured, replayed or freed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.lock = threading.RLock()
        self._max_bytes = max_bytes
        self._graphs: weakref.WeakSet[BatchGraph] = weakref.WeakSet()
        self._handle: Any = None
        self._stream = torch.cuda.Stream()
        self._done = torch.cuda.Event()

    def capture(self, make: Callable[[Any, torch.cuda.Stream], BatchGraph]) -> BatchGraph:
        """Return make(handle, stream), after freeing graphs if it needs their memory.

        Args:
            make: captures a graph on `stream` with memory of the pool `handle`.

        Raises:
            GraphMemoryError: if the graph takes more memory than may be kept.
        """
        self.free([graph for graph in self._live() if graph.outdated()])
        torch.cuda.current_stream().wait_event(self._done)
        while True:
            others = self._live()
            if not others:  # PyTorch destroys a pool with its last graph
                self._handle = torch.cuda.graph_pool_handle()
            graph = make(self._handle, self._stream)
            self._done.record()  # a replay on another stream waits until the seeds of the graph exist
            kept = pool_bytes(self._handle)
            if kept <= self._max_bytes:
                self._graphs.add(graph)
                return graph
            # Memory of a pool is given back only with its last graph, so all of them go.
            self.free([*others, graph])
            if not others:
                raise GraphMemoryError(
                    f"it takes {kept / 2**20:.0f} MiB, and all graphs together may keep {self._max_bytes / 2**20:.0f} "
                    "MiB; a smaller batch_size takes less"
                )

    def replay(self, graph: BatchGraph, seeds: Tensor) -> Tensor:
        """Return the images of int64 [B] seeds, on the current stream."""
        torch.cuda.current_stream().wait_event(self._done)  # another stream may still be using the same memory
        images = graph.replay(seeds)
        self._done.record()
        return images

    def free(self, graphs: list[BatchGraph]) -> None:
        """Free graphs, after their last replay has ended: until then it reads the model's packed weights."""
        with self.lock:
            if graphs:
                self._done.synchronize()
            for graph in graphs:
                graph.free()
                self._graphs.discard(graph)

    def _live(self) -> list[BatchGraph]:
        return [graph for graph in self._graphs if not graph.freed]


_pools: dict[int, GraphPool] = {}  # by index of the device
_pools_lock = threading.Lock()


def graph_pool(device: torch.device) -> GraphPool:
    """Return the pool of the graphs of a GPU."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _pools_lock:
        if index not in _pools:
            with torch.cuda.device(index):
                _pools[index] = GraphPool(int(MAX_POOL_SHARE * torch.cuda.get_device_properties(index).total_memory))
        return _pools[index]


def pool_bytes(handle: Any) -> int:
    """Return the size of the memory that a pool of graphs has taken from its device."""
    segments = torch.cuda.memory_snapshot()
    return sum(segment["total_size"] for segment in segments if tuple(segment["segment_pool_id"]) == tuple(handle))
