"""`spigan info`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import spigan


def test_info(run: Any) -> None:
    text = run("info")
    assert f"spigan: {spigan.__version__}" in text and "backends on cpu" in text
    report = json.loads(run("info", "--json"))
    assert report["versions"]["spigan"] == spigan.__version__


def test_plans(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path))
    assert "plans on cpu (" in run("info", "--plans") and "none yet" in run("info", "--plans")
    assert json.loads(run("info", "--plans", "--json"))["cpu"]["plans"] == {}
