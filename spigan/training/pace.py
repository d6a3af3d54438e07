"""How far the host may run ahead of a GPU."""

from __future__ import annotations

from collections import deque

import torch

AHEAD = 2
"""Iterations that may be queued on a GPU: with one of them still to come, the GPU never waits for the host."""


class Pace:
    """Keeps the host at most `AHEAD` iterations ahead of a GPU.

    Nothing in an iteration waits for the GPU, so the host could queue seconds of work. After a signal the state can
    only be saved once all of it is done. A slow iteration would not be noticed either.

    Args:
        device: device of the run. On a CPU the methods do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queued: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Note that an iteration has been queued. Wait until at most `AHEAD` iterations are unfinished."""
        if self._device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)  # sleeps instead of spinning
        event.record(torch.cuda.current_stream(self._device))
        self._queued.append(event)
        if len(self._queued) > AHEAD:
            self._queued.popleft().synchronize()
