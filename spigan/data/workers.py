"""Worker processes that decode images. They start safely, and only the process that started them can end them.

Batches come back in shared memory, or through pipes where it is full. Containers often have little of it (Docker's
default is 64 MB), and DataLoader would wait for ever for a batch that a worker could not put there.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 32  # images per message from a worker process


def available_cores() -> int:
    """Return the number of CPU cores that this process may use, also within a container's limit of CPU time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, cpu_quota(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))))


def cpu_quota(groups: Path, root: Path) -> float:
    """Return the CPU time per second that control groups (version 2) allow a process; infinite without a limit.

    Args:
        groups: the file that names the group of the process, as /proc/self/cgroup does.
        root: the folder of all groups, /sys/fs/cgroup. Each group is limited by its parents, too.
    """
    try:
        lines = groups.read_text().splitlines()
    except (OSError, ValueError):
        return math.inf
    group = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    allowed = math.inf
    for folder in (root / group, *(root / group).parents):
        if not folder.is_relative_to(root):
            break
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            allowed = min(allowed, float(quota) / float(period))
        except (OSError, ValueError, ZeroDivisionError):  # no limit, whose text is "max", or another version
            continue
    return allowed


def load_batches(dataset: torch.utils.data.Dataset[Any], *, num_workers: int, **options: Any) -> Iterator[Any]:
    """Iterate over batches made by `dataset.__getitems__`, without using torch's global random generator.

    Args:
        dataset: the data set that makes the batches.
        num_workers: number of worker processes. 0: load in this process.
        **options: other arguments of `torch.utils.data.DataLoader`.

    Raises:
        OSError: if the workers cannot be started.
        ValueError: if an image cannot be read. In a worker too, the message is that of the error alone.
    """
    batches = torch.utils.data.DataLoader(
        _Caught(dataset) if num_workers else dataset,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # otherwise the workers' base seed would come from the global one
        worker_init_fn=_start_worker,
        **options,
    )
    if not num_workers:
        return iter(batches)
    if not hasattr(signal, "sigtimedwait"):
        return _received(_started(batches))
    # Workers inherit this mask, and so do threads that libraries start in a worker before `_start_worker` runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return _received(_started(batches))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _unchanged(batch: Any) -> Any:  # a named function, because workers may have to unpickle it
    return batch


def _started(batches: torch.utils.data.DataLoader[Any]) -> Iterator[Any]:
    """Start the workers."""
    try:
        return iter(batches)
    except OSError as error:  # the locks of their queues need a few bytes of shared memory
        shared = Path("/dev/shm")
        size = f"{shutil.disk_usage(shared).total / 1e6:.3g} MB" if shared.is_dir() else "missing"
        raise OSError(
            f"worker processes cannot be started ({error}); {shared} is {size}: set data.workers=0 (--workers 0), or "
            "give the container more, as `docker run --shm-size 1g` does"
        ) from error


def _received(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield what the workers have sent. The batches stay their own iterator, which ends the workers when dropped."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:  # DataLoader's, which cannot know why
            method = multiprocessing.get_start_method()
            guard = 'put your program\'s calls under `if __name__ == "__main__":`, ' if method != "fork" else ""
            raise RuntimeError(
                f"{error}: a process that decodes images has ended (start method {method}): {guard}check that the "
                "memory suffices, or set data.workers=0"
            ) from error
        if isinstance(batch, Failed):
            raise ValueError(batch.message)
        yield batch.tensor() if isinstance(batch, _Pixels) else batch


class _Pixels:
    """A tensor on its way through a pipe, for want of shared memory.

    This takes 18 ms of the receiving process for 64 images of 256 x 256 instead of 3 ms (2 busy cores, PyTorch 2.13,
    2026-11-28).
    """

    def __init__(self, images: Tensor) -> None:
        self.images: Any = images.numpy()

    def tensor(self) -> Tensor:
        return self.images if isinstance(self.images, Tensor) else torch.from_numpy(self.images)

    def pin_memory(self) -> _Pixels:  # called by DataLoader's thread
        self.images = self.tensor().pin_memory()
        return self


class _Caught(torch.utils.data.Dataset[Any]):
    """Makes batches in a worker. DataLoader would add its own traceback to an error."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        try:
            batch = self.dataset.__getitems__(indices)
        except ValueError as error:
            return Failed(str(error))
        if not isinstance(batch, Tensor):
            return batch
        try:
            return batch.share_memory_()
        except RuntimeError:  # the memory is full; otherwise found in a thread of the worker, which only prints it
            return _Pixels(batch)


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
