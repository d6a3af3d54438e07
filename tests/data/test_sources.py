"""LMDB, tar and large parquet files give the images of a folder, in its order, in constant memory."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import (
    ENCODED,
    KINDS,
    encoded_picture,
    lsun,
    open_source,
    webdataset,
    write_numbered,
    write_parquet_set,
    write_tar,
)

from spigan.config import TrainConfig
from spigan.data import DataConfig, limits, loader
from spigan.data.sources.find import find_source
from spigan.data.sources.lmdb import LMDBSource
from spigan.data.sources.parquet import RowGroupSource, RowSource
from spigan.data.sources.tar import TarSource
from spigan.training.trainer import Trainer


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """large(kind): from here on every parquet file is too large for memory, and for "arrow" its row groups too."""

    def apply(kind: str) -> None:
        import datasets

        monkeypatch.setattr(limits, "CACHE_BYTES", 0)
        monkeypatch.setattr(limits, "ENCODED_CACHE_BYTES", 0)
        monkeypatch.setattr(limits, "ROW_GROUP_BYTES", 0 if kind == "arrow" else 4 << 20)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    return apply


@pytest.mark.parametrize("kind", KINDS)
def test_images_order_and_exact_resume(tmp_path: Path, kind: str, large: Callable[[str], None]) -> None:
    expected = open_source(write_numbered(tmp_path / "folder", ENCODED), resolution=8)
    assert expected.cached
    path = KINDS[kind](tmp_path / "set", ENCODED)
    large(kind)
    dataset = open_source(path, resolution=8)
    assert not dataset.cached
    source = {"lmdb": LMDBSource, "tar": TarSource, "row groups": RowGroupSource, "arrow": RowSource}[kind]
    assert isinstance(find_source(DataConfig(source=str(path)), False), source)
    assert len(dataset) == len(ENCODED)
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


@pytest.mark.slow
def test_training_on_an_lmdb_resumes_to_the_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "model": {"resolution": 8, "dim_h": 8, "embed_channels": 2, "channel_base": 32, "channel_max": 4},
        "data": {"source": str(lsun(tmp_path / "set", ENCODED)), "cache": "none", "workers": 2},
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
    assert runs["whole"].state.images_drawn == runs["stopped"].state.images_drawn == 160
    for expected, resumed in zip(runs["whole"].model.parameters(), runs["stopped"].model.parameters(), strict=True):
        assert torch.equal(expected, resumed)


@pytest.mark.parametrize("kind", ["lmdb", "tar", "row groups"])
def test_fingerprint_tells_other_images_not_another_place(
    tmp_path: Path, kind: str, large: Callable[[str], None]
) -> None:
    large(kind)
    changed = [*ENCODED[:-1], encoded_picture(99)]  # of the same width and height
    one, two, other = (
        open_source(KINDS[kind](tmp_path / name, images), resolution=8)
        for name, images in (("one", ENCODED), ("two", ENCODED), ("other", changed))
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_one_lmdb_may_be_open_twice(tmp_path: Path) -> None:
    path = lsun(tmp_path / "set", ENCODED)
    one, two = (open_source(path, resolution=8, cache="none") for _ in range(2))
    assert torch.equal(one[3], two[3])


def test_wrong_images_are_named(tmp_path: Path, large: Callable[[str], None]) -> None:
    bad = [*ENCODED[:7], ENCODED[7][:20], *ENCODED[8:]]
    with pytest.raises(ValueError, match=r"lmdb!0007[0-9a-f]{36} cannot be read as an image"):
        open_source(lsun(tmp_path / "lmdb", bad), resolution=8)
    with pytest.raises(ValueError, match=r"tar/train-000000\.tar!0007\.webp cannot be read as an image"):
        open_source(webdataset(tmp_path / "tar", bad), resolution=8)
    path = write_parquet_set(tmp_path / "parquet", bad)
    large("row groups")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet row 2 cannot be read as an image"):
        open_source(path, resolution=8)


MEASURE = """
import json, sys
from spigan.data import DataConfig, limits, loader, open_dataset

def anonymous():  # mapped files are no memory of the process: the system drops their pages at will
    status = open("/proc/self/status").read()
    return sum(int(status.split(f"{kind}:")[1].split()[0]) for kind in ("RssAnon", "RssShmem")) << 10

cache, *paths = sys.argv[1:]
import datasets, pyarrow.parquet, PIL.Image, PIL.BmpImagePlugin
datasets.config.HF_DATASETS_CACHE = cache
limits.CACHE_BYTES = limits.ENCODED_CACHE_BYTES = 1 << 20
grown = {}
for path in paths:
    kind, _, path = path.partition("=")
    limits.ROW_GROUP_BYTES = 0 if kind == "arrow" else 4 << 20
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to tell kinds of memory apart")
def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    base = encoded_picture(0, (128, 128), "BMP")  # 49 kB that cost nothing to decode
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


@pytest.mark.parametrize("kind", ["memory", "row groups"])
def test_names_of_rows_count_within_their_file(tmp_path: Path, kind: str, large: Callable[[str], None]) -> None:
    path = write_parquet_set(tmp_path / "set", ENCODED)  # five rows, then eighteen
    if kind != "memory":
        large(kind)
    source = find_source(DataConfig(source=str(path)), False)
    assert [source.name(index).removeprefix(f"{path}/") for index in (0, 4, 5, 22)] == [
        "train-00000-of-00002.parquet row 0",
        "train-00000-of-00002.parquet row 4",
        "train-00001-of-00002.parquet row 0",
        "train-00001-of-00002.parquet row 17",
    ]


@pytest.mark.parametrize("kind", ["lmdb", "tar"])
def test_images_of_too_many_bytes_are_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = KINDS[kind](tmp_path / "set", [encoded_picture(0, (64, 64), "WEBP")])
    monkeypatch.setattr(limits, "MAX_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"has \d+ bytes; at most 4000 are accepted: make it smaller"):
        open_source(path, resolution=8)
