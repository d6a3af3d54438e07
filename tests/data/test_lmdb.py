"""LMDB folders that are damaged: an error, never a crash."""

from __future__ import annotations

import sys
from pathlib import Path

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
