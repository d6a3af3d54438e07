"""Parquet files: splits, columns, and rows without an image."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import FILES, STACKED, chw, encoded, everything, open_source, picture, write_parquet

from spigan.data import limits


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_folder(tmp_path: Path, below: str) -> None:
    images = [picture(seed) for seed in range(7)]
    data = [encoded(image) for image in images]
    for part, rows in enumerate((data[:3], data[3:4], data[4:6])):
        write_parquet(tmp_path / below / f"train-0000{part}-of-00003.parquet", rows)
    write_parquet(tmp_path / below / "test-00000-of-00001.parquet", data[6:])
    assert torch.equal(everything(open_source(tmp_path)), torch.stack([chw(image) for image in images[:6]]))
    assert torch.equal(everything(open_source(tmp_path, cache="none")), everything(open_source(tmp_path)))
    assert torch.equal(open_source(tmp_path, split="test")[0], chw(images[6]))
    with pytest.raises(ValueError, match=r"no split 'validation'.*\['test', 'train'\]"):
        open_source(tmp_path, split="validation")
    (tmp_path / below / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="expected 3 parquet files of 'train', got train-00000"):
        open_source(tmp_path)


def test_parquet_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "test-00000-of-00001.parquet", [FILES["a.png"]])
    assert torch.equal(open_source(file)[0], STACKED[0])
    assert torch.equal(open_source(file, split="test")[0], STACKED[0])
    with pytest.raises(ValueError, match="holds the split 'test', not 'val'"):
        open_source(file, split="val")


def test_parquet_columns(tmp_path: Path) -> None:
    image = pa.array([{"bytes": FILES["a.png"], "path": "a.png"}])
    file = tmp_path / "two.parquet"
    pq.write_table(pa.table({"photo": image, "mask": image, "raw": [FILES["z.bmp"]], "label": [1]}), file)
    with pytest.raises(ValueError, match=r"two\.parquet has 2 columns of images.*photo \(.*mask \(.*label \(int64\)"):
        open_source(file)
    with pytest.raises(ValueError, match=r"two\.parquet has no column of images called 'label'"):
        open_source(file, column="label")
    assert torch.equal(open_source(file, column="mask")[0], STACKED[0])
    assert torch.equal(open_source(file, column="raw")[0], STACKED[2])


@pytest.mark.parametrize("limit", [2 << 30, 0])
def test_files_with_different_columns_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(limits, "ENCODED_CACHE_BYTES", limit)
    for part, column in enumerate(("img", "photo")):
        write_parquet(tmp_path / f"train-0000{part}-of-00002.parquet", [FILES["a.png"]], column)
    with pytest.raises(ValueError, match=r"train-00000.*train-00001.* different columns, \['img', 'photo'\]"):
        open_source(tmp_path)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "train.parquet", [FILES["a.png"]])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        open_source(file)


@pytest.mark.parametrize("configuration", ["", "default/"])
def test_folders_of_splits(tmp_path: Path, configuration: str) -> None:
    """As the Hub lays out the files that it converts itself: default/train/0000.parquet."""
    images = [encoded(picture(seed)) for seed in range(5)]
    for name, part in {"train/0000": images[:2], "train/0001": images[2:4], "test/0000": images[4:]}.items():
        write_parquet(tmp_path / f"{configuration}{name}.parquet", part)
    assert len(open_source(tmp_path)) == 4
    assert torch.equal(open_source(tmp_path, split="test")[0], chw(picture(4)))
    with pytest.raises(ValueError, match=r"no split 'val': the splits of its parquet files are \['test', 'train'\]"):
        open_source(tmp_path, split="val")
    if configuration:
        write_parquet(tmp_path / "other" / "train" / "0000.parquet", images)
        with pytest.raises(ValueError, match="has several configurations, default, other: pass the folder of one"):
            open_source(tmp_path)


def test_a_single_column_of_plain_bytes(tmp_path: Path) -> None:
    pq.write_table(pa.table({"jpg": [encoded(picture(3))], "label": [1]}), tmp_path / "a.parquet")
    assert torch.equal(open_source(tmp_path / "a.parquet")[0], chw(picture(3)))
