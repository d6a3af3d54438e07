"""What may go wrong with a run from outside or within: signals, disks that are full or read-only, divergence."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TypeVar

from safetensors import SafetensorError

from spigan.training.checkpoint import checkpoints

T = TypeVar("T")

GRACE = 3.0
"""Seconds that a signal leaves to what is running, before the state is saved beside it."""


# ---- Signals ----


class _Abandoned(BaseException):
    """Ends `StopSignals.attempt`; no `except Exception` of what is attempted can swallow it."""


class StopSignals:
    """Inside a `with` block, SIGINT and SIGTERM are noted, so that training stops between iterations; SIGINT after one
    of them raises KeyboardInterrupt. In a thread other than the main one, which alone may set handlers, nothing is ever
    noted.
    """

    def __init__(self) -> None:
        self._noted, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._save: Callable[[], object] | None = None
        self._attempting = False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._undo.callback(signal.signal, number, signal.signal(number, self._handle))
        # Python calls handlers when the main thread gets to it, which a long operation in C++ keeps from it; the number
        # of the signal is written to this socket at once.
        here, there = socket.socketpair()
        there.setblocking(False)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False))
        watcher = threading.Thread(target=self._watch, args=(here,), name="spigan-signals", daemon=True)
        watcher.start()

        def end_watcher() -> None:
            self._ended.set()
            there.shutdown(socket.SHUT_RDWR)  # a loader's forked workers have the socket open too
            watcher.join()
            here.close()
            there.close()

        self._undo.callback(end_watcher)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._undo.close()

    def is_set(self) -> bool:
        """Whether a signal came."""
        return self._noted.is_set()

    def attempt(self, function: Callable[[], T]) -> T | None:
        """`function()`, or None where a signal has come or comes before it ends: it is left where it stands then."""
        try:
            try:
                self._attempting = True
                return None if self.is_set() else function()
            finally:
                self._attempting = False
        except _Abandoned:
            return None

    @contextlib.contextmanager
    def backed(self, save: Callable[[], object] | None) -> Iterator[None]:
        """A block that may last: where it still runs `GRACE` seconds after a signal, `save` is called beside it."""
        self._save = save
        try:
            yield
        finally:
            with self._lock:  # wait for a `save` that has begun
                self._save = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a batch system sends SIGTERM to all processes at once, and torchrun passes on its own
        self._noted.set()
        if self._attempting:
            raise _Abandoned

    def _watch(self, wakeup: socket.socket) -> None:
        """Thread that calls `save`."""
        while received := wakeup.recv(1):
            if received[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self._ended.wait(GRACE):
                return
            with self._lock:
                save, self._save = self._save, None
                if save is not None:
                    try:
                        save()
                    except OSError as error:  # told here, since the block may never end
                        print(f"The state could not be saved yet: {error}", file=sys.stderr, flush=True)


# ---- Disks ----


def check_writable(run_dir: Path) -> None:
    """Raise OSError where no file can be made in the folder, or no folder of that name."""
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{run_dir} cannot be written: {error.strerror or error} ({folder}). Nothing has been changed; make the "
            "folder writable, make room, or choose another one"
        ) from error


@contextlib.contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """An OSError of the block becomes one that also says what is saved and how to go on.

    Args:
        run_dir: the run.
        what: names what the block writes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        saved = last_checkpoint(run_dir)
        advice = f"then go on: spigan train --resume {run_dir}" if saved else "then begin again"
        raise OSError(
            f"{what} could not be written: {error}. {_saved(saved)} Make room or the folder writable, {advice}"
        ) from error


def last_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run."""
    return next(reversed(checkpoints(run_dir)), None)


def _saved(path: Path | None) -> str:
    return f"Safe is {path}, and all before it." if path else "Nothing had been saved yet."


# ---- Divergence ----

_SUSPECTS = {  # what is recorded in an optimiser's step: (the step, what to change)
    ("loss_d", "real_logit", "fake_logit", "real_sign", "grad_norm_d"): (
        "the discriminator's step",
        "lower lr_d, raise r1_gamma",
    ),
    ("r1", "grad_norm_r1"): ("the discriminator's R1 step", "lower lr_d or r1_gamma"),
    ("loss_g", "grad_norm_g"): ("the generator's step", "lower lr_g"),
    ("path_length", "path_length_penalty", "grad_norm_pl"): ("the path-length step", "lower pl_weight or lr_g"),
}


def divergence(what: str, value: float | None, iteration: int, kimg: float, limit: float | None, bf16: bool) -> str:
    """What went wrong with a number, where, and what to change.

    Args:
        what: name of a statistic, or another description.
        value: of it; None: of several.
        iteration: when it was recorded.
        kimg: thousands of images seen before.
        limit: that it exceeds; None: it is not finite.
        bf16: whether convolutions run in bfloat16.
    """
    step, advice = next(
        (suspect for names, suspect in _SUSPECTS.items() if what in names), ("the last steps", "lower lr_g and lr_d")
    )
    too_much = "not finite" if limit is None else f"above grad_norm_limit = {limit:g}"
    value_text = "" if value is None else f" ({value:g})"
    precision = ", or set precision to fp32" if bf16 else ""
    return (
        f"training has diverged: {what}{value_text} is {too_much} at iteration {iteration} ({kimg:g} kimg), in {step}. "
        f"Advice: {advice}{precision}"
    )
