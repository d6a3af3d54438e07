"""Worker processes that decode images. They start safely, and only the process that started them can end them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

CHUNK = 32  # images per message from a worker process


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_batches(dataset: torch.utils.data.Dataset[Any], *, num_workers: int, **options: Any) -> Iterator[Any]:
    """Iterate over batches made by `dataset.__getitems__`, without using torch's global random generator.

    Args:
        dataset: the data set that makes the batches.
        num_workers: number of worker processes. 0: load in this process.
        **options: other arguments of `torch.utils.data.DataLoader`.
    """
    batches = torch.utils.data.DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # otherwise the workers' base seed would come from the global one
        worker_init_fn=_start_worker,
        **options,
    )
    if not hasattr(signal, "sigtimedwait"):
        return iter(batches)
    # Workers inherit this mask, and so do threads that libraries start in a worker before `_start_worker` runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(batches)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:  # a named function, because workers may have to unpickle it
    return batch


def _start_worker(worker: int) -> None:
    """Prepare a worker process, so that only the process that started it can end it.

    Terminals, torchrun and batch systems also send SIGINT and SIGTERM to the workers. If the workers ended, the
    training process could not finish its iteration before stopping. If the training process dies, DataLoader's own
    check ends the worker's loop, but the worker would then wait forever for a reader of its last results. The thread
    prevents this.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait_for_signal = getattr(signal, "sigtimedwait", None)  # Linux only: this reveals who sent a signal
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
    """Split the indices from `start` to `stop` into ranges of `CHUNK`, one for each message from a worker."""
    return [range(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]


class Failed(NamedTuple):
    """The result of a call that raised ValueError, with the message of the error."""

    message: str


def map_chunks(function: Callable[[int], Any], parts: Sequence[range], num_workers: int) -> Iterator[list[Any]]:
    """Yield a list of the results function(index) for each part, in order, computed in worker processes.

    If `function` raises ValueError, the result is a `Failed`.

    Args:
        function: function to call in the workers. It must be picklable.
        parts: see `chunks`.
        num_workers: number of worker processes. 0: compute in this process.
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
            return Failed(str(error))
