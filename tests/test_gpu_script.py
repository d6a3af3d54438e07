""".ci/gpu, as far as it runs without a GPU, and the rules by which it selects tests and judges speeds."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "gpu"


def script(*arguments: str, results: Path, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "SPIGAN_GPU_RESULTS": str(results)}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def test_syntax() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done = script("--cpu", "speeed", results=tmp_path)
    assert done.returncode == 2
    assert "unknown part 'speeed'; expected some of: build correctness sanitizer" in done.stderr


def test_parts_write_results_as_they_end(tmp_path: Path) -> None:
    done = script("--cpu", "sanitizer", "nccl", "report", results=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert "sanitizer: SKIPPED: it needs a GPU" in lines[0]
    assert "nccl: SKIPPED: it needs two GPUs" in lines[1]
    assert "report: passed" in lines[2]
    assert "sanitizer: SKIPPED" in (tmp_path / "report.log").read_text()


def test_a_part_that_fails_is_told(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": "false", "SPIGAN_GPU_RESULTS": str(tmp_path)}
    done = subprocess.run([SCRIPT, "--cpu", "build", "train"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = (tmp_path / "summary.txt").read_text().splitlines()  # without a build, nothing follows
    assert "build: FAILED: exit status 1" in line


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tests_fail_where_a_required_gpu_is_missing() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/rk4_mlp"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"SPIGAN_GPU": "required"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "SPIGAN_GPU=required, but torch finds no CUDA device" in done.stdout + done.stderr


def test_thinned_tests_include_every_value() -> None:
    thinned = runpy.run_path(str(ROOT / "tests" / "conftest.py"))["thinned"]
    names = [f"test_x[{a}-{b}-{c}]" for a in range(30) for b in ("cuda", "triton") for c in ("fp32", "bf16", "fp16")]
    items = [SimpleNamespace(name=name, nodeid=f"tests/test_x.py::{name}") for name in names]
    kept = thinned(items, 40)
    assert len(kept) == 40 and kept == thinned(items[::-1], 40)
    found = {value for item in kept for value in item.name[7:-1].split("-")}
    assert found == {value for name in names for value in name[7:-1].split("-")}
    assert len(thinned(items, 5)) == 30, "no value is left out"
    assert sorted(map(id, thinned(items[:7], 24))) == sorted(map(id, items[:7]))


# ---- Floors ----


def floors(share: float = 0.9, rk4: float = 0.2e-3, device: str = "NVIDIA H100", **seconds: float) -> list[bool]:
    speeds = [
        {"name": "path_interpolate, bytes to float32", "seconds": 1.0, "copy_share": share},
        {"name": "rk4_mlp, batch 100, float32", "seconds": rk4},
        {"name": "100 images, cifar10, bfloat16", "seconds": 2e-3},
    ]
    times = {"cuda": 1.0, "torch.compile": 1.5} | seconds
    rows: list[dict[str, Any]] = [
        {"group": "generator and discriminator, cifar10", "name": name, "seconds": time} for name, time in times.items()
    ]
    check = runpy.run_path(str(ROOT / ".ci" / "floors.py"))["check"]
    return [holds for _, holds in check({"device": device, "speeds": speeds}, rows)]


def test_floors() -> None:
    assert floors() == [True, True, True, True]
    assert floors(share=0.7) == [False, True, True, True]
    assert floors(rk4=0.3e-3) == [True, False, True, True]
    assert floors(rk4=0.3e-3, device="NVIDIA A100") == [True, True, True, True]
    assert floors(cuda=1.4) == [True, True, True, False]
    assert floors(cuda=1.4, triton=1.1) == [True, True, True, True]
