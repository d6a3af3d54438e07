"""Worker processes that decode images: started safely, ended by the process that started them and by nobody else."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spigan.data import limits


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_batches(dataset: torch.utils.data.Dataset[Any], *, num_workers: int, **options: Any) -> Iterator[Any]:
    """Iterate over batches as `dataset.__getitems__` makes them. torch's global generator is not touched.

    Args:
        dataset: where the batches come from.
        num_workers: worker processes; 0: load in this process.
        **options: other arguments of `torch.utils.data.DataLoader`.
    """
    batches = torch.utils.data.DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # without one, the workers' base seed is drawn from the global generator
        worker_init_fn=_start_worker,
        **options,
    )
    if not hasattr(signal, "sigtimedwait"):
        return iter(batches)
    # Workers inherit the mask, and so do the threads that libraries start in them before `_start_worker` runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:  # a named function, because workers may have to unpickle it
    return batch


def _start_worker(worker: int) -> None:
    """Prepare a worker process: only the process that started it may end it.

    Terminals, torchrun and batch systems send SIGINT and SIGTERM to the workers too. If they ended, the training
    process could not finish its iteration before it stops. When the training process dies, DataLoader's own check ends
    the worker's loop, but the worker then waits for ever for a reader of its last results: hence the thread.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait_for_signal = getattr(signal, "sigtimedwait", None)  # Linux: only this tells who sent a signal
    if wait_for_signal is not None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    trainer, parent = multiprocessing.parent_process(), os.getppid()  # the parent may be a fork server
    assert trainer is not None

    def watch() -> None:
        while os.getppid() == parent:
            if wait_for_signal is None:
                time.sleep(1)
            elif (sent := wait_for_signal({signal.SIGTERM}, 1)) is not None and sent.si_pid == trainer.pid:
                break
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


# ---- All images of a source, once ----


def chunks(start: int, stop: int) -> list[range]:
    """Split the indices from `start` to `stop` into ranges of `limits.CHUNK`: the images per message from a worker."""
    return [range(first, min(first + limits.CHUNK, stop)) for first in range(start, stop, limits.CHUNK)]


def map_chunks(function: Callable[[int], Any], parts: Sequence[range], num_workers: int) -> Iterator[list[Any]]:
    """Yield [function(index) for every index] of each part, in order, computed in worker processes.

    If `function` raises ValueError, the result is the error's message, a str. So that the two can be told apart,
    `function` itself must not return a str.

    Args:
        function: called in the workers; it must survive pickling.
        parts: see `chunks`.
        num_workers: worker processes; 0: compute in this process.
    """
    return load_batches(_Results(function), num_workers=num_workers, batch_sampler=parts)


class _Results(torch.utils.data.Dataset[Any]):
    def __init__(self, function: Callable[[int], Any]) -> None:
        self.function = function

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self._result(index) for index in indices]

    def _result(self, index: int) -> Any:
        try:
            return self.function(index)
        except ValueError as error:
            return str(error)
