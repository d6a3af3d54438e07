"""Studies with several seeds an arm, budgets of time, successive halving, and several runs at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spigan.ablation.grid import read_grid
from spigan.ablation.report import write_report
from spigan.training.checkpoint import checkpoints, load_checkpoint


def with_head(text: str, *lines: str) -> str:
    """Add lines to the head of a grid file."""
    return text.replace("[base]", "\n".join([*lines, "", "[base]"]), 1)


def test_seeds_multiply_the_runs_of_an_arm(tmp_path: Path, grid: Any, grid_text: str) -> None:
    study = read_grid(grid(tmp_path, with_head(grid_text, "seeds = [0, 7]", "budget = [12.5]")))
    assert study.arms["k2"] == ["k2_seed=0", "k2_seed=7"]
    assert [config.seed for config in study.runs.values()] == [0, 7] * 3
    assert {config.total_seconds for config in study.runs.values()} == {12.5}
    assert study.runs["mlp_seed=7"].model.mapping == "mlp"
    plain = read_grid(grid(tmp_path, grid_text))
    assert plain.arms == {name: [name] for name in ("k2", "fixed", "mlp")} and plain.budget == ()
    assert plain.runs["k2"].total_seconds is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds = [1, 1]", r"seeds \[1, 1\] has a seed twice"),
        ("seeds = [-1]", "seeds"),
        ("budget = [2.0, 1.0]", r"budget \[2.0, 1.0\] must increase"),
        ("budget = [0.0]", "budget"),
        ("budget = [1.0, 2.0]", 'so it needs better = "lower" or "higher"'),
    ],
)
def test_seeds_and_budgets_that_make_no_sense(
    tmp_path: Path, grid: Any, grid_text: str, line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(grid(tmp_path, with_head(grid_text, line)))


def test_table_of_arms(tmp_path: Path, grid: Any, grid_text: str, write_run: Any, measured: Any) -> None:
    text = with_head(grid_text.replace('"loss_g"', '"FD-ResNet56"\nbetter = "lower"'), "seeds = [0, 1, 2]")
    study, out = read_grid(grid(tmp_path, text)), tmp_path / "out"
    for arm, values in (("k2", (5.0, 6.0, 10.0)), ("fixed", (4.0, 4.5))):
        for seed, value in enumerate(values):
            write_run(out / f"{arm}_seed={seed}", measured(99.0, value))
    write_report(study, out)
    lines = (out / "table.md").read_text().splitlines()
    assert lines[2] == "| arm | FD-ResNet56 (mean) | standard deviation | seeds | kimg | seconds |"
    assert lines[4] == "| fixed | 4.25 | 0.3536 | 2 | 2 | 10 |"  # the third seed has not begun: 3, 3 and 0 kimg
    assert lines[5] == "| k2 | 7 | 2.646 | 3 | 3 | 15 |"
    assert lines[6] == "| mlp |  |  | 0 | 0 | 0 |"
    arms = json.loads((out / "table.json").read_text())["arms"]
    assert [arm["mean"] for arm in arms] == [7.0, 4.25, None]


@pytest.mark.slow
def test_the_better_half_continues(tmp_path: Path, grid: Any, grid_text: str, run: Any) -> None:
    text = grid_text.replace('"loss_g"', '"loss_g"\nbetter = "lower"').replace("total_kimg = 0.024", "total_kimg = 50")
    study = read_grid(grid(tmp_path, with_head(text, "seeds = [0, 1]", "budget = [0.3, 0.6]")))
    out = tmp_path / "out"
    failed, interrupted, said = run(study, out)
    assert not failed and not interrupted
    assert said[0] == "k2_seed=0 (1 of 6): 0.3 s, K = 2"
    kept = json.loads((out / "kept.json").read_text())["0.3"]
    order = [arm for arm in study.arms if arm in kept]
    assert len(kept) == 2 and f"After 0.3 s, the better half continues: {', '.join(order)}" in said
    for arm, names in study.arms.items():
        for name in names:
            limit = 0.6 if arm in kept else 0.3
            assert json.loads((out / name / "finished.json").read_text())["total_seconds"] == limit
            assert load_checkpoint(checkpoints(out / name)[-1])[1]["elapsed"] >= limit
    assert all("already finished, kept" in line for line in run(study, out)[2] if not line.startswith("After"))


@pytest.mark.slow
def test_runs_at_once_are_the_same_runs(
    finished: Path, tmp_path: Path, grid: Any, assert_same_end: Any, spigan_cli: Any
) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    out = tmp_path / "out"
    result = spigan_cli(grid(tmp_path), "--out", out, "--cores", ",".join(map(str, cores)))
    assert result.exit_code == 0, result.output
    assert "mlp (3 of 3): finished" in result.stdout
    for name in ("k2", "fixed", "mlp"):
        assert_same_end(out / name, finished / name)


@pytest.mark.slow
def test_a_run_at_once_that_fails_or_is_killed(tmp_path: Path, grid: Any, grid_text: str) -> None:
    text = grid_text.replace("total_kimg = 0.024", "total_kimg = 1000")
    text = text.replace("[arms.fixed]", '[arms.fixed]\ndevice = "cuda:99"')
    core = min(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "spigan", "ablate", str(grid(tmp_path, text)), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, "--cores", str(core), "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: checkpoints(tmp_path / "out" / "k2"))
    (child,) = [int(pid) for pid in children(process.pid) if b"spawn_main" in command_line(pid)]
    os.kill(child, signal.SIGKILL)
    wait_for(lambda: checkpoints(tmp_path / "out" / "mlp"))  # k2 was killed and fixed failed, yet mlp begins
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "k2 (1 of 3): failed: its process ended with status -9" in output
    assert "fixed (2 of 3): failed: " in output and "cuda" in (tmp_path / "out" / "fixed.error.txt").read_text()
    assert f"Stopped. Resume with: spigan {shlex.join(command[3:])} --cores {core}" in output


def wait_for(ready: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def command_line(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize(
    ("cores", "message"), [("0,x", "expected numbers of CPU cores such as 0,1"), ("99999", "cores [99999] are not")]
)
def test_cores_that_are_not_there(tmp_path: Path, grid: Any, spigan_cli: Any, cores: str, message: str) -> None:
    result = spigan_cli(grid(tmp_path), "--out", tmp_path / "out", "--cores", cores)
    assert result.exit_code in (1, 2) and message in result.stderr
