"""Measure how long a device takes for a function, without the time that the host takes to launch it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

SHORT = 1e-3  # seconds; on a GPU, the launch and the wait for the end are a large part of shorter calls
QUEUE_SECONDS, QUEUES = 0.02, 9
MAX_SPIN_SECONDS = 0.1
_SPIN_HERTZ = 2.5e9  # no slower than any GPU's clock, so that a spin lasts at least as long as wanted


def seconds_per_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Return the mean time of a call on `device`, in seconds. The function should have run before.

    A GPU runs the calls as one queue between two events. It first waits until the host has launched them, so that
    kernels of a few microseconds are timed and not their launches. On other devices it is the time of the host.

    Args:
        function: runs on the current stream.
        calls: number of calls, at least 1.
        device: the device.
    """
    if device.type != "cuda":
        return _host_seconds(function, calls) / calls
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        host = _host_seconds(function, calls)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(_SPIN_HERTZ * min(host, MAX_SPIN_SECONDS)))
        start.record()
        for _ in range(calls):
            function()
        stop.record()
        stop.synchronize()
        return 1e-3 * float(start.elapsed_time(stop)) / calls


def without_launches(function: Callable[[], object], median: float, device: torch.device) -> float:
    """Return the time of a call in seconds, measured again if it is short.

    On a GPU, it is then the median of several queues of calls.

    Args:
        function: the call, which has run before.
        median: its time with the launch and the wait for its end.
        device: the device.
    """
    if device.type != "cuda" or median >= SHORT:
        return median
    calls = max(3, min(1000, int(QUEUE_SECONDS / median)))
    return statistics.median(seconds_per_call(function, calls, device) for _ in range(QUEUES))


def _host_seconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start
