"""LMDB folders that are damaged: an error, never a crash."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import ENCODED, encoded_picture, lsun, open_source, write_lmdb


def test_lmdb_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty has no entries"):
        open_source(write_lmdb(tmp_path / "empty", {}))
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "data.mdb").write_bytes(b"x" * 10_000)
    with pytest.raises(ValueError, match=r"garbage cannot be read as an LMDB \(lmdb\.InvalidError"):
        open_source(garbage)
    short = lsun(tmp_path / "short", [encoded_picture(seed, (64, 64)) for seed in range(9)])
    data = (short / "data.mdb").read_bytes()
    (short / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ValueError, match=r"short cannot be read as an LMDB \(expected \d+ bytes in data\.mdb, got \d+\)"
    ):
        open_source(short)


def test_lmdb_that_claims_more_than_can_be_mapped(tmp_path: Path) -> None:
    data = bytearray((lsun(tmp_path / "lmdb", [encoded_picture(0, (8, 8))]) / "data.mdb").read_bytes())
    for meta in (0, 4096):
        data[meta + 136 : meta + 144] = (2**50).to_bytes(8, "little")  # mm_last_pg
    (tmp_path / "lmdb" / "data.mdb").write_bytes(data)
    with pytest.raises(ValueError, match=r"as an LMDB \(its header claims a size that cannot be mapped\)"):
        open_source(tmp_path / "lmdb", resolution=8)


def test_damaged_lmdb_ends_in_an_error_not_in_a_crash(tmp_path: Path) -> None:
    root = lsun(tmp_path / "set", [encoded_picture(seed, (64, 64)) for seed in range(60)])
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
            message = r"set cannot be read as an LMDB \(a process that reads it ends with status -\d+\)"
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            open_source(root, resolution=8, cache="none")


def test_missing_lmdb_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lsun(tmp_path / "set", ENCODED)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs the package lmdb: pip install "spigan\[data\]"'):
        open_source(path)


def raw(seed: int, side: int = 16) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8).tobytes()


def test_raw_rgb_in_a_folder_of_splits(tmp_path: Path) -> None:
    """CelebA-HQ as the scripts of NVAE and DD-GAN store it: train.lmdb and validation.lmdb, raw values."""
    for split, count in (("train", 5), ("validation", 3)):
        write_lmdb(tmp_path / f"{split}.lmdb", {str(i).encode(): raw(i) for i in range(count)})
    dataset = open_source(tmp_path)
    assert (len(dataset), dataset.channels, dataset.resolution) == (5, 3, 16)
    expected = np.frombuffer(raw(3), dtype=np.uint8).reshape(16, 16, 3).transpose(2, 0, 1)
    assert np.array_equal(dataset[3].numpy(), expected)
    assert len(open_source(tmp_path, split="val")) == len(open_source(tmp_path / "validation.lmdb")) == 3
    with pytest.raises(ValueError, match=r"no split 'test': it has the LMDB folders train\.lmdb, validation\.lmdb"):
        open_source(tmp_path, split="test")


def test_folders_of_lsun_give_splits(tmp_path: Path) -> None:
    for name, count in (("church_outdoor_train_lmdb", 4), ("church_outdoor_val_lmdb", 2)):
        lsun(tmp_path / name, ENCODED[:count])
    assert len(open_source(tmp_path, resolution=8)) == 4
    assert len(open_source(tmp_path, resolution=8, split="validation")) == 2
    lsun(tmp_path / "bedroom_train_lmdb", ENCODED[:1])
    with pytest.raises(ValueError, match=r"LMDB folders bedroom_train_lmdb, church_outdoor_train_lmdb: pass one"):
        open_source(tmp_path, resolution=8)


@pytest.mark.parametrize(
    ("options", "size", "others"),
    [
        ({"resolution": 8}, 16, {32: 4}),
        ({"resolution": 16}, 16, {32: 4}),
        ({"resolution": 20}, 32, {16: 4}),
        ({"resolution": 64}, 32, {16: 4}),
        ({}, 32, {16: 4}),
        ({"column": "16"}, 16, {32: 4}),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_images_in_several_sizes(tmp_path: Path, options: dict[str, Any], size: int, others: dict[int, int]) -> None:
    """Keys such as 32-00017, and the number of images under the key `length`, from StyleGAN2's script for PyTorch."""
    entries = {f"{side}-{i:05}".encode(): encoded_picture(i, (side, side)) for side in (16, 32) for i in range(4)}
    root = write_lmdb(tmp_path / "set", entries | {b"length": b"4"})
    dataset = open_source(root, **options)
    assert dataset.description["native_width"] == [size, size] and len(dataset) == 4
    assert dataset.left_out == {"entry length": 1} | {f"images of size {side}": n for side, n in others.items()}
    with pytest.raises(ValueError, match=r"in the sizes 16, 32: set `column` \(--column\) to one of them, got '64'"):
        open_source(root, column="64")
