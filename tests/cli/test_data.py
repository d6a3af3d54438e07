"""`spigan data`: what the commands print, and their exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images, two of them equal."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (10, 12), colour).save(folder / f"{name}.png")
    return folder


def test_convert(pictures: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"
    arguments = ["data", "convert", pictures, "--out", out, "--resolution", 8, "--workers", 0, "--quiet"]
    printed = run(*arguments)
    assert printed.startswith(f"{out}: 3 images of 8 x 8 in 1 files, ") and "; 3 read now, " in printed
    assert "; 0 read now, " in run(*arguments)


def test_convert_broken_images(pictures: Path, tmp_path: Path, spigan_cli: Any) -> None:
    (pictures / "b.png").write_bytes(b"no image")
    arguments = ["data", "convert", pictures, "--out", tmp_path / "out", "--resolution", 8, "--workers", 0, "--quiet"]
    result = spigan_cli(*arguments)
    assert result.exit_code == 1 and result.stderr.startswith("broken: ") and "b.png" in result.stderr
    assert "error: files that contain broken images were not written: repair the images, or add" in result.stderr
    result = spigan_cli(*arguments, "--skip-broken")
    assert result.exit_code == 0 and result.stdout.startswith(f"{tmp_path / 'out'}: 2 images of 8 x 8")
    for path in pictures.iterdir():
        path.write_bytes(b"no image")
    result = spigan_cli(*arguments[:3], "--out", tmp_path / "none", *arguments[5:], "--skip-broken")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1] == "error: no images are left"


def test_check(pictures: Path, spigan_cli: Any) -> None:
    result = spigan_cli("data", "check", pictures, "--workers", 0, "--quiet")
    assert result.exit_code == 0 and result.stderr == ""
    for line in ("sizes:      10 x 12 (3)", "duplicates: 1 in 1 groups of identical images", "images:     3, 0 broken"):
        assert line in result.stdout
    (pictures / "c.png").rename(pictures / "c\x1b[2J.png")
    (pictures / "c\x1b[2J.png").write_bytes(b"no image")
    result = spigan_cli("data", "check", pictures, "--workers", 0, "--quiet", "--json")
    assert result.exit_code == 1 and len(json.loads(result.stdout)["broken"]) == 1
    result = spigan_cli("data", "check", pictures, "--workers", 0, "--quiet")
    assert result.exit_code == 1 and "images:     3, 1 broken" in result.stdout
    assert result.stderr.startswith("broken: ") and "c\\x1b[2J.png" in result.stderr
