"""A sampler's batch, from seeds to pixels, as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spigan.models import SPIGAN
from spigan.models.frozen_synthesis import frozen_state, has_forward_hooks

Evaluate = Callable[[Tensor], Tensor]
"""int64 [B] seeds -> images."""


def supports_cuda_graph(model: SPIGAN) -> bool:
    """Return whether batches of `model` can be captured. It must be on a GPU, and its solver must have fixed steps."""
    # An adaptive solver reads its step sizes back from the device, which is impossible inside a graph.
    return next(model.parameters()).device.type == "cuda" and not model.config.adaptive


class GraphedBatches:
    """Replays full batches of a sampler as a CUDA graph. Captures the graph again after the model has changed.

    Args:
        model: the model, for which `supports_cuda_graph` must be true.
        evaluate: function that makes the images of a batch.
        batch_size: B. Smaller batches are not replayed.
    """

    def __init__(self, model: SPIGAN, evaluate: Evaluate, batch_size: int) -> None:
        self._model, self._evaluate, self._batch_size = model, evaluate, batch_size
        self._graph: BatchGraph | None = None

    def replay(self, seeds: Tensor) -> Tensor | None:
        """Return the images of int64 [B] seeds, which are on the CPU.

        Return None if no graph can make the images, because the batch is not full, the model has forward hooks, or its
        parameters may change undetected.
        """
        if len(seeds) < self._batch_size or has_forward_hooks(self._model.modules()):
            return None
        if (state := frozen_state(self._model)) is None:
            return None
        if self._graph is None or self._graph.state != state:
            self._graph = None  # frees its memory before the next one is captured
            self._graph = BatchGraph(self._model, self._evaluate, self._batch_size, state)
        return self._graph.replay(seeds)

    def forget(self) -> None:
        """Drop the graph; the next full batch captures a new one."""
        self._graph = None


class BatchGraph:
    """The graph of one state of a model.

    Args:
        model: the model, on a GPU.
        evaluate: function that makes the images of a batch.
        batch_size: B.
        state: `frozen_state` of the model.
    """

    def __init__(self, model: SPIGAN, evaluate: Evaluate, batch_size: int, state: tuple[Any, ...]) -> None:
        self.state = state
        self._lock = threading.Lock()
        device = next(model.parameters()).device
        with torch.cuda.device(device):
            self._seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # packs the weights, compiles Triton's kernels, allocates the libraries' workspaces
                    evaluate(self._seeds)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Without `stream`, all graphs of a process are captured on one stream of one device. With "thread_local",
            # allocations by other threads, such as a loader's pinned memory, do not break the capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._images = evaluate(self._seeds)
        # The generator drops these when it is called with other weights, but the graph still reads them.
        self._prepared = model.generator.prepared

    def replay(self, seeds: Tensor) -> Tensor:
        """Return the images of int64 [B] seeds."""
        with self._lock:  # `sample` shares its samplers between threads
            self._seeds.copy_(seeds, non_blocking=True)
            self._graph.replay()
            return self._images.clone()
