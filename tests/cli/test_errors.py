"""Errors of the command line: one line each, readable in any terminal, and the value that was probably meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spigan.cli.errors import warn
from spigan.files import printable


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sample", "--dtype", "bfloat"],
            "--dtype must be float32, bfloat16 or float16, got bfloat; did you mean bfloat16?",
        ),
        (["sample", "--dtype", ""], "--dtype must be float32, bfloat16 or float16, got "),
        (["bench", "--dtype", "float"], "got float; did you mean float32?"),
        (["evaluate", "--dtype", "flaot16"], "got flaot16; did you mean float16?"),
        (["sample", "--format", "pngs"], "--format must be png, grid, npz or parquet, got pngs; did you mean png?"),
        (["export", "--out", "a", "--format", "onx"], "--format must be onnx or pt2, got onx; did you mean onnx?"),
        (["data", "convert", "x", "--out", "a", "--resolution", "8", "--format", "jpg"], "got jpg; did you mean jpeg?"),
        (["interpolate", "--kind", "tiem"], "--kind must be time, z, h or path, got tiem; did you mean time?"),
        (["train", "--preset", "cifar"], "there is no preset 'cifar'; available: digits, cifar10, "),
        (["train", "--preset", "cifar"], "; did you mean cifar10?"),
        (["bench", "--preset", "celeba256"], "; did you mean celebahq256?"),
        (["sample", "--device", "gpu"], "--device must be auto, cpu, cuda, cuda:1, ..., got gpu; did you mean cuda?"),
        (["train", "--device", "GPU:1"], "got GPU:1; did you mean cuda?"),
        (["sample", "--device", "cuad:0"], "got cuad:0; did you mean cuda?"),
        (["evaluate", "--features", "incepton"], "got incepton; did you mean inception?"),
        (["ablate", "tabel5"], "did you mean table5?"),
        (["train", "--set", "model.resoluton=64"], "model.resoluton: there is no such field, got 64; did you mean"),
        (["train", "--set", "model.resoluton=64"], "; did you mean model.resolution?"),
        (["train", "--set", "resolution=64"], "; did you mean model.resolution?"),
        (["train", "--set", "agument=ada"], "; did you mean augment?"),
        (["train", "--set", "augment=difaug"], "; did you mean diffaug?"),
        (["evaluate", "--resize", "lancos"], "; did you mean lanczos?"),
    ],
)
def test_the_nearest_value_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, refused: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not list(tmp_path.iterdir())


def test_commands_and_options_are_suggested(spigan_cli: Any) -> None:
    result = spigan_cli("sampel")
    assert result.exit_code == 2 and "Did you mean 'sample'" in result.stderr
    result = spigan_cli("sample", "--dtyp", "float32")
    assert result.exit_code == 2 and "--dtype" in result.stderr


def test_control_characters_are_escaped(refused: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A name may contain commands to the terminal."""
    assert refused("interpolate", "--out", "\x1b]0;title\x07").startswith("\\x1b]0;title\\x07: expected a .png")
    warn("\x1b]0;title\x07")
    assert capsys.readouterr().err == "warning: \\x1b]0;title\\x07\n"


def test_lines_and_tabs_stay() -> None:
    assert printable("a\tb\nc: é\x1b\r", keep="\n\t") == "a\tb\nc: é\\x1b\\r"


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, FloatingPointError, "BackendUnavailable"])
def test_expected_errors_take_one_line(monkeypatch: pytest.MonkeyPatch, error: Any, refused: Any) -> None:
    from spigan import info, ops

    def fail(as_json: bool) -> None:
        raise (ops.BackendUnavailable if isinstance(error, str) else error)("out of order")

    monkeypatch.setattr(info, "main", fail)
    assert refused("info") == "out of order"


@pytest.mark.parametrize("error", [KeyError, RuntimeError, AssertionError])
def test_a_bug_is_not_disguised(monkeypatch: pytest.MonkeyPatch, error: type[Exception], spigan_cli: Any) -> None:
    from spigan import info

    def fail(as_json: bool) -> None:
        raise error("a bug")

    monkeypatch.setattr(info, "main", fail)
    result = spigan_cli("info")
    assert isinstance(result.exception, error)


def test_an_error_names_its_process(monkeypatch: pytest.MonkeyPatch, spigan_cli: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert spigan_cli("sample", "--dtype", "int8").stderr.startswith("error in process 3 of 4: --dtype must be")
    result = spigan_cli("demo")
    assert result.exit_code == 1 and "demo runs in one process; only `spigan train` can use several" in result.stderr


def test_a_closed_pipe_is_not_an_error() -> None:
    script = f"{sys.executable} -m spigan info --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr and "error" not in result.stderr
