"""The CUDA kernels under ThreadSanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_on_cpu import build, run

pytestmark = pytest.mark.slow


def test_no_races(compiler: str, tmp_path: Path) -> None:
    """ThreadSanitizer sees every access of every CUDA thread and the barriers between them."""
    source, program = tmp_path / "empty.cpp", tmp_path / "empty"
    source.write_text("int main() { return 0; }\n")
    command = [compiler, "-fsanitize=thread", source, "-o", program]
    if any(subprocess.run(c, capture_output=True, check=False).returncode != 0 for c in (command, [program])):
        pytest.skip(f"{compiler} has no ThreadSanitizer that runs here")
    build(tmp_path / "build", "run_kernels", "-DSPIGAN_SANITIZE=thread", "-DSPIGAN_TESTING_MODULE=OFF")
    output = run(tmp_path / "build" / "run_kernels", timeout=300)
    assert "all equal" in output and "ThreadSanitizer" not in output, output
