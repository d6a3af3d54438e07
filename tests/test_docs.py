"""docs/troubleshooting.md quotes messages that exist: each is found in the source of spigan/ or kernels/."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OURS = PAGE.split("\n## Messages from other programs\n")[0]
HEADINGS = re.findall(r"^### (.+)$", OURS, re.MULTILINE)
QUOTES = [quote for heading in HEADINGS for quote in re.findall(r"`([^`]+)`", heading)]


@cache
def constants() -> tuple[str, ...]:
    """The string constants of the package, with those of f-strings between the values that they insert."""
    files = [*(ROOT / "spigan").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return tuple(node.value for node in nodes if isinstance(node.value, str))


@pytest.mark.parametrize("quote", QUOTES)
def test_quoted_message_exists(quote: str) -> None:
    parts = [part.strip() for part in quote.split("...") if part.strip()]
    missing = [part for part in parts if not any(part in constant for constant in constants())]
    assert not missing, f"no message of spigan contains {missing}"


def test_every_heading_quotes_a_message() -> None:
    assert len(HEADINGS) >= 20
    assert all(heading.count("`") >= 2 for heading in HEADINGS)
    assert all(len(quote) >= 8 for quote in QUOTES)
