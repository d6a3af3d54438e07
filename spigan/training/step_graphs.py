"""The steps of training as CUDA graphs: one launch in place of the hundreds of a forward and backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.training.augment import ADA
from spigan.training.state import TrainState

Part = Callable[..., tuple[Tensor, ...]]
"""part(*tensors, share): leaves gradients, each times `share`, and returns scalars without a gradient."""

WARM_UP = 2
"""Calls of each shape before it is captured: libraries allocate, kernels compile, and constants are kept."""

MAX_GRAPHS = 8
TOLERANCE = 0.05
"""Largest distance of a graph's gradients from those computed call by call, relative to their norm. Rounding (bfloat16,
and sums in another order) stays far below, and anything wrong is far above."""


class CudaGraph:
    """A function captured as a CUDA graph.

    Args:
        function: returns the tensors into which each replay writes.
        device: a GPU.
        pool: memory that the graphs of a run share.

    Attributes:
        outputs: what `function` returned.

    Raises:
        RuntimeError: if the function cannot be captured, or if too little memory would be left for other steps.
    """

    def __init__(self, function: Callable[[], list[Tensor]], device: torch.device, pool: Any) -> None:
        with torch.cuda.device(device):
            needed = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            self._graph = torch.cuda.CUDAGraph()
            # With "thread_local", allocations by other threads, such as a loader's pinned memory, do not break the
            # capture.
            with torch.cuda.graph(
                self._graph, pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local"
            ):
                self.outputs = function()
            if torch.cuda.mem_get_info()[0] < needed:
                raise RuntimeError("the graph leaves too little memory for the steps that are not graphs")

    def replay(self) -> None:
        """Run the function again, on the current contents of the tensors that it read when it was captured."""
        self._graph.replay()


class GraphedPart:
    """A part of a step, captured for tensors of fixed shapes.

    Args:
        part: the part.
        parameters: parameters whose gradients it leaves.
        tensors: its arguments, which are copied.
        capture: makes a `CudaGraph` of a function.
    """

    def __init__(
        self,
        part: Part,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor],
        capture: Callable[[Callable[[], list[Tensor]]], CudaGraph],
    ) -> None:
        self._inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in tensors]
        leaves = [*parameters, *(x for x in self._inputs if x.requires_grad)]
        self._with_gradient: list[Tensor] = []

        def work() -> list[Tensor]:
            for leaf in leaves:
                leaf.grad = None
            results = torch.stack(part(*self._inputs, 1.0))
            self._with_gradient = [leaf for leaf in leaves if leaf.grad is not None]
            return [results, *(leaf.grad for leaf in self._with_gradient if leaf.grad is not None)]

        self._graph = capture(work)
        self._results, *self._gradients = self._graph.outputs

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Do what the part does for other tensors of the same shapes, apart from the gradients of the tensors."""
        with torch.no_grad():
            for own, given in zip(self._inputs, tensors, strict=True):
                own.copy_(given)
        self._graph.replay()
        for leaf, gradient in zip(self._with_gradient, self._gradients, strict=True):
            leaf.grad = gradient
        return self._results.clone().unbind()

    def backward(self, tensors: Sequence[Tensor]) -> None:
        """Hand the gradients of the last replay on to what `tensors` were computed from."""
        for own, given in zip(self._inputs, tensors, strict=True):
            if given.requires_grad:
                given.backward(own.grad)


class StepGraphs:
    """Runs the parts of steps, on a GPU as CUDA graphs.

    A part that comes with the same shapes again and again is captured once. It is computed call by call that time too,
    and the graph is only used if a replay with the same random numbers gives the same gradients. If not, or if the
    capture fails, a warning tells why, and all parts are computed call by call from then on.

    Args:
        config: how to train.
        state: the state that is trained.

    Attributes:
        enabled: whether graphs are used.
    """

    def __init__(self, config: TrainConfig, state: TrainState) -> None:
        self.enabled = config.cuda_graph and state.device.type == "cuda"
        self._state = state
        penalties = {"r1": config.r1_gamma, "pl": config.pl_weight}
        # Steps whose memory is not known yet, because they have not run. A graph must leave room for them.
        self._awaited = {"d", "g", *(name for name, weight in penalties.items() if weight > 0)}
        self._calls: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], GraphedPart] = {}
        self._pool: Any = None

    def note(self, step: str) -> None:
        """Note that a step ("d", "r1", "g" or "pl") has been computed."""
        self._awaited.discard(step)

    def run(self, part: Part, module: nn.Module, tensors: Sequence[Tensor], share: float = 1.0) -> tuple[Tensor, ...]:
        """Return part(*tensors, share).

        Args:
            part: a method that reads nothing that changes except `tensors`, weights, ADA's p and random numbers.
            module: the module whose gradients it leaves. They must be None before.
            tensors: tensors on the device. Gradients of those that require one are handed on.
            share: weight of the gradients. A part of a minibatch, whose gradients are added to those of others, is
                computed call by call.
        """
        if not self.enabled or self._awaited or share != 1.0:
            return part(*tensors, share)
        key = (part.__name__, self._augments(), *((x.shape, x.dtype, x.requires_grad) for x in tensors))
        if (graph := self._graphs.get(key)) is not None:
            results = graph.replay(tensors)
            graph.backward(tensors)
            return results
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= WARM_UP or len(self._graphs) == MAX_GRAPHS:
            return part(*tensors, share)
        return self._capture(key, part, [*module.parameters()], tensors)

    def _augments(self) -> bool:
        """Give ADA's p to the graphs. Return whether images are augmented."""
        augment = self._state.augment
        return augment.hold_p(self._state.device) if isinstance(augment, ADA) else True

    def _capture(
        self, key: tuple[Any, ...], part: Part, parameters: list[nn.Parameter], tensors: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        rng = self._state.rng
        before = rng.tensors()
        results = part(*tensors, 1.0)
        after, gradients = rng.tensors(), [parameter.grad for parameter in parameters]
        try:
            graph = GraphedPart(part, parameters, tensors, self._captured)
            rng.load(before)
            graph.replay(tensors)
            if not _close([parameter.grad for parameter in parameters], gradients):
                raise RuntimeError("its gradients are not those of the same step computed call by call")
            self._graphs[key] = graph
        except RuntimeError as error:
            self.enabled = False
            self._graphs.clear()
            warnings.warn(
                f"training continues without CUDA graphs, which is slower: {part.__name__.strip('_')} could not become "
                f"one ({str(error).splitlines()[0]}). Set cuda_graph to false to train without graphs from the start",
                stacklevel=2,
            )
        rng.load(after)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return results

    def _captured(self, function: Callable[[], list[Tensor]]) -> CudaGraph:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(function, self._state.device, self._pool)


def _close(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Return whether gradients agree up to rounding. Waits for the device."""
    if [x is None for x in found] != [x is None for x in expected]:
        return False
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    distance = nn.utils.get_total_norm([a - b for a, b in pairs])
    return bool(distance <= TOLERANCE * nn.utils.get_total_norm([b for _, b in pairs]))
