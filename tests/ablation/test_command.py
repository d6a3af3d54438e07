"""`spigan ablate`."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from spigan.ablation.grid import grid_path


@pytest.mark.slow
def test_command(
    finished: Path, tmp_path: Path, grid: Any, disturb: Any, assert_same_end: Any, spigan_cli: Any
) -> None:
    path, out = grid(tmp_path), tmp_path / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, lambda: signal.raise_signal(signal.SIGINT), "fixed", 5)
        result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 130
    assert result.stdout.splitlines()[-1] == f"Stopped. Resume with: spigan ablate {path} --out {out}"
    with pytest.MonkeyPatch.context() as monkeypatch:
        disturb(monkeypatch, lambda: 1 // 0, "mlp", 5)
        result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 1
    assert result.stderr == "error: 1 of 3 runs failed: mlp; run the command again to retry\n"
    result = spigan_cli(path, "--out", out, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    report = ", ".join(str(out / name) for name in ("table.md", "table.json", "curve.png"))
    assert result.stdout.splitlines()[-1] == f"Report: {report}"
    for name in ("k2", "fixed", "mlp"):
        assert_same_end(out / name, finished / name)


def test_report_only(tmp_path: Path, grid: Any, write_run: Any, spigan_cli: Any) -> None:
    path, out = grid(tmp_path), tmp_path / "out"
    write_run(out / "k2", [])
    result = spigan_cli(path, "--out", out, "--report-only")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"Report: {out / 'table.md'}, ")
    assert sorted(path.name for path in (out / "k2").iterdir()) == ["stats.jsonl"]
    assert not (out / "fixed").exists()


def test_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spigan_cli: Any) -> None:
    monkeypatch.chdir(tmp_path)
    result = spigan_cli("table5", "--show")
    assert result.exit_code == 0 and result.stdout == grid_path("table5").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.toml"], "none.toml is neither a file nor a bundled grid (digits, table5)"),
        (["half.toml"], "half.toml is not TOML"),
        (["."], ". is neither a file nor a bundled grid"),
    ],
)
def test_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, spigan_cli: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("half.toml").write_text("preset = ")
    result = spigan_cli(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["half.toml"]
