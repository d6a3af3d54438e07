"""spigan.shards: LMDB, tar shards and large parquet files give the images of a folder, in its order, in flat memory."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import spigan.data.dataset
from spigan.config import TrainConfig
from spigan.data import DataConfig, ImageDataset, loader, open_dataset
from spigan.data.shards import LMDB, RowGroups, Tar
from spigan.training.trainer import Trainer


def open_source(source: str | Path, **options: Any) -> ImageDataset:
    return open_dataset(DataConfig(source=str(source), **options), progress=False)


def picture(seed: int, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    """An encoded picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


PICTURES = [picture(seed, kind="WEBP") for seed in range(23)]


def write_folder(root: Path, images: list[bytes], suffix: str = "webp") -> Path:
    root.mkdir(parents=True)
    for number, data in enumerate(images):
        (root / f"{number:04}.{suffix}").write_bytes(data)
    return root


def write_lmdb(root: Path, entries: dict[bytes, bytes]) -> Path:
    """As LSUN's script writes them: one folder, keys to encoded images."""
    with lmdb.open(str(root), map_size=1 << 28) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    (root / "lock.mdb").unlink()
    return root


def lsun(root: Path, images: list[bytes]) -> Path:
    """Keys of 40 hexadecimal digits, which here sort as the images do."""
    return write_lmdb(
        root, {b"%04x" % i + hashlib.sha1(data).hexdigest()[4:].encode(): data for i, data in enumerate(images)}
    )


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def webdataset(root: Path, images: list[bytes], shard: int = 9) -> Path:
    """Shards of samples of an image and a caption."""
    for start in range(0, len(images), shard):
        members: dict[str, bytes] = {}
        for number, data in enumerate(images[start : start + shard], start):
            members |= {f"{number:04}.webp": data, f"{number:04}.json": b"{}"}
        write_tar(root / f"train-{start // shard:06}.tar", members)
    return root


def write_parquet(root: Path, images: list[bytes], group: int = 2) -> Path:
    root.mkdir(parents=True)
    for number, part in enumerate((images[:5], images[5:])):
        table = pa.table(
            {"input.png": pa.array([{"bytes": data, "path": None} for data in part]), "label": range(len(part))}
        )
        pq.write_table(table, root / f"train-0000{number}-of-00002.parquet", row_group_size=group)
    return root


KINDS: dict[str, Callable[[Path, list[bytes]], Path]] = {
    "lmdb": lsun,
    "tar": webdataset,
    "row groups": write_parquet,
    "arrow": write_parquet,
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """large(kind): from here on every parquet file is too large for memory, and for "arrow" its row groups too."""

    def apply(kind: str) -> None:
        import datasets

        monkeypatch.setattr(spigan.data.dataset, "CACHE_BYTES", 0)
        monkeypatch.setattr(spigan.data.dataset, "ROW_GROUP_BYTES", 0 if kind == "arrow" else 4 << 20)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    return apply


# The same images in the same order ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_images_order_and_exact_resume(tmp_path: Path, kind: str, large: Callable[[str], None]) -> None:
    expected = open_source(write_folder(tmp_path / "folder", PICTURES), resolution=8)
    assert expected.cached
    path = KINDS[kind](tmp_path / "set", PICTURES)
    large(kind)
    dataset = open_source(path, resolution=8)
    assert not dataset.cached
    source = {"lmdb": LMDB, "tar": Tar, "row groups": RowGroups, "arrow": spigan.data.dataset._Rows}[kind]
    assert isinstance(dataset._source, source)
    assert len(dataset) == len(PICTURES)
    assert torch.equal(torch.stack(list(dataset)), torch.stack(list(expected)))
    assert (dataset.description["native_width"], dataset.description["native_height"]) == ([12, 12], [8, 8])

    whole = loader(expected, batch_size=6, seed=0)
    batches = [next(whole) for _ in range(9)]
    for workers, start in ((2, 0), (0, 5)):  # a resumed run gets the batches it would have got
        resumed = loader(dataset, batch_size=6, seed=0, start=6 * start, num_workers=workers)
        for batch in batches[start:]:
            assert torch.equal(next(resumed), batch)

    copied = pickle.loads(pickle.dumps(dataset))  # workers that are not forked get it so
    assert torch.equal(copied[7], expected[7])


def test_training_on_an_lmdb_resumes_to_the_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "model": {"resolution": 8, "dim_h": 8, "embed_channels": 2, "channel_base": 32, "channel_max": 4},
        "data": {"source": str(lsun(tmp_path / "set", PICTURES)), "cache": "none", "workers": 2},
        "batch": 8,
        "device": "cpu",
    }
    runs = {}
    for name, parts in (("whole", (0.08,)), ("stopped", (0.04, 0.08))):  # 0.04 kimg: in the midst of an epoch
        trainer = Trainer(TrainConfig(**fields, total_kimg=parts[0]), tmp_path / name, progress=False)
        trainer.fit()
        for kimg in parts[1:]:
            trainer = Trainer.resume(tmp_path / name, total_kimg=kimg, progress=False)
            trainer.fit()
        runs[name] = trainer
    assert runs["whole"].images_drawn == runs["stopped"].images_drawn == 160
    for expected, resumed in zip(runs["whole"].model.parameters(), runs["stopped"].model.parameters(), strict=True):
        assert torch.equal(expected, resumed)


