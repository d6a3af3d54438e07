"""ImageDataset: cache, description, fingerprint, and real images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from data_helpers import FILES, chw, encoded, everything, open_source, picture, shared, write_folder, write_zip
from PIL import Image

from spigan.data import limits


def test_cache_auto_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, FILES)
    monkeypatch.setattr(limits, "CACHE_BYTES", 3 * 3 * 8 * 8)
    assert open_source(tmp_path).cached
    monkeypatch.setattr(limits, "CACHE_BYTES", 3 * 3 * 8 * 8 - 1)
    assert not open_source(tmp_path).cached
    assert open_source(tmp_path, cache="memory").cached


def test_description_is_what_a_run_records(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": encoded(picture(0, (20, 9))), "b.png": encoded(picture(1, (10, 12)))})
    for cache in ("memory", "none"):
        dataset = open_source(tmp_path, resolution=8, cache=cache)
        assert json.loads(json.dumps(dataset.description)) == {
            "source": str(tmp_path),
            "split": "train",
            "count": 2,
            "resolution": 8,
            "channels": 3,
            "resize": "lanczos",
            "crop": "center",
            "native_width": [10, 20],
            "native_height": [9, 12],
        }


def test_fingerprint(tmp_path: Path) -> None:
    here = write_folder(tmp_path / "here", FILES)
    moved = write_folder(tmp_path / "moved", FILES)
    other = write_folder(tmp_path / "other", FILES | {"a.png": encoded(picture(7))})
    longer = write_folder(tmp_path / "longer", FILES | {"a.png": FILES["a.png"] + b"\0"})
    zipped = write_zip(tmp_path / "zipped.zip", FILES)
    cached = open_source(here).fingerprint
    assert len(cached) == 64
    assert int(cached, 16)
    # Cached: the pixels decide.
    assert (
        cached == open_source(moved).fingerprint == open_source(longer).fingerprint == open_source(zipped).fingerprint
    )
    assert cached != open_source(other).fingerprint
    # Not cached: names, sizes and the options do.
    uncached = open_source(here, cache="none").fingerprint
    assert uncached == open_source(moved, cache="none").fingerprint
    assert uncached != open_source(longer, cache="none").fingerprint
    assert uncached != open_source(here, cache="none", resolution=4).fingerprint


@pytest.mark.slow
def test_cifar10() -> None:
    dataset = open_source(shared("cifar10"))
    images = everything(dataset)
    assert images.shape == (50_000, 3, 32, 32)
    values = torch.arange(256).double()
    for channel, (mean, std) in enumerate([(125.307, 62.993), (122.950, 62.089), (113.865, 66.705)]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256) / (50_000 * 32 * 32)
        measured = (share * values).sum().item()
        assert measured == pytest.approx(mean, abs=1e-3)
        assert (share * (values - measured) ** 2).sum().item() ** 0.5 == pytest.approx(std, abs=1e-3)


def test_cifar10_test_split() -> None:
    dataset = open_source(shared("cifar10"), split="test", cache="none")
    assert len(dataset) == 10_000
    assert dataset[9_999].shape == (3, 32, 32)


def test_photographs() -> None:
    folder = shared("celebahq256-sample")
    dataset = open_source(folder)
    assert (len(dataset), dataset.channels, dataset.resolution) == (56, 3, 256)
    first = sorted(os.listdir(folder))[0]
    assert torch.equal(dataset[0], chw(Image.open(folder / first)))
    assert open_source(folder, resolution=64, channels=1)[55].shape == (1, 64, 64)
