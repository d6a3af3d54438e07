"""Shared by the tests of studies: a small grid, a finished study, interruptions, and runs written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from spigan.ablation import study as ablate
from spigan.ablation.grid import Study, read_grid
from spigan.cli import app
from spigan.runs import read_stats
from spigan.training.checkpoint import checkpoints, load_checkpoint
from spigan.training.trainer import Trainer

GRID = """
preset = "digits"
metric = "loss_g"

[base]
batch = 4
total_kimg = 0.024  # 6 discriminator and 6 generator iterations
tick_kimg = 0.008
snapshot_ticks = 1
device = "cpu"

[base.model]
resolution = 8
dim_h = 16
embed_channels = 8
channel_base = 64
channel_max = 8

[arms.k2]
intervals = 2

[arms.fixed]
intervals = 2
fixed_t = true

[arms.mlp]
intervals = 1
model.mapping = "mlp"
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Networks of 8 channels are fastest on one thread, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def grid_text() -> str:
    """A grid file with three arms: k2, fixed and mlp."""
    return GRID


def write_grid(folder: Path, text: str = GRID) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def grid() -> Callable[..., Path]:
    """grid(folder, text): writes a grid file, by default `grid_text`."""
    return write_grid


def run_study(study: Study, out: Path) -> tuple[list[str], bool, list[str]]:
    said: list[str] = []
    return *ablate.run(study, out, progress=False, say=said.append), said


@pytest.fixture(scope="session")
def run() -> Callable[..., tuple[list[str], bool, list[str]]]:
    """run(study, out): the names of the arms that failed, whether the study was stopped, and what was printed."""
    return run_study


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran through without a stop; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    failed, interrupted, _ = run_study(read_grid(write_grid(folder)), folder / "out")
    assert not failed and not interrupted
    return folder / "out"


def end(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """Tensors and counters of the last checkpoint, and the statistics, without what depends on the clock."""
    tensors, state = load_checkpoint(checkpoints(run_dir)[-1])
    rows = read_stats(run_dir)
    for row in (state, *rows):
        for name in ("elapsed", "seconds", "images_per_sec"):
            row.pop(name, None)
    return tensors, state, rows


@pytest.fixture(scope="session")
def assert_same_end() -> Callable[[Path, Path], None]:
    """assert_same_end(a, b): both runs ended in the same state, to the bit."""

    def compare(a: Path, b: Path) -> None:
        (tensors, state, rows), (expected, expected_state, expected_rows) = end(a), end(b)
        assert state == expected_state and rows == expected_rows
        assert tensors.keys() == expected.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []

    return compare


@pytest.fixture(scope="session")
def disturb() -> Callable[..., None]:
    """disturb(monkeypatch, act, arm, iteration): calls act() after an iteration of one arm."""

    def disturb(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any], arm: str, iteration: int) -> None:
        original = Trainer.train_iteration

        def train_iteration(self: Trainer, images: Tensor) -> None:
            original(self, images)
            if self.run_dir.name == arm and self.iteration == iteration:
                act()

        monkeypatch.setattr(Trainer, "train_iteration", train_iteration)

    return disturb


@pytest.fixture(scope="session")
def write_run() -> Callable[..., None]:
    """write_run(folder, metrics): metrics.jsonl and stats.jsonl of a run; `tail` is a line that a kill cut short."""

    def write_run(folder: Path, metrics: list[dict[str, Any]], stats: int = 3, tail: str = "") -> None:
        folder.mkdir(parents=True)
        rows = [
            {"iteration": 10 * i, "kimg": float(i), "seconds": 5.0 * i, "images_per_sec": 200.0, "loss_g": 1.0 + i}
            for i in range(1, stats + 1)
        ]
        (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if metrics:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + tail)

    return write_run


@pytest.fixture(scope="session")
def measured() -> Callable[..., list[dict[str, Any]]]:
    """measured(values): rows of metrics.jsonl."""

    def measured(*values: float) -> list[dict[str, Any]]:
        return [{"kimg": 1.0 + i, "seconds": 4.0 * i, "FD-ResNet56": v, "recall": 1 / v} for i, v in enumerate(values)]

    return measured


@pytest.fixture(scope="session")
def spigan_cli() -> Callable[..., Any]:
    """Runs `spigan ablate ARGS` in this process."""

    def invoke(*args: Any) -> Any:
        return CliRunner().invoke(app, ["ablate", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})

    return invoke