@pytest.mark.parametrize("kind", ["lmdb", "tar", "row groups"])
def test_fingerprint_tells_other_images_not_another_place(
    tmp_path: Path, kind: str, large: Callable[[str], None]
) -> None:
    large(kind)
    changed = [*PICTURES[:-1], picture(99, (13, 8), "WEBP")]
    one, two, other = (
        open_source(KINDS[kind](tmp_path / name, images), resolution=8)
        for name, images in (("one", PICTURES), ("two", PICTURES), ("other", changed))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_one_lmdb_may_be_open_twice(tmp_path: Path) -> None:
    path = lsun(tmp_path / "set", PICTURES)
    one, two = (open_source(path, resolution=8, cache="none") for _ in range(2))
    assert torch.equal(one[3], two[3])


def test_wrong_images_are_named(tmp_path: Path, large: Callable[[str], None]) -> None:
    bad = [*PICTURES[:7], PICTURES[7][:20], *PICTURES[8:]]
    with pytest.raises(ValueError, match=r"lmdb!0007[0-9a-f]{36} cannot be read as an image"):
        open_source(lsun(tmp_path / "lmdb", bad), resolution=8)
    with pytest.raises(ValueError, match=r"tar/train-000000\.tar!0007\.webp cannot be read as an image"):
        open_source(webdataset(tmp_path / "tar", bad), resolution=8)
    path = write_parquet(tmp_path / "parquet", bad)
    large("row groups")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet row 2 cannot be read as an image"):
        open_source(path, resolution=8)


# LMDB ---------------------------------------------------------------------------------------------------------------


def test_lmdb_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty has no entries"):
        open_source(write_lmdb(tmp_path / "empty", {}))
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "data.mdb").write_bytes(b"x" * 10_000)
    with pytest.raises(ValueError, match=r"garbage cannot be read as an LMDB \(lmdb\.InvalidError"):
        open_source(garbage)
    short = lsun(tmp_path / "short", [picture(seed, (64, 64)) for seed in range(9)])
    data = (short / "data.mdb").read_bytes()
    (short / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"short cannot be read as an LMDB \(data\.mdb has \d+ bytes of \d+\)"):
        open_source(short)


def test_lmdb_that_claims_more_than_can_be_mapped(tmp_path: Path) -> None:
    data = bytearray((lsun(tmp_path / "lmdb", [picture(0, (8, 8))]) / "data.mdb").read_bytes())
    for meta in (0, 4096):
        data[meta + 136 : meta + 144] = (2**50).to_bytes(8, "little")  # mm_last_pg
    (tmp_path / "lmdb" / "data.mdb").write_bytes(data)
    with pytest.raises(ValueError, match=r"as an LMDB \(its header claims a size that cannot be mapped\)"):
        open_source(tmp_path / "lmdb", resolution=8)


def test_damaged_lmdb_ends_in_an_error_not_in_a_crash(tmp_path: Path) -> None:
    root = lsun(tmp_path / "set", [picture(seed, (64, 64)) for seed in range(60)])
    file = root / "data.mdb"
    good = file.read_bytes()
    leaves = [
        at for at in range(0, len(good), 4096) if good[at + 10] == 2
    ]  # page headers: flags at byte 10, 2 for a leaf
    assert leaves
    for seed in range(12):
        damaged, rng = bytearray(good), np.random.default_rng(seed)
        if seed % 3:  # anything at all after the header of a page
            at = rng.choice(leaves)
            damaged[at + 16 : at + 4096] = rng.bytes(4080)
            message = r"set(!.*)? cannot be read as an (LMDB|image)"
        else:  # the size of a value, 8 bytes before its key, leads beyond the file
            at = good.index(rng.choice([b"%04x" % number for number in range(60)]), leaves[0]) - 8
            damaged[at : at + 4] = int(rng.integers(1 << 28, 1 << 32)).to_bytes(4, "little")
            # The test's own teeth: this does end the process that reads it.
            message = r"set cannot be read as an LMDB \(reading it ends a process with status -\d+\)"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_source(root, resolution=8, cache="none")


def test_missing_lmdb_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lsun(tmp_path / "set", PICTURES)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs the package lmdb: pip install "spigan\[data\]"'):
        open_source(path)


# Tar ----------------------------------------------------------------------------------------------------------------


