"""Splits by the names of folders, what is left out, and the rules by which earlier runs chose their images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from data_helpers import encoded, open_source, picture, write_folder, write_zip

from spigan.data import DataConfig, open_dataset

PNG = encoded(picture(0))


def numbered(folder: str, count: int) -> dict[str, bytes]:
    return {f"{folder}{i}.png": PNG for i in range(count)}


def left_out(source: Path, **options: Any) -> tuple[int, dict[str, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = open_source(source, **options)
    return len(dataset), dataset.left_out


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/", "test/"),
        ("Train/", "Test/"),
        ("TRAIN/", "val/"),
        ("training/", "testing/"),
        ("mydata/Training/", "mydata/valid/"),
        ("a/b/train/cats/", "a/b/dev/cats/"),
        ("train2017/", "val2017/"),
        ("DIV2K_train_HR/", "DIV2K_valid_HR/"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_are_found(tmp_path: Path, train: str, test: str, kind: str) -> None:
    files = numbered(train, 4) | numbered(test, 2)
    path = write_folder(tmp_path / "x", files) if kind == "folder" else write_zip(tmp_path / "x.zip", files)
    assert left_out(path) == (4, {})
    split = "val" if "test" not in test.lower() else "test"
    assert left_out(path, split=split) == (2, {})


def test_stray_files_are_left_out_and_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "set", numbered("train/", 20) | numbered("test/", 10) | {"preview.png": PNG})
    assert left_out(root) == (20, {"image beside the splits (preview.png)": 1})
    with pytest.warns(
        UserWarning, match=r"set has files that are left out: 1 image beside the splits \(preview\.png\)"
    ):
        open_source(root)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            numbered("train/", 5) | numbered("test/", 3) | numbered("more/", 4),
            r"test and train, .*4 images beside them",
        ),
        (numbered("train/", 5) | numbered("", 6), r"the folders train, which may be splits, and 6 images beside them"),
        (numbered("train/", 5) | numbered("Train/", 6), r"Train and train, which may both be the split 'train'"),
        (
            numbered("data/train/", 9) | numbered("data/test/", 5) | numbered("", 1),
            r"test and train in data, .*pass \S+/x",
        ),
        (
            numbered("cats/train/", 9) | numbered("cats/test/", 5) | numbered("dogs/train/", 2),
            r"test and train in cats",
        ),
        (
            numbered("train_a/", 5) | numbered("train_b/", 3) | numbered("test_a/", 3),
            r"train_a and train_b, which may both",
        ),
        (numbered("test/", 5), r"no split 'train': its folders are \['test'\]"),
    ],
)
def test_doubt_is_an_error_that_names_both_readings(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(write_zip(tmp_path / "x.zip", files))


def test_runs_of_an_earlier_version_read_the_same_images(tmp_path: Path) -> None:
    """Reading 1: every image of a folder with anything beside its splits, and fewer suffixes."""
    root = write_folder(
        tmp_path, numbered("train/", 5) | numbered("test/", 3) | {"preview.png": PNG, "train/a.jfif": PNG}
    )
    config = DataConfig(source=str(root))
    assert len(open_dataset(config, progress=False, reading=1)) == 9
    tars = write_folder(tmp_path / "train", {"old.tar": b""})
    assert len(open_dataset(config, progress=False, reading=1)) == 9
    assert (tars / "old.tar").exists()


def test_jpeg_by_any_suffix_and_the_rest_is_counted(tmp_path: Path) -> None:
    jpeg = encoded(picture(0), "JPEG")
    names = ["a.jpg", "b.JPEG", "c.jpe", "d.jfif", "e.pjpeg", "f.heic", "g.heic", "noext", "notes.txt", ".hidden"]
    root = write_folder(tmp_path / "set", dict.fromkeys(names, jpeg))
    assert left_out(root) == (5, {".heic": 2, "without a suffix": 1, ".txt": 1})
    with pytest.raises(ValueError, match=r"has no images in it: expected .*; there are 1 \.heic"):
        open_source(write_folder(tmp_path / "none", {"a.heic": jpeg}))


def test_only_circles_of_links_are_refused(tmp_path: Path) -> None:
    pool = write_folder(tmp_path / "pool", numbered("", 3))
    root = write_folder(tmp_path / "root", {"own.png": PNG})
    for name in ("a", "b"):
        (root / name).symlink_to(pool)
    (root / "c").symlink_to("/not/mounted")
    assert left_out(root) == (7, {"link that leads nowhere (c)": 1})
    (root / "x.png").symlink_to("/not/mounted/x.png")
    with pytest.raises(ValueError, match=r"x\.png is a link to /not/mounted/x\.png, which is not there"):
        open_source(root)
    (root / "x.png").unlink()
    (pool / "up").symlink_to(root)
    with pytest.raises(ValueError, match=r"in a circle: remove the link"):
        open_source(root)


def test_links_to_links_end(tmp_path: Path) -> None:
    """Each folder has two links to the next one: 2^12 ways to the last."""
    for level in range(12):
        folder = write_folder(tmp_path / f"{level}", numbered("", 1))
        for name in ("left", "right"):
            (folder / name).symlink_to(tmp_path / f"{level + 1}")
    write_folder(tmp_path / "12", numbered("", 1))
    with pytest.raises(ValueError, match="links to a folder that is already in"):
        open_source(tmp_path / "0")


def test_names_that_are_not_utf8_and_control_characters(tmp_path: Path) -> None:
    """They are read like others, and escaped wherever they are shown."""
    try:
        (tmp_path / os.fsdecode(b"\xff\x1b]0;x.png")).write_bytes(PNG)
    except OSError:
        pytest.skip("this file system only has names in UTF-8")
    (tmp_path / "b.png").write_bytes(PNG)
    dataset = open_source(tmp_path, cache="none")
    assert len(dataset.fingerprint) == 64
    (tmp_path / os.fsdecode(b"\xff\x1b]0;x.png")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"/\\udcff\\x1b\]0;x\.png cannot be read as an image \(it is empty"):
        open_source(tmp_path)


def test_pictures_beside_tables_and_archives(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = write_folder(tmp_path / "set", numbered("", 3) | {"old.tar": b""})
    with pytest.raises(
        ValueError, match=r"tar files, such as old\.tar, and 3 pictures, such as 0\.png: pass .*old\.tar"
    ):
        open_source(root)
    (root / "old.tar").unlink()
    pq.write_table(pa.table({"file_name": ["0.png"], "text": ["a picture"]}), root / "metadata.parquet")
    assert left_out(root) == (3, {".parquet": 1})
    pq.write_table(pa.table({"image": [{"bytes": PNG, "path": None}]}), root / "train.parquet")
    (root / "metadata.parquet").unlink()
    with pytest.raises(ValueError, match=r"parquet files, such as train\.parquet, and 3 pictures"):
        open_source(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.7z", r"unpack it with `7z x a\.7z`"),
        ("a.rar", r"unpack it with `unrar x a\.rar`"),
        ("photos.tar.gz", r"unpack it with `gunzip -k photos\.tar\.gz`"),
        ("photos.tar.xz", r"unpack it with `unxz -k photos\.tar\.xz`"),
    ],
)
def test_archives_without_access_to_single_images(tmp_path: Path, name: str, message: str) -> None:
    import tarfile

    if name.endswith((".gz", ".xz")):
        with tarfile.open(tmp_path / name, f"w:{name[-2:]}") as archive:
            archive.add(write_folder(tmp_path / "x", {"0.png": PNG}) / "0.png", "0.png")
    else:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / name)


def test_backslashes_of_windows(tmp_path: Path) -> None:
    files = numbered("train\\", 4) | numbered("test\\", 2)
    assert left_out(write_zip(tmp_path / "x.zip", files)) == (4, {})


def test_suffixes_of_archives_in_any_case(tmp_path: Path) -> None:
    assert left_out(write_zip(tmp_path / "PHOTOS.ZIP", numbered("", 2))) == (2, {})
