"""Run each operation's triton_cases.py in Triton's interpreter, which computes on the CPU.

A process for each operation: Triton reads TRITON_INTERPRET when a kernel is first imported. To run one by hand:

    TRITON_INTERPRET=1 pytest tests/kernels/rk4_mlp/triton_cases.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(Path(__file__).parent.glob("*/triton_cases.py"))


def test_every_operation_has_cases():
    assert len(CASES) == 5


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES, ids=lambda path: path.parent.name)
def test_triton_kernels_in_the_interpreter(cases):
    pytest.importorskip("triton", reason="Triton has no release for this platform")
    # Neither PYTEST_ADDOPTS nor the names of xdist's workers: this test may itself run in one of several workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        cwd=cases.parents[3],
        env={**environment, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", done.stdout, re.MULTILINE), done.stdout
