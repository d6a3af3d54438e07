"""Conversion: the same pixels however it is run, kills survived, broken images named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from spigan.cli import app
from spigan.data import DataConfig, ImageDataset, limits, open_dataset, register_source, workers
from spigan.data import convert as convert_module
from spigan.data.convert import convert
from spigan.data.sources import find
from spigan.data.sources.array import open_digits
from spigan.data.sources.find import find_source
from spigan.data.sources.parquet import RowGroupSource


def encoded(seed: int, size: tuple[int, int] = (20, 14), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture of random pixels."""
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(parents=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def config_of(source: str | Path, **options: Any) -> DataConfig:
    return DataConfig(**{"source": str(source), "resolution": 8, "channels": 3, **options})


def opened(source: str | Path, **options: Any) -> ImageDataset:
    return open_dataset(DataConfig(source=str(source), **options), progress=False)


def everything(dataset: ImageDataset) -> torch.Tensor:
    return torch.stack(list(dataset))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def cli(*args: Any) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 images of several sizes, one of them grey, one with transparency."""
    files = {f"{i:02}.png": encoded(i, (14 + i % 5, 9 + i % 7)) for i in range(47)}
    files |= {"03.png": encoded(3, mode="L"), "11.png": encoded(11, mode="RGBA")}
    return write_folder(tmp_path_factory.mktemp("convert") / "pictures", files)


# Convert ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_source(tmp_path: Path, pictures: Path, channels: int) -> None:
    config = config_of(pictures, channels=channels, resize="bilinear")
    result = convert(config, tmp_path / "out", shard_size=20, workers=0, progress=False)
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    assert sorted(contents(tmp_path / "out")) == [*names, "train-index.json"]
    assert [file["images"] for file in result["files"]] == [20, 20, 7]
    assert (result["complete"], result["images"], result["broken"], result["converted"]) == (True, 47, [], 47)
    dataset = opened(tmp_path / "out")  # neither resolution nor channels are needed any more
    assert torch.equal(everything(dataset), everything(open_dataset(config, progress=False)))
    index = json.loads((tmp_path / "out" / "train-index.json").read_text())
    assert {key: value for key, value in result.items() if key not in ("converted", "seconds")} == index
    assert (index["resize"], index["crop"], index["resolution"]) == ("bilinear", "center", 8)


def test_files_do_not_depend_on_workers(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 3)
    for count in (0, 1, 2):
        convert(config_of(pictures), tmp_path / str(count), shard_size=10, workers=count, progress=False)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_row_groups_are_small_enough_to_be_read_in_place(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "GROUP_BYTES", 2000)
    convert(config_of(pictures, resolution=16), tmp_path / "out", shard_size=40, workers=0, progress=False)
    for file in (tmp_path / "out").glob("*.parquet"):
        sizes = [list(map(len, group)) for group in groups(file)]
        assert len(sizes) > 1
        for group in sizes[:-1]:
            assert sum(group[:-1]) < 2000 <= sum(group)
    expected = everything(opened(tmp_path / "out"))
    monkeypatch.setattr(limits, "ENCODED_CACHE_BYTES", 0)
    dataset = opened(tmp_path / "out")
    assert isinstance(find_source(DataConfig(source=str(tmp_path / "out")), False), RowGroupSource)
    assert torch.equal(everything(dataset), expected)


def groups(file: Path) -> list[list[bytes]]:
    """The images of each row group."""
    with pq.ParquetFile(file) as table:
        read = [table.read_row_group(number).column("image").to_pylist() for number in range(table.num_row_groups)]
    return [[row["bytes"] for row in rows] for rows in read]


@pytest.mark.parametrize(("kind", "quality"), [("png", None), ("webp", 30), ("webp", 95), ("jpeg", 30), ("jpeg", None)])
def test_formats(tmp_path: Path, pictures: Path, kind: Any, quality: int | None) -> None:
    convert(config_of(pictures), tmp_path, image_format=kind, quality=quality, workers=0, progress=False)
    data = groups(tmp_path / "train-00000-of-00001.parquet")[0][0]
    assert Image.open(io.BytesIO(data)).format == kind.upper()
    expected = everything(open_dataset(config_of(pictures), progress=False)).float()
    error = (everything(opened(tmp_path)).float() - expected).abs().mean().item()
    low, high = {"png": (0, 0), "webp": (1, 60), "jpeg": (1, 60)}[kind]
    assert low <= error <= high
    if kind == "jpeg":
        assert (error < 5) == (quality is None)  # 95


def test_a_part_of_a_split_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's names of parts have brackets."""
    monkeypatch.setattr(find, "NAMES", dict(find.NAMES))  # forget the source after the test
    register_source("owner/digits", lambda config, progress: open_digits("train"))
    config = config_of("owner/digits", split="train[:50%]", channels=1)
    convert(config, tmp_path, shard_size=900, workers=0, progress=False)
    assert convert(config, tmp_path, shard_size=900, workers=0, progress=False)["converted"] == 0
    assert len(opened(tmp_path, split="train[:50%]")) == 1797


def test_splits_share_a_folder(tmp_path: Path, pictures: Path) -> None:
    source = write_folder(tmp_path / "source", {})
    for split, names in (("train", ("a.png", "b.png")), ("val", ("c.png",))):
        write_folder(source / split, {name: encoded(ord(name[0])) for name in names})
    for split, count in (("train", 2), ("val", 1)):
        convert(config_of(source, split=split), tmp_path / "out", workers=0, progress=False)
        assert len(opened(tmp_path / "out", split=split)) == count
    assert sorted(contents(tmp_path / "out")) == [
        *("train-00000-of-00001.parquet", "train-index.json"),
        *("val-00000-of-00001.parquet", "val-index.json"),
    ]
    # Another program takes the folder for what it is, and its columns for images.
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 2, "validation": 1}
    assert loaded["train"][0]["image"].size == (8, 8)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find the workers")
