"""The report of a study: table and curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from spigan.ablation.grid import read_grid
from spigan.ablation.report import curve_figure, read_curve, write_report


def test_table(tmp_path: Path, grid: Any, write_run: Any, measured: Any, grid_text: str) -> None:
    study = read_grid(grid(tmp_path, grid_text.replace('"loss_g"', '"FD-ResNet56"\nbetter = "lower"')))
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


def test_higher_may_be_better(tmp_path: Path, grid: Any, write_run: Any, measured: Any, grid_text: str) -> None:
    text = grid_text.replace('metric = "loss_g"', 'metric = "recall"\nbetter = "higher"')
    write_run(tmp_path / "out" / "k2", measured(8.0, 2.0, 4.0))
    write_report(read_grid(grid(tmp_path, text)), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]["best"] == 0.5
    assert "| 0.25 | 0.5 (2) |" in (tmp_path / "out" / "table.md").read_text()


def test_neither_may_be_better(tmp_path: Path, grid: Any, write_run: Any) -> None:
    write_run(tmp_path / "out" / "k2", [])
    write_report(read_grid(grid(tmp_path)), tmp_path / "out")
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert lines[0] == "Preset `digits`, loss_g. Written by `spigan ablate`."
    assert lines[2] == "| arm | K | fixed t | mapping | updates | kimg | last loss_g | seconds | images/s | state |"
    assert lines[4] == "| k2 | 2 | no | ode | sequential | 3 | 4 | 15 | 200 | at 3 of 0.024 kimg |"
    assert json.loads((tmp_path / "out" / "table.json").read_text())["rows"][0]["best"] is None


def test_statistics_stand_in_for_metrics(tmp_path: Path, write_run: Any, measured: Any) -> None:
    write_run(tmp_path / "a", measured(9.0))
    assert read_curve(tmp_path / "a", "FD-ResNet56") == [(1.0, 0.0, 9.0)]
    assert read_curve(tmp_path / "a", "loss_g") == [(i, 5.0 * i / 3600, 1.0 + i) for i in (1.0, 2.0, 3.0)]
    assert read_curve(tmp_path / "a", "FID") == read_curve(tmp_path / "nothing", "loss_g") == []


def test_the_state_of_an_arm(tmp_path: Path, grid: Any, write_run: Any) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    write_run(out / "k2", [])
    (out / "fixed" / "checkpoints").mkdir(parents=True)
    (out / "fixed" / "checkpoints" / "checkpoint-000000000.safetensors").touch()  # of a run that was killed at once
    write_report(study, out)
    states = [row["state"] for row in json.loads((out / "table.json").read_text())["rows"]]
    assert states == ["at 3 of 0.024 kimg", "at 0 of 0.024 kimg", "not started"]
    (out / "k2" / "finished.json").write_text('{"total_kimg": 0.024}')
    (out / "fixed" / "finished.json").write_text('{"total_kimg": 0.012}')  # before it was extended
    (out / "mlp.error.txt").write_text("first line\n\ntraceback")
    write_report(study, out)
    states = [row["state"] for row in json.loads((out / "table.json").read_text())["rows"]]
    assert states == ["ended", "at 0 of 0.024 kimg", "failed: first line"]


def test_the_speed_of_an_arm_is_the_median(tmp_path: Path, grid: Any, write_run: Any) -> None:
    study, out = read_grid(grid(tmp_path)), tmp_path / "out"
    write_run(out / "k2", [])
    rows = [json.loads(line) for line in (out / "k2" / "stats.jsonl").read_text().splitlines()]
    for row, rate in zip(rows, (100.0, 10.0, 70.0), strict=True):
        row["images_per_sec"] = rate
    (out / "k2" / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(study, out)
    assert json.loads((out / "table.json").read_text())["rows"][0]["images_per_sec"] == 70.0


def test_a_metric_that_no_run_has(tmp_path: Path, grid: Any, write_run: Any, measured: Any, grid_text: str) -> None:
    write_run(tmp_path / "out" / "k2", measured(9.0))
    study = read_grid(grid(tmp_path, grid_text.replace("loss_g", "FID")))
    paths = write_report(study, tmp_path / "out")
    assert [path.name for path in paths] == ["table.md", "table.json"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "No run has measured FID; available: FD-ResNet56, images_per_sec, loss_g, recall." in text


def test_metrics_alone_make_a_report(tmp_path: Path, grid: Any, write_run: Any, measured: Any, grid_text: str) -> None:
    """As benchmarks/results keeps them, without the statistics of every tick."""
    study, out = read_grid(grid(tmp_path, grid_text.replace("loss_g", "FD-ResNet56"))), tmp_path / "out"
    write_run(out / "k2", measured(9.0, 3.5), stats=0)
    assert (out / "k2" / "stats.jsonl").read_text() == ""
    write_report(study, out)
    row = (out / "table.md").read_text().splitlines()[4]
    assert row == "| k2 | 2 | no | ode | sequential | 2 | 3.5 | 4 |  | at 2 of 0.024 kimg |"


def test_curves(tmp_path: Path, grid: Any) -> None:
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
    del study.runs["fixed"], curves["fixed"]
    images, hours = curve_figure(study, curves).axes
    assert [text.get_text() for ax in (images, hours) for text in ax.get_legend().get_texts()] == ["k2", "k2"]


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
    root = Path(__file__).parents[2]
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
