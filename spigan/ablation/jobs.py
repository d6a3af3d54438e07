"""Train the runs of a study: one after another in this process, or several at once, each on a CPU core of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType

import torch

from spigan.ablation.report import end_file, error_file
from spigan.config import TrainConfig
from spigan.data.workers import available_cores
from spigan.files import write_text
from spigan.training.checkpoint import checkpoints
from spigan.training.trainer import Trainer

INTERRUPTED = 130  # exit status of a process that Ctrl-C or SIGTERM stopped, as a shell gives it


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        title: what the user reads about it.
        out: folder of the study.
        name: name of the run and of its folder inside `out`.
        config: its configuration.
    """

    title: str
    out: Path
    name: str
    config: TrainConfig

    def begins(self) -> str:
        """Return a line that says how long the run trains."""
        seconds = self.config.total_seconds
        length = f"{self.config.total_kimg:g} kimg" if seconds is None else f"{seconds:g} s"
        return f"{self.title}: {length}, K = {self.config.intervals}"

    def fails(self, error: str, text: str) -> str:
        """Write the traceback `text`, and return a line about the error."""
        file = error_file(self.out, self.name)
        self.out.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{error}\n\n{text}")
        return f"{self.title}: failed: {error} (traceback: {file})"

    def failure(self) -> str:
        """Return a line about the error that the run's process has written."""
        file = error_file(self.out, self.name)
        return f"{self.title}: failed: {file.read_text(encoding='utf-8').splitlines()[0]} (traceback: {file})"


Say = Callable[[str], object]


def train_in_turn(jobs: Sequence[Job], progress: bool, say: Say, report: Callable[[], None]) -> tuple[list[str], bool]:
    """Train runs one after another.

    Args:
        jobs: the runs.
        progress: whether to show progress bars.
        say: function called with a line of text when a run starts or fails.
        report: function called after each run.

    Returns:
        The names of the runs that failed, and whether a signal stopped a run; then the others have not begun.
    """
    failed: list[str] = []
    for job in jobs:
        say(job.begins())
        error_file(job.out, job.name).unlink(missing_ok=True)
        interrupted = False
        try:
            interrupted = _train(job, progress)
        except Exception as error:  # whatever it is, it must not stop the next runs
            failed.append(job.name)
            say(job.fails(_first_line(error), traceback.format_exc()))
        report()
        if interrupted:
            return failed, True
    return failed, False


def train_at_once(
    jobs: Sequence[Job], cores: Sequence[int], say: Say, report: Callable[[], None]
) -> tuple[list[str], bool]:
    """Train as many runs at once as there are cores, each in a new process that stays on its core.

    Args:
        jobs: the runs.
        cores: numbers of the CPU cores.
        say: function called with a line of text when a run starts, ends or fails.
        report: function called after each run.

    Returns:
        The names of the runs that failed, and whether a signal stopped the study.

    Raises:
        ValueError: if this process may not use one of the cores.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(available_cores()))
    if unknown := sorted(set(cores) - allowed):
        raise ValueError(f"cores {unknown} are not available: this process may use {sorted(allowed)}")
    waiting, free = deque(jobs), list(cores)
    running: dict[int, tuple[BaseProcess, Job, int]] = {}  # by the sentinel, which becomes ready at its end
    failed: list[str] = []
    with _forwarding_signals(lambda: [process for process, _, _ in running.values()]) as stopped:
        while running or (waiting and not stopped()):
            while waiting and free and not stopped():
                job, core = waiting.popleft(), free.pop(0)
                say(job.begins())
                error_file(job.out, job.name).unlink(missing_ok=True)
                # Not forked: a forked child of a process that has used OpenMP may hang.
                process = multiprocessing.get_context("spawn").Process(target=_train_on_core, args=(job, core))
                process.start()
                running[process.sentinel] = (process, job, core)
            for sentinel in wait(list(running), timeout=1.0):
                assert isinstance(sentinel, int)
                ended, job, core = running.pop(sentinel)
                ended.join()
                free.append(core)
                if ended.exitcode == 0:
                    say(f"{job.title}: finished")
                elif ended.exitcode != INTERRUPTED:
                    failed.append(job.name)
                    if not error_file(job.out, job.name).is_file():
                        job.fails(f"its process ended with status {ended.exitcode}", "")
                    say(job.failure())
                report()
    return failed, stopped()


@contextlib.contextmanager
def _forwarding_signals(processes: Callable[[], list[BaseProcess]]) -> Iterator[Callable[[], bool]]:
    """Forward SIGINT and SIGTERM to processes as SIGTERM. Yields a function: whether a signal has arrived."""
    arrived: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        for process in processes():
            process.terminate()

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _train_on_core(job: Job, core: int) -> None:
    """Train a run in a process of its own. The exit status is 0, `INTERRUPTED`, or 1 if the run failed."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        interrupted = _train(job, progress=False)
    except Exception as error:
        job.fails(_first_line(error), traceback.format_exc())
        sys.exit(1)
    sys.exit(INTERRUPTED if interrupted else 0)


def _train(job: Job, progress: bool) -> bool:
    """Start or resume a run. Return whether a signal stopped it."""
    folder, config = job.out / job.name, job.config
    if checkpoints(folder):
        trainer = Trainer.resume(folder, total_seconds=config.total_seconds, progress=progress)
    else:
        if folder.exists():
            shutil.rmtree(folder)  # the study has checked its contents
        trainer = Trainer(config, folder, progress=progress)
    trainer.fit()
    if not trainer.interrupted:
        # The last checkpoint is not enough: the run may have been killed before it exported the model.
        record = {"total_kimg": config.total_kimg, "total_seconds": config.total_seconds}
        write_text(end_file(folder), json.dumps(record) + "\n")
    return trainer.interrupted


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
