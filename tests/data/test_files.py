"""Folders and zip files of images."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import (
    FILES,
    STACKED,
    encoded,
    everything,
    open_source,
    picture,
    write_folder,
    write_parquet,
    write_zip,
)

from spigan.data import limits


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_folder(tmp_path: Path, cache: str) -> None:
    dataset = open_source(write_folder(tmp_path / "photos", FILES), cache=cache)
    assert (dataset.name, len(dataset), dataset.cached) == ("photos", 3, cache == "auto")
    assert torch.equal(everything(dataset), STACKED)
    assert torch.equal(torch.stack(list(dataset)), STACKED)  # iteration ends
    assert torch.equal(dataset[-1], STACKED[-1])
    with pytest.raises(IndexError):
        dataset[3]
    dataset[0].zero_()
    assert torch.equal(dataset[0], STACKED[0])  # what is handed out is a copy


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_zip(tmp_path: Path, cache: str) -> None:
    dataset = open_source(write_zip(tmp_path / "photos.zip", FILES | {"__MACOSX/._a.png": b""}), cache=cache)
    assert dataset.name == "photos"
    assert torch.equal(everything(dataset), STACKED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.zip"]  # nothing is extracted
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1], STACKED[1])


def test_folder_follows_links_but_not_round_in_circles(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"a.png": FILES["a.png"]})
    root = write_folder(tmp_path / "root", {"b.png": FILES["z.bmp"]})
    (root / "linked").symlink_to(elsewhere)
    assert len(open_source(root)) == 2
    (root / "circle").symlink_to(root)
    with pytest.raises(ValueError, match="circle links to a folder"):
        open_source(root)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_of_images(tmp_path: Path, kind: str) -> None:
    files = {"train/a.png": FILES["a.png"], "train/b.png": FILES["z.bmp"], "test/c.png": FILES["deep/er/c.PNG"]}
    path = write_folder(tmp_path / "set", files) if kind == "folder" else write_zip(tmp_path / "set.zip", files)
    assert len(open_source(path)) == 2
    assert len(open_source(path, split="test")) == 1
    with pytest.raises(ValueError, match=r"no split 'val': its folders are \['test', 'train'\]"):
        open_source(path, split="val")


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a.png": FILES["a.png"], "tram/b.png": FILES["a.png"]})
    assert len(open_source(root)) == 2
    with pytest.raises(ValueError, match="no split 'test': it has no split folders"):
        open_source(root, split="test")


def test_refused_image_is_named_in_zip_and_parquet(tmp_path: Path) -> None:
    good, bad = encoded(picture(0)), encoded(picture(0))[:100]
    with pytest.raises(ValueError, match=r"images\.zip!deep/b\.png cannot be read"):
        open_source(write_zip(tmp_path / "images.zip", {"a.png": good, "deep/b.png": bad}))
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [good] * 3)
    second = write_parquet(tmp_path / "train-00001-of-00002.parquet", [good] * 17 + [bad, good])
    for source in (tmp_path, second):
        with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet row 17 cannot be read"):
            open_source(source)
    rows = pa.array([{"bytes": good, "path": None}, None, {"bytes": None, "path": None}])
    for row in (1, 2):
        pq.write_table(pa.table({"img": rows.take([0, row])}), tmp_path / "null.parquet")
        with pytest.raises(ValueError, match=r"null\.parquet row 1 holds no image"):
            open_source(tmp_path / "null.parquet")


def test_fingerprint_of_a_zip_tells_images_of_one_size_apart(tmp_path: Path) -> None:
    first, other = (
        open_source(write_zip(tmp_path / f"{seed}.zip", {"a.bmp": encoded(picture(seed), "BMP")}), cache="none")
        for seed in (0, 1)
    )
    assert first.fingerprint != other.fingerprint


def test_decompression_bomb_in_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", encoded(picture(0)) + bytes(100_000))
    monkeypatch.setattr(limits, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"images\.zip!a\.png unpacks to \d+ bytes"):
        open_source(path)


def test_corrupt_member_of_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", {"a.png": encoded(picture(0))})
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.zip!a\.png cannot be read as an image \(BadZipFile"):
        open_source(path)


def test_unreadable_folder_is_not_left_out(tmp_path: Path) -> None:
    locked = write_folder(tmp_path, {"a.png": FILES["a.png"], "locked/b.png": FILES["a.png"]}) / "locked"
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read every folder")
        with pytest.raises(PermissionError, match="locked"):
            open_source(tmp_path)
    finally:
        locked.chmod(0o700)


def test_other_formats_are_refused_in_a_zip_too(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", {"a.png": encoded(picture(0), "PPM")})
    with pytest.raises(ValueError, match=r"images\.zip!a\.png cannot be read as an image \(it is PPM; expected"):
        open_source(path)
