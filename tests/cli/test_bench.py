"""`spigan bench`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spigan import sampling


def test_bench(model: Path, tmp_path: Path, run: Any) -> None:
    output = run("bench", "--model", model, "-n", 5, "--batch", 2, "--profile", tmp_path / "trace.json")
    assert re.search(r"5 images of 8 x 8, bfloat16, 2 at a time, NFE = 1, on .*: [\d.]+ ms, [\d.]+ images/s", output)
    assert all(f"  {stage} of a batch:" in output for stage in ("noise", "mapping", "synthesis", "convert"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(("options", "batch_size"), [([], 5), (["--batch", "2"], 2), (["--batch", "8"], 8)])
def test_bench_makes_samplers_of_its_batch_size(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, options: list[str], batch_size: int
) -> None:
    """From the start: a sampler on a GPU captures batches of the size that it is made with."""
    made = []

    class Recorded(sampling.Sampler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append((kwargs["batch_size"], self.batch_size))

    monkeypatch.setattr(sampling, "Sampler", Recorded)
    run("bench", "--model", model, "-n", 5, "--profile", tmp_path / "trace.json", *options)
    assert made == [(batch_size, batch_size)] * 2


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
