"""Studies that start, stop, resume, fail and finish, and what happens when the grid has changed."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from spigan.ablation.grid import read_grid
from spigan.runs import read_stats
from spigan.training.trainer import Trainer


@pytest.mark.slow
def test_every_arm_is_a_run(finished: Path) -> None:
    for name, (intervals, fixed, mapping) in {
        "k2": (2, False, "ode"), "fixed": (2, True, "ode"), "mlp": (1, False, "mlp"),
    }.items():  # fmt: skip
        config = json.loads((finished / name / "config.json").read_text())
        assert (config["intervals"], config["fixed_t"], config["model"]["mapping"]) == (intervals, fixed, mapping)
        assert [row["kimg"] for row in read_stats(finished / name)] == [0.008, 0.016, 0.024]
        assert (finished / name / "model" / "model.safetensors").is_file()
    assert not list(finished.glob("*.error.txt"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_resumes_exactly(
    finished: Path, tmp_path: Path, number: Any, grid: Any, run: Any, disturb: Any, assert_same_end: Any
) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, lambda: signal.raise_signal(number), "fixed", 5)
        failed, interrupted, said = run(study, out)
    assert failed == [] and interrupted
    assert said == ["k2 (1 of 3): 0.024 kimg, K = 2", "fixed (2 of 3): 0.024 kimg, K = 2"]
    assert not (out / "mlp").exists()
    states = [row["state"] for row in json.loads((out / "table.json").read_text())["rows"]]
    assert states == ["ended", "at 0.008 of 0.024 kimg", "not started"]
    before = (out / "k2" / "config.json").stat().st_mtime_ns
    failed, interrupted, said = run(study, out)
    assert not failed and not interrupted and said[0] == "k2 (1 of 3): already finished, kept"
    assert (out / "k2" / "config.json").stat().st_mtime_ns == before
    for name in study.arms:
        assert_same_end(out / name, finished / name)


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [1, 6])  # before the first tick's checkpoint, and after it
def test_a_killed_study_resumes_exactly(
    finished: Path, tmp_path: Path, iteration: int, grid: Any, run: Any, disturb: Any, assert_same_end: Any
) -> None:
    def kill() -> None:
        raise KeyboardInterrupt  # passes through as a kill does: nothing is saved

    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, kill, "fixed", iteration)
        with pytest.raises(KeyboardInterrupt):
            run(study, out)
    assert run(study, out)[:2] == ([], False)
    for name in study.arms:
        assert_same_end(out / name, finished / name)


@pytest.mark.slow
@pytest.mark.parametrize("left", [{"config.json", "data.json", "reals.png"}, {"data.json"}])
def test_a_kill_before_the_first_checkpoint(
    finished: Path,
    tmp_path: Path,
    left: set[str],
    grid: Any,
    grid_text: str,
    disturb: Any,
    run: Any,
    assert_same_end: Any,
) -> None:
    study = read_grid(grid(tmp_path, grid_text.partition("[arms.fixed]")[0]))
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, sys.exit, "k2", 1)
        with pytest.raises(SystemExit):
            run(study, out)
    for path in (out / "k2").iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert {path.name for path in (out / "k2").iterdir()} == left
    assert run(study, out)[:2] == ([], False)
    assert_same_end(out / "k2", finished / "k2")


@pytest.mark.slow
def test_a_kill_before_the_model_was_exported(tmp_path: Path, grid: Any, run: Any) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    run(study, out)
    model = out / "k2" / "model" / "model.safetensors"
    weights = model.read_bytes()
    (out / "k2" / "finished.json").unlink()
    model.write_bytes(b"of an earlier snapshot")
    _, _, said = run(study, out)
    assert "kept" in said[0] and said[-1] == "k2 (1 of 3): 0.024 kimg, K = 2"
    assert model.read_bytes() == weights


@pytest.mark.slow
def test_an_arm_that_fails_does_not_stop_the_others(
    finished: Path, tmp_path: Path, grid: Any, run: Any, disturb: Any, assert_same_end: Any
) -> None:
    def diverge() -> None:
        raise FloatingPointError("loss_d not finite\nsecond line")

    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, diverge, "k2", 5)
        failed, interrupted, said = run(study, out)
    assert failed == ["k2"] and not interrupted
    assert said[1].startswith("k2 (1 of 3): failed: loss_d not finite (traceback: ")
    assert "in diverge" in (out / "k2.error.txt").read_text()
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert [row["state"] for row in rows] == ["failed: loss_d not finite", "ended", "ended"]
    assert "| failed: loss_d not finite |" in (out / "table.md").read_text()
    assert run(study, out)[0] == []  # once more, from its checkpoint
    assert not (out / "k2.error.txt").exists()
    assert_same_end(out / "k2", finished / "k2")


def test_a_precision_that_was_chosen_is_no_change(
    tmp_path: Path, grid: Any, run: Any, grid_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm with precision "auto" keeps what its run took, here as on a GPU."""
    text = grid_text[: grid_text.index("[arms.fixed]")].replace("[base]", '[base]\nprecision = "auto"')
    study, out = read_grid(grid(tmp_path, text)), tmp_path / "out"
    Trainer(study.runs["k2"].model_copy(update={"precision": "bf16"}), out / "k2", progress=False).snapshot()
    resumed = []
    monkeypatch.setattr(Trainer, "fit", lambda self: resumed.append(self.config.precision))
    assert run(study, out)[:2] == ([], False)
    assert resumed == ["bf16"]


