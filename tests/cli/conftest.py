"""Shared by the tests of the command line: running commands in this process, a tiny saved model and a tiny run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from spigan import SPIGAN, ModelConfig
from spigan.cli import app
from spigan.sampling import Sampler

TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
# The digits preset with a network that trains in a moment.
TINY_RUN = ["--preset", "digits", "--batch", "8", "--device", "cpu", "--quiet"] + [
    f"--set={field}"
    for field in (
        "model.dim_h=8",
        "model.embed_channels=2",
        "model.channel_base=32",
        "model.channel_max=4",
        "tick_kimg=0.05",
    )
]


def invoke(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="session")
def spigan_cli() -> Callable[..., Any]:
    """Runs `spigan ARGS` in this process."""
    return invoke


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """Runs `spigan ARGS`, which must succeed, and returns what it printed."""

    def run(*args: Any) -> str:
        result = invoke(*args)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    return run


@pytest.fixture(scope="session")
def refused() -> Callable[..., str]:
    """Runs `spigan ARGS`, which must fail with one line on standard error, and returns that line."""

    def refused(*args: Any) -> str:
        result = invoke(*args)
        assert result.exit_code == 1, result.output
        assert isinstance(result.exception, SystemExit), repr(result.exception)  # anything else would be a traceback
        lines = [line for line in re.split(r"[\r\n]", result.stderr) if line.strip() and "img/s" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0].removeprefix("error: ")

    return refused


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of 8x8 RGB images."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    SPIGAN(ModelConfig.model_validate(TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run: Callable[..., str]) -> Path:
    """A run of 0.1 kimg."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    output = run("train", "--out", folder, "--kimg", 0.1, *TINY_RUN)
    assert f"{folder}: 0.1 kimg on cpu, K = 2" in output
    return folder


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """pixels(model, n, seed): uint8 [N, H, W, C] that the saved model makes on the CPU."""

    def pixels(model: Path, n: int, seed: int = 0, **options: Any) -> np.ndarray:
        sampler = Sampler(model, device="cpu", output="uint8", **options)
        return sampler(range(seed, seed + n)).movedim(-3, -1).numpy()

    return pixels


@pytest.fixture(scope="session")
def close() -> Callable[..., bool]:
    """close(a, b): whether uint8 images are equal up to rounding."""

    def close(a: np.ndarray, b: np.ndarray, levels: int = 1) -> bool:
        return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= levels

    return close
