"""Train one model with several processes, each on its share of every minibatch, through Hugging Face accelerate.

A launcher (torchrun, accelerate launch) starts the processes and sets WORLD_SIZE, RANK and LOCAL_RANK. If WORLD_SIZE is
unset or 1, accelerate is not imported. Every process draws the random numbers of the whole minibatch and keeps those of
its own images. So all generators stay in step, and any number of processes computes what one would, up to rounding.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from spigan.ops import philox_normal

# Of launchers that accelerate knows.
_COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# How long processes wait for one that measures or saves. One that has ended gloo finds out at once; beside NCCL the
# launcher does, and ends the others.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Rows:
    """This process's rows of the joint minibatch: those of the images rank, rank + processes, ...

    Images are dealt out in turn because the groups of the minibatch standard deviation are strided; the groups of a
    process are then groups of the joint minibatch.

    Attributes:
        processes: number of processes.
        rank: number of this process.
        times: number of rows of each image, side by side.
    """

    processes: int = 1
    rank: int = 0
    times: int = 1

    def joint(self, n: int) -> int:
        """Return the number of rows of all processes, if this one has n."""
        return n * self.processes

    def own(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this process's rows of a joint tensor, which lie along `dim` (not negative)."""
        if self.processes == 1:
            return x
        parts = x.unflatten(dim, (-1, self.processes, self.times))
        return parts.select(dim + 1, self.rank).flatten(dim, dim + 1)

    def rand(self, *shape: int, dim: int = 0, **options: Any) -> Tensor:
        """Draw as `torch.rand(*shape, **options)`, where `dim` counts this process's rows.

        The numbers of all rows are drawn, so that every process's generator advances alike.
        """
        return self.own(torch.rand(self._joint_shape(shape, dim), **options), dim)

    def randn(self, *shape: int, dim: int = 0, **options: Any) -> Tensor:
        """Draw as `torch.randn(*shape, **options)`; see `rand`."""
        return self.own(torch.randn(self._joint_shape(shape, dim), **options), dim)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw as `torch.randn_like(x)`, where dimension 0 counts this process's rows; see `rand`."""
        joint = x.new_empty_strided(self._joint_shape(x.shape, 0), x.stride())
        return self.own(torch.randn_like(joint))

    def philox_normal(self, shape: Sequence[int], *, seed: int, offset: int, device: torch.device) -> Tensor | None:
        """Draw as `ops.philox_normal`; None for a single process, for which an operation draws the same itself."""
        if self.processes == 1:
            return None
        # Dealt out in turn, the rows of a process do not lie side by side in the stream.
        return self.own(philox_normal(self._joint_shape(shape, 0), seed=seed, offset=offset, device=device))

    def _joint_shape(self, shape: Sequence[int], dim: int) -> tuple[int, ...]:
        return (*shape[:dim], self.joint(shape[dim]), *shape[dim + 1 :])


ALL_ROWS = Rows()


class Processes:
    """The processes that train together, as seen from one of them. A single one sends no messages.

    Args:
        device: of the run; "cuda" without a number where there are several processes.

    Attributes:
        count, rank: number of processes, and which one this is.
        main: whether this is the one that prints and writes files.
        device: the device of this process: of several on a machine each takes a GPU of its own.

    Raises:
        ImportError: several processes without accelerate.
        ValueError: a device that they cannot share.
    """

    def __init__(self, device: torch.device) -> None:
        self.count, self.rank, self.device = max(int(os.environ.get(name) or 1) for name in _COUNTS), 0, device
        if self.count > 1:
            self._join()
        self.main = self.rank == 0

    def _join(self) -> None:
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise ImportError(
                f'{self.count} processes train through accelerate: pip install "spigan[distributed]" ({error})'
            ) from error
        missing = [name for name in ("WORLD_SIZE", *_LAUNCHED) if name not in os.environ]
        if missing:
            given = next(name for name in _COUNTS if int(os.environ.get(name) or 1) == self.count)
            raise ValueError(
                f"{given} says {self.count} processes, but {', '.join(missing)} is not set: start them by torchrun or "
                f"accelerate launch, or unset {given} to train in one"
            )
        if self.device.type == "cuda":
            gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
            if self.device.index is not None:
                raise ValueError(f"several processes take a GPU each: use the device cuda or auto, not {self.device}")
            if local >= gpus:
                raise ValueError(
                    f"process {local} of this machine has no GPU of its own, there are {gpus}: start fewer processes"
                )
        state = PartialState(cpu=self.device.type == "cpu", timeout=_PATIENCE)
        if (state.num_processes, state.device.type) != (self.count, self.device.type):
            raise ValueError(
                f"accelerate was started before, for {state.num_processes} process(es) on {state.device.type}; the run "
                f"is for {self.count} on {self.device}: make them agree, or leave starting it to spigan"
            )
        self.rank, self.device = state.process_index, state.device

    def rows(self, times: int = 1) -> Rows:
        """Which rows of the joint minibatch are this process's, with `times` of them an image."""
        return Rows(self.count, self.rank, times)

    # ---- Messages between processes: every process must call these methods, in the same order ----

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of x over all processes."""
        return x if self.count == 1 else self._call("reduce", x)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in at least one process."""
        return flag if self.count == 1 else self.mean(torch.tensor(float(flag), device=self.device)).item() > 0

    def wait(self) -> None:
        """Wait until every process is here; raise ConnectionError if one has ended."""
        self.any(False)

    def gather(self, x: Tensor) -> Tensor:
        """Return [processes N, ...], the tensors [N, ...] of all processes in the order of their ranks."""
        return x if self.count == 1 else self._call("gather", x.contiguous())

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average gradients over all processes: each is then a mean over the images of the joint minibatch."""
        if self.count == 1:
            return
        # One message, after all backward passes: hooks that average while a gradient is computed do not go with R1's
        # derivatives of derivatives, nor with the several passes of a step.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view(gradient.shape))

    def close(self) -> None:
        """End the communication, at the end of a program."""
        if self.count > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def check_agreement(self, facts: Mapping[str, int | str | Tensor]) -> None:
        """Check that all processes have the same facts; averaging gradients of different models would mean nothing.

        Args:
            facts: by name. Of a text its CRC-32 is compared, of a tensor the sum of its bytes, which rounds nothing.

        Raises:
            ValueError: the facts differ.
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
        try:
            return function(x)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"another of the {self.count} processes has ended; its own error says why ({reason})"
            ) from error
