"""`spigan export`: the file, and how to run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import spigan


@pytest.mark.slow
def test_export_to_onnx(model: Path, tmp_path: Path, spigan_cli: Any) -> None:
    out = tmp_path / "a.onnx"
    result = spigan_cli("export", "--model", model, "--out", out)
    assert result.exit_code == 0 and result.stderr == ""
    first, second = result.stdout.splitlines()
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    assert first == f"{out}: {size}, z [N, 3, 8, 8] to images [N, 3, 8, 8] in [0, 1], t = 1"
    assert second == f'Run it: onnxruntime.InferenceSession("{out}").run(None, {{"z": z}})[0], z a NumPy array'
    z = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    images = onnxruntime.InferenceSession(out).run(None, {"z": z})[0]
    expected = spigan.sample(z=torch.from_numpy(z), model=model, device="cpu")
    assert isinstance(expected, torch.Tensor)
    assert np.abs(images - expected.numpy()).max() < 1e-5  # tests/test_export.py says why


@pytest.mark.slow
def test_export_to_pt2(trained: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "new" / "a.onnx"  # --format wins
    printed = run("export", "--model", trained, "--out", out, "--format", "pt2", "--t", 0.5, "--batch", 2)
    assert "z [2, 1, 16, 16] to images [2, 1, 16, 16] in [0, 1], t = 0.5" in printed
    assert printed.endswith(f'Run it: torch.export.load("{out}").module()(z)\n')
    z = torch.randn(2, 1, 16, 16)
    expected = spigan.sample(z=z, model=trained, t=0.5, device="cpu")
    torch.testing.assert_close(torch.export.load(out).module()(z), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.onnx", "--format", "tflite"], "--format must be onnx or pt2, got tflite"),
        (["--out", "a.bin"], "a.bin: cannot tell the format from the suffix; use .onnx or .pt2, or give the format"),
        (["--out", ".", "--format", "onnx"], ". is a folder; an exported model needs a file name"),
        (["--out", "a.pt2", "--t", "2"], "t must be a time in [0, 1]"),
        (["--out", "a.pt2", "--model", "missing"], "model 'missing' is neither an existing folder nor a hub id"),
    ],
)
def test_export_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str, refused: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("export", *arguments).startswith(message)
    assert not [*tmp_path.iterdir()]


def test_export_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'pip install "spigan[export]"' in refused("export", "--out", tmp_path / "a.onnx")
