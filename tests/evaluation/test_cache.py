"""The cache of a reference's statistics: used, damaged, not writable."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from spigan import SPIGAN, DataConfig
from spigan.cli import app
from spigan.evaluation.cache import load, save
from spigan.evaluation.evaluate import evaluate
from spigan.evaluation.evaluator import Evaluator


def measure(model: SPIGAN, scripts: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "data": DataConfig(source="digits"),
        "features": str(scripts / "pixels.pt"),
        "samples": 100,
        "progress": False,
    }
    return evaluate(model, **options | changes)


def cli(*args: Any) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


def computations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of images that features are computed of, as they are."""
    counts = []
    plain = Evaluator.features

    def counted(self: Evaluator, batches: Any, count: int, reference: bool = False) -> Any:
        if reference:
            counts.append(count)
        return plain(self, batches, count, reference)

    monkeypatch.setattr(Evaluator, "features", counted)
    return counts


def test_cache(model: SPIGAN, scripts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = computations(monkeypatch)
    first = measure(model, scripts)
    files = sorted((cache / "features").iterdir())
    assert [file.name.split("-")[:4] for file in files] == [["digits", "train", "8", "pixels"]] * 2
    assert counts == [1797]
    assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797]
    # Other numbers of neighbours, the same features.
    measure(model, scripts, samples=120)
    assert counts == [1797] and len(list((cache / "features").iterdir())) == 3
    # Another filter, another network and another folder are other statistics.
    measure(model, scripts, data=DataConfig(source="digits", resize="box"))
    measure(model, scripts, features=str(scripts / "classifier.pt"))
    measure(model, scripts, cache_dir=cache / "own")
    assert counts == [1797] * 4


class Means(nn.Module):
    """Means of the channels, times a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * images.float().mean((2, 3))


def test_namesakes_have_other_statistics(
    model: SPIGAN, scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of the same name with other weights, and a folder of the same name with other images."""
    counts = computations(monkeypatch)
    for factor in (1.0, 2.0):
        torch.jit.script(Means(factor)).save(str(tmp_path / f"{factor}.pt"))
        measure(model, scripts, features=f"means={tmp_path / f'{factor}.pt'}")
    assert counts == [1797, 1797]
    rng = np.random.default_rng(0)
    for parent in ("a", "b"):
        folder = tmp_path / parent / "images"
        folder.mkdir(parents=True)
        for i in range(60):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i}.png")
        measure(model, scripts, data=DataConfig(source=str(folder)))
    assert counts == [1797, 1797, 60, 60]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:100], lambda data: data[: len(data) // 2]])
def test_damaged_cache_is_computed_again(
    model: SPIGAN, scripts: Path, cache: Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = computations(monkeypatch)
    first = measure(model, scripts)
    files = sorted((cache / "features").iterdir())
    whole = [file.read_bytes() for file in files]
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged .* and will be computed again"):
        assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797, 1797]
    assert [file.read_bytes() for file in files] == whole
    # One of other contents under this name is not taken either.
    files[1].write_bytes(whole[0])  # the neighbours' instead of the features
    assert measure(model, scripts)["metrics"] == first["metrics"]
    assert counts == [1797, 1797, 1797]


def test_cache_that_cannot_be_written(model: SPIGAN, scripts: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be cached .*set SPIGAN_CACHE"):
        result = measure(model, scripts)
    assert result["metrics"]["FD-pixels"] > 0
    assert any("cannot be cached" in text for text in result["warnings"])
    program = cli("evaluate", "--features", scripts / "pixels.pt", "--samples", 60, "--device", "cpu", "--quiet")
    assert program.exit_code == 0 and "warning: " in program.stderr and "cannot be cached" in program.stderr


@pytest.mark.parametrize("value", [torch.tensor([1.0, float("nan")]), torch.tensor([1, 2])], ids=["NaN", "integers"])
def test_cached_numbers_must_be_finite_floats(tmp_path: Path, value: torch.Tensor) -> None:
    path = tmp_path / "a.safetensors"
    save(path, "key", {"mean": value})
    with pytest.warns(UserWarning, match="must hold finite numbers"):
        assert load(path, "key", {"mean": (2,)}) is None
    save(path, "key", {"mean": torch.ones(2)})
    assert load(path, "another key", {"mean": (2,)}) is None
    assert load(path, "key", {"mean": (2,)}) is not None
