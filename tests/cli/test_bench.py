"""`spigan bench`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest


def test_bench(model: Path, tmp_path: Path, run: Any) -> None:
    output = run("bench", "--model", model, "-n", 5, "--batch", 2, "--profile", tmp_path / "trace.json")
    assert re.search(r"5 images of 8 x 8, bfloat16, 2 at a time, NFE = 1, on .*: [\d.]+ ms, [\d.]+ images/s", output)
    assert all(f"  {stage} of a batch:" in output for stage in ("noise", "mapping", "synthesis", "convert"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnist"], "there is no preset 'mnist'"),
        (["--model", "{tmp}"], "{tmp} is not a saved spigan model"),
        (["--dtype", "float64"], "--dtype must be float32, bfloat16 or float16, got float64"),
        (["--device", "nonsense"], "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
        (["report", "{tmp}/none.json"], "none.json"),
    ],
)
def test_bench_refuses(tmp_path: Path, arguments: list[str], message: str, refused: Any) -> None:
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert message.replace("{tmp}", str(tmp_path)) in refused("bench", *arguments)
    assert not list(tmp_path.iterdir())
