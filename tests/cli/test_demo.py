"""`spigan demo`: what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.mark.slow
def test_demo(tmp_path: Path, run: Any, pixels: Any, close: Any) -> None:
    output = run("demo", "--kimg", 0.1, "--out", tmp_path / "demo", "--seed", 3)
    folder = tmp_path / "demo" / "00000"
    for name in ("samples.png", "strip.png"):
        assert str(folder / name) in output
    assert re.search(r"100 images: NFE = 1, [0-9.]+ ms on ", output)
    with Image.open(folder / "samples.png") as image:
        assert image.mode == "L" and image.size == ((8 * 17 - 1) * 4, (8 * 17 - 1) * 4)
    with Image.open(folder / "strip.png") as image:  # 4 images at 9 times
        assert image.size == ((9 * 17 - 1) * 4, (4 * 17 - 1) * 4)
        strip = np.asarray(image)[::4, ::4]
    first, last = strip[:16, :16], strip[:16, 8 * 17 : 8 * 17 + 16]
    expected = pixels(folder / "model", 1, t=[0.0, 1.0])[:, 0, :, :, 0]
    assert close(first, expected[0], 3) and close(last, expected[1], 3)  # 3: a GPU may have drawn them
    assert not close(expected[0], expected[1])
    assert json.loads((folder / "config.json").read_text())["seed"] == 3
    assert {path.name for path in (folder / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_demo_refuses(tmp_path: Path, refused: Any) -> None:
    message = refused("demo", "--kimg", -1, "--out", tmp_path / "demo")
    assert message.startswith("total_kimg: Input should be greater than 0, got -1")
    assert not (tmp_path / "demo").exists()