@pytest.mark.slow
def test_a_changed_grid_is_noticed(finished: Path, tmp_path: Path, grid: Any, run: Any, grid_text: str) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    for old, new, message in (
        ("batch = 4", "batch = 8", "k2 contains a run with batch 4 (now 8 in the grid): undo the change"),
        ("dim_h = 16", "dim_h = 8", "k2 contains a run with model.dim_h 16 (now 8 in the grid)"),
        ("total_kimg = 0.024", "total_kimg = 0.048", "--kimg 0.048"),
    ):
        with pytest.raises(ValueError, match="contains a run with") as caught:
            run(read_grid(grid(tmp_path, grid_text.replace(old, new))), finished)
        assert message in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_removed_folder_is_trained_anew(tmp_path: Path, grid: Any, run: Any, grid_text: str) -> None:
    """As the message of a changed grid advises."""
    text = grid_text.partition("[arms.fixed]")[0]
    run(read_grid(grid(tmp_path, text)), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "k2")
    changed = read_grid(grid(tmp_path, text.replace("batch = 4", "batch = 8")))
    assert run(changed, tmp_path / "out") == ([], False, ["k2 (1 of 1): 0.024 kimg, K = 2"])
    assert json.loads((tmp_path / "out" / "k2" / "config.json").read_text())["batch"] == 8


@pytest.mark.slow
def test_a_run_lengthened_by_hand_is_taken_up(tmp_path: Path, grid: Any, run: Any, grid_text: str) -> None:
    out = tmp_path / "out"
    run(read_grid(grid(tmp_path, grid_text.partition("[arms.fixed]")[0])), out)
    Trainer.resume(out / "k2", total_kimg=0.032, progress=False).fit()
    longer = grid_text.partition("[arms.fixed]")[0].replace("total_kimg = 0.024", "total_kimg = 0.032")
    assert run(read_grid(grid(tmp_path, longer)), out)[:2] == ([], False)
    assert json.loads((out / "table.json").read_text())["rows"][0]["state"] == "ended"


@pytest.mark.parametrize("name", ["thesis.tex", "reals.png"])  # the second as a run would call it
def test_other_files_are_left_alone(tmp_path: Path, grid: Any, run: Any, name: str) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    (out / "fixed").mkdir(parents=True)
    (out / "fixed" / name).write_text("mine")
    with pytest.raises(ValueError, match=r"fixed is neither empty nor a run that can be resumed: choose another --out"):
        run(study, out)
    assert [path.name for path in out.rglob("*")] == ["fixed", name]


def test_without_matplotlib_nothing_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Any, run: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'the curve needs matplotlib: pip install "spigan\[bench\]"'):
        run(read_grid(grid(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()
