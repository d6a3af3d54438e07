"""The program: help, version, unknown commands, and what it imports."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import typer.main

import spigan
from spigan.cli import app

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS |= {f"data {name}": command for name, command in COMMANDS.pop("data").commands.items()}


def test_version(run: Any) -> None:
    assert run("--version") == f"spigan {spigan.__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option(name: str, flag: str, run: Any) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(*name.split(), flag))
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")]
    assert options
    assert not [option for option in options if option not in text]
    assert COMMANDS[name].help.split(".")[0].split("\n")[0] in text


def test_help_of_the_program_lists_every_command(run: Any) -> None:
    text = run("--help")
    assert {"demo", "train", "sample", "evaluate", "interpolate", "ablate", "export", "bench", "info"} <= set(COMMANDS)
    assert not [name for name in COMMANDS if name.split()[0] not in text]


def test_help_is_fast_since_it_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from spigan.cli import app\n"
        "for command in ('', 'train', 'sample', 'evaluate', 'interpolate', 'ablate', 'export', 'data'):\n"
        "    assert CliRunner().invoke(app, [*filter(None, [command]), '--help']).exit_code == 0\n"
        "print({'torch', 'numpy', 'sklearn', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_installed_command() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from spigan.cli import main; main()", "train", "--batch", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and result.stderr.startswith("error: batch: ")
    assert result.stdout == ""


def test_unknown_command_and_option(spigan_cli: Any) -> None:
    for arguments, wrong in (
        (["sampel"], "sampel"),
        (["sample", "--nmu", "3"], "--nmu"),
        (["sample", "-n", "0"], "-n"),
    ):
        result = spigan_cli(*arguments)
        assert result.exit_code == 2
        assert wrong in result.stderr and "Traceback" not in result.stderr
