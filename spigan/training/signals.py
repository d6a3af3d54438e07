"""Handling of SIGINT and SIGTERM: training stops after the current iteration, and saves its state within seconds."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import TypeVar

T = TypeVar("T")

GRACE = 3.0
"""Seconds after a signal at which the state is saved even though work is still running."""

SLOW = 1.0
"""Seconds. Once an iteration has taken this long, the state is copied before each iteration, in case a signal arrives
during it."""


class _Abandoned(BaseException):
    """Ends `StopSignals.attempt`. It is not an Exception, so that no `except Exception` swallows it."""


class StopSignals:
    """Notes SIGINT and SIGTERM inside a `with` block, so that training can stop between iterations.

    A SIGINT after the first signal raises KeyboardInterrupt. Only the main thread may set signal handlers; in any other
    thread, signals are not noted.

    The state must be on disk within 10 seconds of a signal, even while a long iteration or measurement is running.
    Therefore long work comes with a function that saves the state from before the work (`backed`, `iteration`). A
    thread calls it if the work is still running `GRACE` seconds after the signal.
    """

    def __init__(self) -> None:
        self._noted, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._save: Callable[[], object] | None = None
        self._attempting = False
        self._slowest = 0.0  # seconds of an iteration
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._undo.callback(signal.signal, number, signal.signal(number, self._handle))
        # Python calls handlers only once the main thread is back in Python code, and C++ code may take a long time. The
        # number of the signal is written to this socket immediately.
        here, there = socket.socketpair()
        there.setblocking(False)
        self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(there.fileno(), warn_on_full_buffer=False))
        watcher = threading.Thread(target=self._watch, args=(here,), name="spigan-signals", daemon=True)
        watcher.start()

        def end_watcher() -> None:
            self._ended.set()
            there.shutdown(socket.SHUT_RDWR)  # closing is not enough: forked loader workers share the socket
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
        """Return whether a signal has arrived."""
        return self._noted.is_set()

    def attempt(self, function: Callable[[], T]) -> T | None:
        """Return `function()`. If a signal has arrived, or arrives during the call, abandon it and return None."""
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
        """Run a long block. If it is still running `GRACE` seconds after a signal, a thread calls `save`."""
        self._save = save
        try:
            yield
        finally:
            with self._lock:  # waits for a running `save`
                self._save = None

    @contextlib.contextmanager
    def iteration(self, copy: Callable[[], Callable[[], object] | None]) -> Iterator[None]:
        """Run one iteration as the block. Once an iteration has taken `SLOW` seconds, back it with a copy of the state.

        Args:
            copy: copies the state and returns a function that saves the copy, or None if no copy is needed.
        """
        began = time.perf_counter()
        with self.backed(copy() if self._slowest >= SLOW else None):
            yield
        self._slowest = max(self._slowest, time.perf_counter() - began)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a batch system may send SIGTERM to all processes, and torchrun forwards its own as well
        self._noted.set()
        if self._attempting:
            raise _Abandoned

    def _watch(self, wakeup: socket.socket) -> None:
        """Wait for a signal and call `save`. Runs in a thread."""
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
                    except OSError as error:  # reported here, because the block may never end
                        print(f"The state could not be saved yet: {error}", file=sys.stderr, flush=True)