def test_tar_splits(tmp_path: Path) -> None:
    for name in ("train-000000", "train-000001", "val-000000"):
        write_tar(tmp_path / "splits" / f"{name}.tar", {"a.webp": PICTURES[0]})
        write_tar(tmp_path / "none" / f"cc3m-{name}.tar", {"a.webp": PICTURES[0]})
    assert len(open_source(tmp_path / "splits")) == 2
    assert len(open_source(tmp_path / "splits", split="val")) == 1
    assert len(open_source(tmp_path / "none")) == 3
    assert len(open_source(tmp_path / "none" / "cc3m-val-000000.tar")) == 1
    with pytest.raises(ValueError, match=r"no split 'test': its tar files are of \['train', 'val'\]"):
        open_source(tmp_path / "splits", split="test")
    with pytest.raises(ValueError, match=r"no split 'val': its tar files, such as cc3m-train-000000\.tar, name none"):
        open_source(tmp_path / "none", split="val")


def test_tar_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in {"./x/b.webp": PICTURES[1], ".hidden.webp": b"", "x/._b.webp": b"", "a.txt": b""}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    dataset = open_source(path, resolution=8)
    assert len(dataset) == 1
    assert dataset.name == "a"

    pair = write_tar(tmp_path / "pair.tar", {"1.in.webp": PICTURES[0], "1.out.webp": PICTURES[1]})
    with pytest.raises(
        ValueError, match=r"several images of the sample '1': give as `column` .* such as \"out\.webp\""
    ):
        open_source(pair)
    assert torch.equal(open_source(pair, column="out.webp", resolution=8)[0], dataset[0])
    with pytest.raises(ValueError, match=r"pair\.tar has no images in it: expected members named \*\.jpg"):
        open_source(pair, column="jpg")


def test_tar_that_cannot_be_read(tmp_path: Path) -> None:
    members = {f"{i}.webp": data for i, data in enumerate(PICTURES)}
    good = write_tar(tmp_path / "good.tar", members).read_bytes()
    third = good.index(b"3.webp")
    damaged = bytearray(good)
    damaged[third] ^= 1  # the checksum of the header is wrong now
    backwards = bytearray(good)
    backwards[third + 124 : third + 136] = b"\xff" * 8 + (-2048).to_bytes(4, "big", signed=True)  # a size below 0
    header = backwards[third : third + 512]
    header[148:156] = b" " * 8
    backwards[third + 148 : third + 156] = b"%06o\0 " % sum(header)
    for name, data in {
        "short": good[: third + 700],
        "damaged": bytes(damaged),
        "backwards": bytes(backwards),
        "garbage": b"x" * 2000,
    }.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}\.tar cannot be read as a tar file, not compressed"):
            open_source(tmp_path / f"{name}.tar")
    with pytest.raises(ValueError, match="cannot be read as a tar file, not compressed"):
        open_source(write_tar(tmp_path / "compressed.tar", members, "w:gz"))


# Memory -------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
import spigan.data.dataset
from spigan.data import DataConfig, loader, open_dataset

def anonymous():  # mapped files are no memory of the process: the system drops their pages at will
    status = open("/proc/self/status").read()
    return sum(int(status.split(f"{kind}:")[1].split()[0]) for kind in ("RssAnon", "RssShmem")) << 10

cache, *paths = sys.argv[1:]
import datasets, pyarrow.parquet, PIL.Image, PIL.BmpImagePlugin
datasets.config.HF_DATASETS_CACHE = cache
spigan.data.dataset.CACHE_BYTES = 1 << 20
grown = {}
for path in paths:
    kind, _, path = path.partition("=")
    spigan.data.dataset.ROW_GROUP_BYTES = 0 if kind == "arrow" else 4 << 20
    before = anonymous()
    dataset = open_dataset(DataConfig(source=path), progress=False)
    batches = loader(dataset, batch_size=16, seed=0, num_workers=0)
    next(batches)
    opened = most = anonymous()
    for _ in range(len(dataset) // 16):
        next(batches)
        most = max(most, anonymous())
    grown[kind] = opened - before, most - opened
print(json.dumps(grown))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell kinds of memory apart")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    base = picture(0, (128, 128), "BMP")  # 49 kB that cost nothing to decode
    images = [base[:-8] + seed.to_bytes(8, "big") for seed in range(1600)]
    size = sum(map(len, images))
    assert size > 78e6
    paths = [
        f"{kind}={make(tmp_path / kind.replace(' ', ''), images)}" for kind, make in KINDS.items() if kind != "tar"
    ]
    tars = tmp_path / "tar"
    for start in range(0, 1600, 400):
        write_tar(tars / f"{start}.tar", {f"{i}.bmp": images[i] for i in range(start, start + 400)})
    del images
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "cache"), *paths, f"tar={tars}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout.splitlines()[-1])
    assert set(grown) == set(KINDS)
    for kind, (opening, epoch) in grown.items():
        assert opening < 0.75 * size, (kind, opening, size)  # 20 to 41 MB, whatever the size: libraries
        assert epoch < size / 8, (kind, epoch, size)
