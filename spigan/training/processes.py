"""Train one model in several processes, using Hugging Face accelerate. Each process takes a share of every minibatch.

A launcher (torchrun or accelerate launch) starts the processes and sets WORLD_SIZE, RANK and LOCAL_RANK. If WORLD_SIZE
is unset or 1, accelerate is not imported. Every process draws the random numbers for the whole minibatch and keeps
those for its own images. All random generators therefore stay in step, and up to rounding the result does not depend on
the number of processes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from spigan.ops import philox_normal
from spigan.training.launcher import COUNTS, process_count

_LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How long processes wait for a process that is measuring or saving. If a process has ended, gloo notices at once. With
# NCCL, the launcher notices and ends the others.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Rows:
    """This process's rows of the joint minibatch: those of the images rank, rank + count, ...

    Images are dealt out in turn, because the groups of the minibatch standard deviation are strided. This way, the
    groups of a process are also groups of the joint minibatch.

    Attributes:
        count: number of processes.
        rank: number of this process.
        times: number of rows of each image, side by side.
    """

    count: int = 1
    rank: int = 0
    times: int = 1

    def joint(self, n: int) -> int:
        """Return the number of rows of all processes, if this one has n."""
        return n * self.count

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this process's rows of a joint tensor, which lie along `dim` (not negative)."""
        if self.count == 1:
            return x
        parts = x.unflatten(dim, (-1, self.count, self.times))
        return parts.select(dim + 1, self.rank).flatten(dim, dim + 1)

    def rand(self, *shape: int, dim: int = 0, **options: Any) -> Tensor:
        """Draw like `torch.rand(*shape, **options)`, where dimension `dim` holds this process's rows.

        The numbers for all rows are drawn, so that the random generator of every process advances in step.
        """
        return self.own(torch.rand(self._joint_shape(shape, dim), **options), dim)

    def randn(self, *shape: int, dim: int = 0, **options: Any) -> Tensor:
        """Draw like `torch.randn(*shape, **options)`; see `rand`."""
        return self.own(torch.randn(self._joint_shape(shape, dim), **options), dim)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw like `torch.randn_like(x)`, where dimension 0 holds this process's rows; see `rand`."""
        joint = x.new_empty_strided(self._joint_shape(x.shape, 0), x.stride())
        return self.own(torch.randn_like(joint))

    def philox_normal(self, shape: Sequence[int], *, seed: int, offset: int, device: torch.device) -> Tensor:
        """Draw as `ops.philox_normal`, where dimension 0 counts this process's rows."""
        # Dealt out in turn, the rows of a process do not lie side by side in the stream.
        return self.own(philox_normal(self._joint_shape(shape, 0), seed=seed, offset=offset, device=device))

    def _joint_shape(self, shape: Sequence[int], dim: int) -> tuple[int, ...]:
        return (*shape[:dim], self.joint(shape[dim]), *shape[dim + 1 :])


def _in_memory_order(x: Tensor) -> Tensor:
    """Return the elements of a dense tensor as a vector, without a copy whatever its layout."""
    return x.as_strided((x.numel(),), (1,))


SINGLE = Rows()  # of the only process