def test_killed_conversion_continues(tmp_path: Path) -> None:
    options = ["data", "convert", "digits", "--resolution", "64", "--channels", "1", "--shard-size", "64", "--quiet"]
    command = [sys.executable, "-m", "spigan.cli", *options, "--workers", "2", "--out"]
    out = tmp_path / "out"
    with subprocess.Popen([*command, str(out)], start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while len(list(out.glob("train-*.parquet"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("train-*.parquet")}
    assert 3 <= len(kept) < 29
    assert not (out / "train-index.json").exists()
    for name in ("train-00003-of-00029.parquet", "train-index.json"):  # where the kill left none
        (out / f".{name}-abcdefgh").mkdir()
        (out / f".{name}-abcdefgh" / name).write_bytes(b"half a file")
    deadline = time.monotonic() + 30
    while members(process.pid):  # its workers notice, and do not stay
        assert time.monotonic() < deadline
        time.sleep(0.1)

    result = convert(config_of("digits", resolution=64, channels=1), out, shard_size=64, workers=0, progress=False)
    assert result["complete"] and result["converted"] == 1797 - 64 * len(kept)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    convert(
        config_of("digits", resolution=64, channels=1), tmp_path / "whole", shard_size=64, workers=0, progress=False
    )
    assert contents(out) == contents(tmp_path / "whole")  # nothing else is left either


def members(session: int) -> list[int]:
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def test_broken_images(tmp_path: Path, pictures: Path) -> None:
    files = {path.name: path.read_bytes() for path in pictures.iterdir()}
    files |= {"05.png": b"no image", "06.png": files["06.png"][:60], "31.png": b""}
    source, out = write_folder(tmp_path / "source", files), tmp_path / "out"
    arguments = ("convert", source, "--out", out, "--resolution", 8, "--shard-size", 10, "--workers", 1, "--quiet")
    result = cli(*arguments)
    assert result.exit_code == 1
    for name in ("05.png", "06.png", "31.png"):
        assert result.stderr.count(f"broken: {source}/{name} cannot be read as an image") == 1
    assert "27 images of 8 x 8 in 3 files" in result.stdout and "3 broken" in result.stdout
    assert "repair the images, or add --skip-broken" in result.stderr
    kept = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(kept) == [f"train-0000{number}-of-00005.parquet" for number in (1, 2, 4)]

    result = cli(*arguments, "--skip-broken")
    assert result.exit_code == 0, result.output
    assert "44 images of 8 x 8 in 5 files" in result.stdout and "20 read now" in result.stdout
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in out.iterdir()}.items()
    index = json.loads((out / "train-index.json").read_text())
    assert [row["index"] for row in index["broken"]] == [5, 6, 31]
    assert index["broken"][0]["error"].startswith(f"{source}/05.png cannot be read")
    whole = everything(open_dataset(config_of(pictures), progress=False))
    assert torch.equal(everything(opened(out)), whole[[i for i in range(47) if i not in (5, 6, 31)]])
    again = cli(*arguments)  # all that is known of the broken ones is in the files
    assert again.exit_code == 0 and "0 read now" in again.stdout and "3 broken" in again.stdout


@pytest.mark.parametrize(
    "change", [{"resolution": 9}, {"channels": 1}, {"resize": "box"}, {"shard_size": 9}, {"image_format": "webp"}, {}]
)
def test_files_of_another_conversion_are_refused(tmp_path: Path, pictures: Path, change: dict[str, Any]) -> None:
    convert(config_of(pictures), tmp_path / "out", workers=0, progress=False)
    before = contents(tmp_path / "out")
    options = {key: change.pop(key) for key in ("shard_size", "image_format") if key in change}
    source = pictures
    if not change and not options:  # other images
        source = write_folder(tmp_path / "other", {"a.png": encoded(0)})
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet belongs to another conversion"):
        convert(config_of(source, **change), tmp_path / "out", workers=0, progress=False, **options)
    assert contents(tmp_path / "out") == before


def test_convert_refuses(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for message, options in {
        "shard_size must be 1 or more, got 0": {"shard_size": 0},
        "quality must be 1 to 100, and only for webp and jpeg; got 90 for png": {"quality": 90},
        "quality must be 1 to 100, .* got 0 for webp": {"quality": 0, "image_format": "webp"},
    }.items():
        with pytest.raises(ValueError, match=message):
            convert(config_of(pictures), tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the resolution and channels"):
        convert(DataConfig(source=str(pictures)), tmp_path / "out")
    monkeypatch.setenv("HOME", str(pictures.parent))
    for source in (pictures, f"~/{pictures.name}"):
        with pytest.raises(ValueError, match="is inside the source"):
            convert(config_of(source), pictures / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: choose a folder"):
        convert(config_of(pictures), tmp_path / "file")
    for arguments, message in (
        (("--format", "gif"), "--format must be png, webp or jpeg, got gif"),
        (("--channels", 2), "channels"),
        (("--resize", "area"), "resize"),
    ):
        result = cli("convert", pictures, "--out", tmp_path / "out", "--resolution", 8, *arguments)
        assert result.exit_code == 1 and message in result.stderr
    assert "does not exist" in cli("convert", "./none", "--out", tmp_path / "out", "--resolution", 8).stderr
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_half_file(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(config_of(pictures), tmp_path / "out", shard_size=20, workers=0, progress=False)
    whole = contents(tmp_path / "out")
    for name in ("train-00001-of-00003.parquet", "train-index.json"):
        (tmp_path / "out" / name).unlink()
    written: list[int] = []

    def full(self: Any, table: Any, *args: Any, **kwargs: Any) -> None:
        written.append(len(table))
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetWriter, "write_table", full)
        message = r"train-00001-of-00003\.parquet could not be written: .*No space left.* 2 of 3 files are finished"
        with pytest.raises(OSError, match=message):
            convert(config_of(pictures), tmp_path / "out", shard_size=20, workers=0, progress=False)
    assert written == [20]
    assert sorted(contents(tmp_path / "out")) == ["train-00000-of-00003.parquet", "train-00002-of-00003.parquet"]
    convert(config_of(pictures), tmp_path / "out", shard_size=20, workers=0, progress=False)
    assert contents(tmp_path / "out") == whole
