"""The number of processes that a launcher has started. Without torch, so that the command line can ask quickly."""

from __future__ import annotations

import os

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Variables in which the launchers that accelerate supports pass the number of processes."""


def process_count() -> int:
    """Return the number of processes that a launcher, such as torchrun, has started; 1 without one."""
    return max(int(os.environ.get(name) or 1) for name in COUNTS)
