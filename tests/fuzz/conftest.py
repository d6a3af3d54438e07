"""Makes the shared modules of this folder importable, and says at the end what was tried."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if sys.platform == "linux":
    from fuzz_targets import COUNTS
else:  # the limits on memory and time are Linux's
    COUNTS = Counter()
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True, scope="module")  # not "session", which would last for all other tests
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    kinds = sorted({kind for kind, _ in COUNTS})
    if not kinds:
        return
    terminalreporter.section(f"fuzzing: {sum(COUNTS.values())} cases")
    for kind in kinds:
        refused, accepted = (COUNTS[kind, outcome] for outcome in ("refused", "accepted"))
        terminalreporter.write_line(f"{kind:24}{refused + accepted:8} cases: {refused:7} refused, {accepted:7} read")
