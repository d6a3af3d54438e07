"""What a run records about its images, and whether images are still those of the record."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import encoded, open_source, picture, write_folder

from spigan.data import DataConfig
from spigan.data.dataset import check_record, data_record, open_for_model

Image = dict[str, bytes]


def bmps(first: int, count: int = 4) -> Image:
    """Pictures of one file size."""
    return {f"{i:03}.bmp": encoded(picture(first + i), "BMP") for i in range(count)}


def record_of(root: Path, **options: Any) -> dict[str, Any]:
    config = DataConfig(source=str(root), **options)
    return data_record(open_source(root, **options), config)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_other_images_of_the_same_names_and_sizes(tmp_path: Path, cache: str) -> None:
    record = record_of(write_folder(tmp_path, bmps(0)), cache=cache)
    check_record(open_source(tmp_path, cache=cache), record)
    write_folder(tmp_path, bmps(100))
    with pytest.raises(ValueError, match=r"are not those that the run was trained on \(4 of 4 compared images differ"):
        check_record(open_source(tmp_path, cache=cache), record)
    write_folder(tmp_path, bmps(0, 5))
    with pytest.raises(ValueError, match=r"there are 5, and there were 4"):
        check_record(open_source(tmp_path, cache=cache), record)


def test_record_of_an_earlier_version(tmp_path: Path) -> None:
    """It has a fingerprint only."""
    dataset = open_source(write_folder(tmp_path, bmps(0)), cache="none")
    record = {**dataset.description, "fingerprint": dataset.fingerprint}
    assert len(open_for_model(DataConfig(source=str(tmp_path), cache="none"), 8, 3, progress=False, record=record)) == 4
    with pytest.raises(ValueError, match=r"or the other way round \(data\.cache\)"):
        check_record(open_source(tmp_path, cache="memory"), record)


def test_data_cache_may_change(tmp_path: Path) -> None:
    record = record_of(write_folder(tmp_path, bmps(0)), cache="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_record(open_source(tmp_path, cache="memory"), record)


@pytest.mark.parametrize("name", ["007.png", "008.png"])  # 7 is one of those that are compared, 8 is not
def test_a_repaired_image_does_not_end_a_run(tmp_path: Path, name: str) -> None:
    files = {f"{i:03}.png": encoded(picture(i)) for i in range(300)}
    files[name] = encoded(picture(7, (64, 64)), "JPEG")[:-300]
    record = record_of(write_folder(tmp_path, files), cache="none", resolution=8)
    (tmp_path / name).write_bytes(encoded(picture(7, (64, 64)), "JPEG"))
    with pytest.warns(UserWarning, match="files of .* have changed since the run began"):
        check_record(open_source(tmp_path, cache="none", resolution=8), record)


def test_damaged_images_are_found_at_the_start(tmp_path: Path) -> None:
    files = bmps(0) | {"002.bmp": encoded(picture(2, (64, 64)), "JPEG")[:-300]}
    root = write_folder(tmp_path, files)
    assert len(open_source(root, cache="none", resolution=8)) == 4  # its header is fine
    for cache in ("none", "memory"):
        with pytest.raises(ValueError, match=r"002\.bmp cannot be read as an image \(OSError: image file is truncated"):
            open_source(root, cache=cache, resolution=8, check=True)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_skip_is_recorded(tmp_path: Path, cache: str) -> None:
    root = write_folder(tmp_path, bmps(0) | {"002.bmp": encoded(picture(2, (64, 64)), "JPEG")[:-300]})
    config = DataConfig(source=str(root), cache=cache, skip=True)
    with pytest.warns(UserWarning, match=r"data\.skip leaves out 1 images: .*002\.bmp"):
        dataset = open_for_model(config, 8, 3, progress=False)
    assert len(dataset) == 3 and dataset.skipped == [2]
    record = data_record(dataset, config)
    (root / "002.bmp").write_bytes(encoded(picture(2), "BMP"))  # repaired: the run still leaves it out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resumed = open_for_model(config, 8, 3, progress=False, record=record)
        assert len(open_for_model(config, 8, 3, progress=False)) == 4
    assert all(torch.equal(a, b) for a, b in zip(dataset, resumed, strict=True))
    write_folder(root, dict.fromkeys(["000.bmp", "001.bmp"], b""))
    with pytest.raises(ValueError, match=r"data\.skip would leave out 2 of 4 images; the first error: .*000\.bmp"):
        open_source(root, cache=cache, skip=True)


@pytest.mark.parametrize("change", [{"reading": 99}, {"skipped": "all"}, {"skipped": [-1]}])
def test_damaged_record(tmp_path: Path, change: dict[str, Any]) -> None:
    record = record_of(write_folder(tmp_path, bmps(0))) | change
    with pytest.raises(ValueError, match=r"the run's data\.json"):
        open_for_model(DataConfig(source=str(tmp_path)), 8, 3, progress=False, record=record)


def test_the_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "photos", bmps(0))
    monkeypatch.chdir(tmp_path)
    dataset = open_source("photos")
    record = data_record(dataset, DataConfig(source="photos"))
    assert (record["source"], record["path"]) == ("photos", str(tmp_path.resolve() / "photos"))
    assert "path" not in data_record(open_source("digits"), DataConfig(source="digits"))


def test_enlarged_images_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"are enlarged to 16 x 16: the smallest side has 8 pixels"):
        open_source(write_folder(tmp_path, bmps(0)), resolution=16)
