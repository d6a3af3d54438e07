"""`spigan info`."""

from __future__ import annotations

import json
from typing import Any

import spigan


def test_info(run: Any) -> None:
    text = run("info")
    assert f"spigan: {spigan.__version__}" in text and "backends on cpu" in text
    report = json.loads(run("info", "--json"))
    assert report["versions"]["spigan"] == spigan.__version__