class Processes:
    """The processes that train together, seen from one of them.

    With a single process, all methods return at once, without any communication.

    Args:
        device: device of the run. With several processes it must be "cpu", or "cuda" without an index.

    Attributes:
        count: number of processes.
        rank: index of this process, from 0.
        main: whether this process prints and writes files. True only for rank 0.
        device: device of this process. With several processes on GPUs, each takes its own GPU.

    Raises:
        ImportError: if there are several processes, but accelerate is not installed.
        ValueError: if the launcher's environment variables are incomplete, the processes cannot share `device`, or
            accelerate is already running with another number of processes or device.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = process_count()
        self.rank = 0
        self.device = device
        self._hosts: Any = None  # process group of the CPUs; None is the default group
        if self.count > 1:
            self._join()
        self.main = self.rank == 0

    def _join(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError(
                f'training in {self.count} processes needs accelerate: pip install "spigan[distributed]" ({error})'
            ) from error
        missing = [name for name in ("WORLD_SIZE", *_LAUNCHED) if name not in os.environ]
        if missing:
            given = next(name for name in COUNTS if int(os.environ.get(name) or 1) == self.count)
            raise ValueError(
                f"{given} is {self.count}, but {', '.join(missing)} is not set: start the processes with torchrun or "
                f"accelerate launch, or unset {given} to train in one process"
            )
        if self.device.type == "cuda":
            gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if self.device.index is not None:
                raise ValueError(
                    f"with several processes, each takes its own GPU: set the device to cuda or auto, not {self.device}"
                )
            if local >= gpus:
                raise ValueError(
                    f"process {local} of this machine has no GPU, because there are only {gpus}: start at most {gpus} "
                    "processes here"
                )
        # If torch._dynamo is first imported while a process group exists, it keeps a reference to the group. Closing
        # the group then does not join its threads (PyTorch 2.13). Optimizers import it, so this costs no time.
        importlib.import_module("torch._dynamo")

        begun_before = torch.distributed.is_initialized()
        state = PartialState(cpu=self.device.type == "cpu", timeout=_PATIENCE)
        if torch.distributed.get_backend() != "gloo":
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        self._close_at_exit(begun_before)
        if (state.num_processes, state.device.type) != (self.count, self.device.type):
            raise ValueError(
                f"accelerate is already running with {state.num_processes} process(es) on {state.device.type}, but "
                f"this run needs {self.count} on {self.device}: make the two agree, or let spigan start accelerate"
            )
        self.rank, self.device = state.process_index, state.device

    def _close_at_exit(self, begun_before: bool) -> None:
        """Close our gloo process group when the program ends, however it ends.

        After a collective has returned, gloo's thread may still hold its tensors. If the thread drops them while the
        interpreter shuts down, it waits for the GIL. That ends the thread in the middle of a C++ destructor, and the
        process aborts with "terminate called without an active exception" (pytorch issue 190489). Closing the group
        joins gloo's threads. It does not need the other processes, so it is safe after an error too.

        Closing an NCCL group is different: it waits for the other processes on the machine, so a process that has
        failed could hang there. NCCL does not have the problem, and its group is left to `close`.
        """
        if self._hosts is not None:
            atexit.register(self._close_hosts)
        elif not begun_before:
            atexit.register(self.close)

    def _close_hosts(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._hosts)

    def rows(self, times: int = 1) -> Rows:
        """Return this process's rows of the joint minibatch, with `times` rows per image."""
        return Rows(self.count, self.rank, times)

    # ---- Collectives: every process must call these, in the same order ----

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over all processes."""
        return x if self.count == 1 else self._call("reduce", x)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true in any process. Waits for the other processes, but not for a GPU."""
        if self.count == 1:
            return flag
        found = torch.tensor(int(flag), device="cpu")
        with self._noticing_ends():
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, self._hosts)
        return bool(found)

    def wait(self) -> None:
        """Wait until every process has called this. Raise ConnectionError if a process has ended."""
        self.any(False)

    def gather(self, x: Tensor) -> Tensor:
        """Concatenate the [N, ...] tensors of all processes to [processes N, ...], in order of rank."""
        return x if self.count == 1 else self._call("gather", x.contiguous())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients averaged over this process's images with gradients averaged over the joint minibatch."""
        if self.count == 1:
            return
        # All gradients are sent in one message, after all backward passes. DistributedDataParallel's hooks, which
        # average during the backward pass, support neither R1's second derivatives nor several passes per step.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.mean(torch.cat([_in_memory_order(gradient) for gradient in gradients]))
        means = [
            mean.as_strided(gradient.shape, gradient.stride())
            for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True)
        ]
        torch._foreach_copy_(gradients, means)

    def close(self) -> None:
        """End the communication between the processes. Calling it again does nothing.

        On the CPU this happens automatically at exit, unless the program itself had started torch.distributed. On GPUs,
        call it in every process after the last `Trainer.fit`; otherwise torch prints a warning at exit.
        """
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def check_agreement(self, facts: Mapping[str, int | str | Tensor]) -> None:
        """Check that all processes train the same model on the same data, before their gradients are averaged.

        Args:
            facts: values that must be equal, by name. Texts are compared by their CRC-32, and tensors by the exact sum
                of their bytes.

        Raises:
            ValueError: if the processes differ.
        """
        if self.count == 1:
            return
        values = [
            fact.detach().contiguous().flatten().view(torch.uint8).sum(dtype=torch.int64).to(self.device)
            if isinstance(fact, Tensor)
            else torch.tensor(zlib.crc32(fact.encode()) if isinstance(fact, str) else fact, device=self.device)
            for fact in facts.values()
        ]
        found = self.gather(torch.stack(values)[None])
        differing = (found != found[0]).any(0).tolist()
        if any(differing):
            names = [name for name, differs in zip(facts, differing, strict=True) if differs]
            raise ValueError(
                f"the processes differ in {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}: start all of them "
                "with the same arguments, versions, images and run folder"
            )

    def _call(self, name: str, x: Tensor) -> Tensor:
        from accelerate import utils

        function: Callable[[Tensor], Any] = getattr(utils, name)
        with self._noticing_ends():
            return function(x)

    @contextlib.contextmanager
    def _noticing_ends(self) -> Iterator[None]:
        """Raise ConnectionError if a collective in the block fails because a process has ended."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"another of the {self.count} processes has ended; see the error it printed ({reason})"
            ) from error
