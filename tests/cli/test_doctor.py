"""`spigan doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from spigan import doctor

CASES = [case for case in doctor.cases() if case.op == "rk4_mlp" and case.what == "two times"]


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cases", lambda: CASES)


def test_right(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "speeds", lambda device: iter([doctor.Speed("a copy", 2e-3, 8e-3, 0.5)]))
    output = run("doctor", "--backend", "cpp", "--out", tmp_path / "doctor.json")
    assert "cpu: 2 of 2 cases are right (2 on cpp)" in output
    assert "a copy: 2 ms, 4 times as fast as the reference, 50 % of a copy" in output
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert [finding["case"] for finding in written["findings"]] == [case.name for case in CASES]
    assert written["speeds"] == [{"name": "a copy", "seconds": 2e-3, "reference": 8e-3, "copy_share": 0.5}]


def test_wrong(spigan_cli: Any) -> None:
    result = spigan_cli("doctor", "--backend", "cuda", "--no-speed")
    assert result.exit_code == 1
    assert "WRONG  cuda: rk4_mlp, two times, float32: it runs on CUDA devices, not on cpu" in result.output
    assert "cpu: 0 of 2 cases are right" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(refused: Any) -> None:
    assert refused("doctor", "--gpu").startswith("--gpu needs a CUDA device, and torch finds none")
