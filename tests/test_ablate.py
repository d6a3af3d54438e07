"""Studies: grid files, arms that start, stop, go on, fail and end, what changed grids meet, and the report."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from spigan.ablation import study as ablate
from spigan.ablation.study import Study, curve_figure, grid_path, read_curve, read_grid, write_report
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


def grid(folder: Path, text: str = GRID) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.toml"
    path.write_text(text)
    return path


def run(study: Study, out: Path) -> tuple[list[str], bool, list[str]]:
    """Names of the arms that failed, whether it was stopped, and what was said."""
    said: list[str] = []
    return *ablate.run(study, out, progress=False, say=said.append), said


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran through without a stop; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    failed, interrupted, _ = run(read_grid(grid(folder)), folder / "out")
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


def assert_same_end(a: Path, b: Path) -> None:
    """Both runs ended in the same state, to the bit."""
    (tensors, state, rows), (expected, expected_state, expected_rows) = end(a), end(b)
    assert state == expected_state and rows == expected_rows
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []


def disturb(monkeypatch: pytest.MonkeyPatch, act: Any, arm: str, iteration: int) -> None:
    """Let act() happen after an iteration of one arm."""
    original = Trainer.train_iteration

    def train_iteration(self: Trainer, images: Tensor) -> None:
        original(self, images)
        if self.run_dir.name == arm and self.iteration == iteration:
            act()

    monkeypatch.setattr(Trainer, "train_iteration", train_iteration)


# ---- Grid files ----


def test_built_in_grids() -> None:
    table5 = read_grid(grid_path("table5"))
    assert table5.preset == "cifar10" and table5.metric == "FD-ResNet56"
    arms = {
        name: (config.intervals, config.fixed_t, config.model.mapping, config.updates)
        for name, config in table5.arms.items()
    }
    assert arms == {
        **{f"k{k}": (k, False, "ode", "sequential") for k in range(1, 6)},
        "k2-fixed": (2, True, "ode", "sequential"),
        "mlp": (1, False, "mlp", "sequential"),
        **{f"k{k}-joint": (k, False, "ode", "joint") for k in range(2, 6)},
        "k2-fixed-joint": (2, True, "ode", "joint"),
    }
    # Nothing else differs, so that nothing else can be what makes the difference.
    same = {"intervals": 2, "fixed_t": False, "updates": "sequential", "model": table5.arms["k1"].model}
    assert len({config.model_copy(update=same).model_dump_json() for config in table5.arms.values()}) == 1
    assert list(read_grid(grid_path("digits")).arms) == ["k1", "k2", "k2-fixed", "mlp"]


def test_products(tmp_path: Path) -> None:
    text = GRID.partition("[arms.k2]")[0] + '[product]\nintervals = [1, 3]\n"model.ode_steps" = [4, 8]\n'
    arms = read_grid(grid(tmp_path, text)).arms
    assert {name: (config.intervals, config.model.ode_steps) for name, config in arms.items()} == {
        f"intervals={k}_ode_steps={steps}": (k, steps) for k in (1, 3) for steps in (4, 8)
    }
    text = 'preset = "digits"\n[arms.a]\nseed = 1\n[arms.b]\nseed = 2\n[product]\nfixed_t = [false, true]\n'
    arms = read_grid(grid(tmp_path, text)).arms
    assert {name: (config.seed, config.fixed_t) for name, config in arms.items()} == {
        "a_fixed_t=false": (1, False), "a_fixed_t=true": (1, True),
        "b_fixed_t=false": (2, False), "b_fixed_t=true": (2, True),
    }  # fmt: skip


def test_json_can_say_null(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text('{"preset": "cifar10", "arms": {"a": {"ema_rampup": null}}}')
    assert read_grid(tmp_path / "grid.json").arms["a"].ema_rampup is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = ", "grid.toml is not TOML"),
        ('preset = "digits"', "grid.toml has no arms: add [arms.NAME] tables or a [product]"),
        ('preset = "mnist"\n[arms.a]', "arm a: there is no preset 'mnist'"),
        ('preset = "church256"\n[arms.a]', "arm a: the preset 'church256' needs images"),
        ("[arms.a]\nintervals = 0", "arm a: intervals: Input should be greater than or equal to 1, got 0"),
        ("[arms.a]\nmodel.colour = 1", "arm a: model.colour: Extra inputs are not permitted, got 1"),
        ('[arms.a]\nmodel.mapping = "mlp"', 'arm a: mapping="mlp" has no time'),
        ("colour = 1\n[arms.a]", "grid.toml: colour: Extra inputs are not permitted, got 1"),
        ("arms = 1", "grid.toml: arms: Input should be a valid dictionary, got 1"),
        ('better = "no"\n[arms.a]', "grid.toml: better: Input should be 'lower' or 'higher', got 'no'"),
        ('[arms."../a"]', "'../a' cannot name a folder"),
    ],
)
def test_grid_files_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_grid(grid(tmp_path, text))
    assert message in str(caught.value)


# ---- Running ----


def test_every_arm_is_a_run(finished: Path) -> None:
    for name, (intervals, fixed, mapping) in {
        "k2": (2, False, "ode"), "fixed": (2, True, "ode"), "mlp": (1, False, "mlp"),
    }.items():  # fmt: skip
        config = json.loads((finished / name / "config.json").read_text())
        assert (config["intervals"], config["fixed_t"], config["model"]["mapping"]) == (intervals, fixed, mapping)
        assert [row["kimg"] for row in read_stats(finished / name)] == [0.008, 0.016, 0.024]
        assert (finished / name / "model" / "model.safetensors").is_file()
    assert not list(finished.glob("*.error.txt"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_study_goes_on_exactly(finished: Path, tmp_path: Path, number: Any) -> None:
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
    assert not failed and not interrupted and said[0] == "k2 (1 of 3): has ended before, kept"
    assert (out / "k2" / "config.json").stat().st_mtime_ns == before
    for name in study.arms:
        assert_same_end(out / name, finished / name)


@pytest.mark.parametrize("iteration", [1, 6])  # before the first tick's checkpoint, and after it
def test_a_killed_study_goes_on_exactly(finished: Path, tmp_path: Path, iteration: int) -> None:
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


def test_a_kill_before_the_first_checkpoint(finished: Path, tmp_path: Path) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "_snapshot", lambda self: sys.exit())
        with pytest.raises(SystemExit):
            run(study, out)
    assert {path.name for path in (out / "k2").iterdir()} == {"config.json", "data.json", "reals.png"}
    assert run(study, out)[:2] == ([], False)
    assert_same_end(out / "k2", finished / "k2")


def test_a_kill_before_the_model_was_exported(tmp_path: Path) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    run(study, out)
    model = out / "k2" / "model" / "model.safetensors"
    weights = model.read_bytes()
    (out / "k2" / "finished.json").unlink()
    model.write_bytes(b"of an earlier snapshot")
    _, _, said = run(study, out)
    assert said[0] == "k2 (1 of 3): 0.024 kimg, K = 2" and "kept" in said[1]
    assert model.read_bytes() == weights


def test_an_arm_that_fails_does_not_stop_the_others(finished: Path, tmp_path: Path) -> None:
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


def test_a_changed_grid_is_noticed(finished: Path, tmp_path: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    for old, new, message in (
        ("batch = 4", "batch = 8", "k2 holds a run with batch 4 (the grid now says 8): undo the change"),
        ("dim_h = 16", "dim_h = 8", "k2 holds a run with model.dim_h 16 (the grid now says 8)"),
        ("total_kimg = 0.024", "total_kimg = 0.048", "--kimg 0.048`"),
    ):
        with pytest.raises(ValueError, match="holds a run with") as caught:
            run(read_grid(grid(tmp_path, GRID.replace(old, new))), finished)
        assert message in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == files


def test_a_removed_folder_is_trained_anew(tmp_path: Path) -> None:
    """As the message of a changed grid advises."""
    text = GRID.partition("[arms.fixed]")[0]
    run(read_grid(grid(tmp_path, text)), tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "k2")
    changed = read_grid(grid(tmp_path, text.replace("batch = 4", "batch = 8")))
    assert run(changed, tmp_path / "out") == ([], False, ["k2 (1 of 1): 0.024 kimg, K = 2"])
    assert json.loads((tmp_path / "out" / "k2" / "config.json").read_text())["batch"] == 8


def test_a_run_lengthened_by_hand_is_taken_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(read_grid(grid(tmp_path, GRID.partition("[arms.fixed]")[0])), out)
    Trainer.resume(out / "k2", total_kimg=0.032, progress=False).fit()
    longer = GRID.partition("[arms.fixed]")[0].replace("total_kimg = 0.024", "total_kimg = 0.032")
    assert run(read_grid(grid(tmp_path, longer)), out)[:2] == ([], False)
    assert json.loads((out / "table.json").read_text())["rows"][0]["state"] == "ended"


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    (out / "fixed").mkdir(parents=True)
    (out / "fixed" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"fixed is not empty and no run that can go on: take another --out"):
        run(study, out)
    assert [path.name for path in out.rglob("*")] == ["fixed", "thesis.tex"]


def test_without_matplotlib_nothing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'the curve needs matplotlib: pip install "spigan\[bench\]"'):
        run(read_grid(grid(tmp_path)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- The report ----


def write_run(folder: Path, metrics: list[dict[str, Any]], stats: int = 3, tail: str = "") -> None:
    """metrics.jsonl and stats.jsonl of a run, as training leaves them; `tail` is a line that a kill cut short."""
    folder.mkdir(parents=True)
    rows = [{"iteration": 10 * i, "kimg": float(i), "seconds": 5.0 * i, "images_per_sec": 200.0, "loss_g": 1.0 + i}
            for i in range(1, stats + 1)]  # fmt: skip
    (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if metrics:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics) + tail)


def measured(*values: float) -> list[dict[str, Any]]:
    return [{"kimg": 1.0 + i, "seconds": 4.0 * i, "FD-ResNet56": v, "recall": 1 / v} for i, v in enumerate(values)]


def test_table(tmp_path: Path) -> None:
    study = read_grid(grid(tmp_path, GRID.replace('"loss_g"', '"FD-ResNet56"\nbetter = "lower"')))
    out = tmp_path / "out"
    write_run(out / "k2", measured(9.0, 3.5, 4.25), tail='{"kimg": 4.0, "FD-Res')
    write_run(out / "fixed", measured(20.0, 10.0))
    paths = write_report(study, out)
    assert [path.name for path in paths] == ["table.md", "table.json", "curve.png"]
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0] == "Preset `digits`, FD-ResNet56 (lower is better). Written by `spigan ablate`."
    assert lines[2].startswith("| arm | K | fixed t | mapping | updates | kimg | last FD-ResNet56 | best FD-ResNet56")
    assert lines[4] == "| k2 | 2 | no | ode | sequential | 3 | 4.25 | 3.5 (2) | 15 | 200 | at 3 of 0.024 kimg |"
    assert lines[5] == "| fixed | 2 | yes | ode | sequential | 3 | 10 | 10 (2) | 15 | 200 | at 3 of 0.024 kimg |"
    assert lines[6] == "| mlp | 1 | no | mlp | sequential | 0 |  |  | 0 |  | not started |"
    report = json.loads((out / "table.json").read_text())
    assert (report["preset"], report["metric"], report["better"]) == ("digits", "FD-ResNet56", "lower")
    assert report["rows"][0]["best"] == 3.5 and report["rows"][0]["best_kimg"] == 2.0
    assert report["rows"][2]["last"] is None
    with Image.open(out / "curve.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_higher_may_be_better(tmp_path: Path) -> None:
    text = GRID.replace('metric = "loss_g"', 'metric = "recall"\nbetter = "higher"')
    write_run(tmp_path / "out" / "k2", measured(8.0, 2.0, 4.0))
    write_report(read_grid(grid(tmp_path, text)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]["best"] == 0.5
    assert "| 0.25 | 0.5 (2) |" in (tmp_path / "out" / "table.md").read_text()


def test_neither_may_be_better(tmp_path: Path) -> None:
    write_run(tmp_path / "out" / "k2", [])
    write_report(read_grid(grid(tmp_path)), tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0] == "Preset `digits`, loss_g. Written by `spigan ablate`."
    assert lines[2] == "| arm | K | fixed t | mapping | updates | kimg | last loss_g | seconds | images/s | state |"
    assert lines[4] == "| k2 | 2 | no | ode | sequential | 3 | 4 | 15 | 200 | at 3 of 0.024 kimg |"
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]["best"] is None


def test_statistics_stand_in_for_metrics(tmp_path: Path) -> None:
    write_run(tmp_path / "a", measured(9.0))
    assert read_curve(tmp_path / "a", "FD-ResNet56") == [(1.0, 0.0, 9.0)]
    assert read_curve(tmp_path / "a", "loss_g") == [(i, 5.0 * i / 3600, 1.0 + i) for i in (1.0, 2.0, 3.0)]
    assert read_curve(tmp_path / "a", "FID") == read_curve(tmp_path / "nothing", "loss_g") == []


def test_a_metric_that_no_run_has(tmp_path: Path) -> None:
    write_run(tmp_path / "out" / "k2", measured(9.0))
    study = read_grid(grid(tmp_path, GRID.replace("loss_g", "FID")))
    paths = write_report(study, tmp_path / "out")
    assert [path.name for path in paths] == ["table.md", "table.json"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "No run has measured FID; there are: FD-ResNet56, images_per_sec, loss_g, recall." in text


def test_metrics_alone_make_a_report(tmp_path: Path) -> None:
    """As benchmarks/results keeps them, without the statistics of every tick."""
    study, out = read_grid(grid(tmp_path, GRID.replace("loss_g", "FD-ResNet56"))), tmp_path / "out"
    write_run(out / "k2", measured(9.0, 3.5), stats=0)
    assert (out / "k2" / "stats.jsonl").read_text() == ""
    write_report(study, out)
    row = (out / "table.md").read_text().splitlines()[4]
    assert row == "| k2 | 2 | no | ode | sequential | 2 | 3.5 | 4 |  | at 2 of 0.024 kimg |"


def test_curves(tmp_path: Path) -> None:
    study = read_grid(grid(tmp_path))
    curves = {"k2": [(1.0, 0.5, 9.0), (2.0, 1.5, 3.0)], "fixed": [(1.0, 0.75, 20.0)], "mlp": []}
    fig8, images, hours = curve_figure(study, curves).axes
    assert [line.get_label() for line in fig8.lines] == ["random t, K = 2 (k2)", "fixed t, K = 2 (fixed)"]
    assert [line.get_color() for line in fig8.lines] == ["tab:blue", "tab:orange"]
    assert fig8.lines[0].get_xydata().tolist() == images.lines[0].get_xydata().tolist() == [[1.0, 9.0], [2.0, 3.0]]
    assert [line.get_xydata().tolist() for line in hours.lines] == [[[0.5, 9.0], [1.5, 3.0]], [[0.75, 20.0]]]
    for ax in (images, hours):
        assert [line.get_label() for line in ax.lines] == ["k2", "fixed"]
        assert [line.get_color() for line in ax.lines] == ["tab:blue", "tab:orange"]
    assert [ax.get_xlabel() for ax in (fig8, images)] == 2 * ["images seen, thousands"]
    assert hours.get_xlabel() == "hours of training" and hours.get_ylabel() == fig8.get_ylabel() == "loss_g"
    del study.arms["fixed"], curves["fixed"]
    images, hours = curve_figure(study, curves).axes
    assert [text.get_text() for ax in (images, hours) for text in ax.get_legend().get_texts()] == ["k2", "k2"]


# ---- The command ----


def spigan_cli(*args: Any) -> Any:
    return CliRunner().invoke(app, ["ablate", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_command(finished: Path, tmp_path: Path) -> None:
    path, out = grid(tmp_path), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, lambda: signal.raise_signal(signal.SIGINT), "fixed", 5)
        result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1] == f"Stopped. Go on with: spigan ablate {path} --out {out}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, lambda: 1 // 0, "mlp", 5)
        result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 1
    assert result.stderr == "error: 1 of 3 arms failed: mlp; run it again to try them again\n"
    result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    report = ", ".join(str(out / name) for name in ("table.md", "table.json", "curve.png"))
    assert result.stdout.splitlines()[-1] == f"Report: {report}"
    for name in ("k2", "fixed", "mlp"):
        assert_same_end(out / name, finished / name)


def test_report_only(tmp_path: Path) -> None:
    path, out = grid(tmp_path), tmp_path / "out"
    write_run(out / "k2", [])
    result = spigan_cli(path, "--out", out, "--report-only")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Report: {out / 'table.md'}, ")
    assert sorted(path.name for path in (out / "k2").iterdir()) == ["stats.jsonl"]
    assert not (out / "fixed").exists()


def test_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = spigan_cli("table5", "--show")
    assert result.exit_code == 0 and result.stdout == grid_path("table5").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "none.toml is no grid file, and none of those that come with spigan: digits, table5"),
        (["half.toml"], "half.toml is not TOML"),
        (["."], ". is no grid file"),
    ],
)
def test_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.toml").write_text("preset = ")
    result = spigan_cli(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["half.toml"]


@pytest.mark.parametrize(
    ("title", "arms", "last"),
    [
        ("Three arms on CIFAR-10", ("k1", "k2", "mlp"), None),
        ("R1 gamma and joint updates on CIFAR-10", ("k1", "k1g", "k2", "k2g", "k2j"), 200),
    ],
)
def test_the_documented_curves_are_those_that_were_measured(
    title: str, arms: tuple[str, ...], last: int | None
) -> None:
    """Every cell of the tables of docs/experiments.md, and that they end where the curves do, or at `last`."""
    root = Path(__file__).parents[1]
    curves = [
        {
            kimg: (metric, hours)
            for kimg, hours, metric in read_curve(root / "benchmarks/results/cifar10-small" / arm, "FD-ResNet56")
        }
        for arm in arms
    ]
    section = (root / "docs" / "experiments.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) >= 10
    for kimg, *cells in rows:
        measured = [curve.get(float(kimg)) for curve in curves]
        expected = ["{:.1f} ({:.2f} h)".format(*point) if point else "" for point in measured]
        assert [cell.strip() for cell in cells] == expected, kimg
    for curve in curves:  # up to the end of each
        assert any(float(kimg) == min(max(curve), last or max(curve)) for kimg, *_ in rows)
