"""Tar files: splits, members, and damage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from data_helpers import ENCODED, open_source, write_tar


def test_tar_splits(tmp_path: Path) -> None:
    for name in ("train-000000", "train-000001", "val-000000"):
        write_tar(tmp_path / "splits" / f"{name}.tar", {"a.webp": ENCODED[0]})
        write_tar(tmp_path / "none" / f"cc3m-{name}.tar", {"a.webp": ENCODED[0]})
    assert len(open_source(tmp_path / "splits")) == 2
    assert len(open_source(tmp_path / "splits", split="val")) == 1
    assert len(open_source(tmp_path / "none")) == 3
    assert len(open_source(tmp_path / "none" / "cc3m-val-000000.tar")) == 1
    with pytest.raises(ValueError, match=r"no split 'test': the splits of its tar files are \['train', 'val'\]"):
        open_source(tmp_path / "splits", split="test")
    with pytest.raises(
        ValueError,
        match=r"no split 'val': the names of its tar files, such as cc3m-train-000000\.tar, do not give a split",
    ):
        open_source(tmp_path / "none", split="val")


def test_tar_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in {"./x/b.webp": ENCODED[1], ".hidden.webp": b"", "x/._b.webp": b"", "a.txt": b""}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.webp")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    dataset = open_source(path, resolution=8)
    assert len(dataset) == 1
    assert dataset.name == "a"

    pair = write_tar(tmp_path / "pair.tar", {"1.in.webp": ENCODED[0], "1.out.webp": ENCODED[1]})
    with pytest.raises(ValueError, match=r"several images of the sample '1': set `column` .* such as \"out\.webp\""):
        open_source(pair)
    assert torch.equal(open_source(pair, column="out.webp", resolution=8)[0], dataset[0])
    with pytest.raises(ValueError, match=r"pair\.tar has no images in it: expected members named \*\.jpg"):
        open_source(pair, column="jpg")


def test_fingerprint_knows_names_and_sizes_of_members(tmp_path: Path) -> None:
    """They are all that it reads of images that stay in the file."""

    def fingerprint(folder: str, members: dict[str, bytes]) -> str:
        return open_source(write_tar(tmp_path / folder / "a.tar", members), cache="none", resolution=8).fingerprint

    first = fingerprint("first", {"a.webp": ENCODED[0], "b.webp": ENCODED[1]})
    assert fingerprint("moved", {"a.webp": ENCODED[0], "b.webp": ENCODED[1]}) == first
    assert fingerprint("renamed", {"a.webp": ENCODED[0], "c.webp": ENCODED[1]}) != first
    assert fingerprint("longer", {"a.webp": ENCODED[0], "b.webp": ENCODED[1] + b"\0"}) != first


def test_tar_that_cannot_be_read(tmp_path: Path) -> None:
    members = {f"{i}.webp": data for i, data in enumerate(ENCODED)}
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
        with pytest.raises(ValueError, match=rf"{name}\.tar cannot be read as an uncompressed tar file"):
            open_source(tmp_path / f"{name}.tar")
    with pytest.raises(ValueError, match="cannot be read as an uncompressed tar file"):
        open_source(write_tar(tmp_path / "compressed.tar", members, "w:gz"))


def test_names_with_dots_are_no_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "dots.tar", {f"2024.05.01_{i}.webp": data for i, data in enumerate(ENCODED[:10])})
    assert len(open_source(path, resolution=8)) == 10
    views = {f"{sample}.{view}.webp": ENCODED[view] for sample in range(2) for view in (1, 2)}
    with pytest.raises(ValueError, match="several images of the sample '1'"):  # the same extensions again
        open_source(write_tar(tmp_path / "views.tar", views), resolution=8)


def test_words_for_splits_in_any_case(tmp_path: Path) -> None:
    for name in ("Training-000", "validation-000"):
        write_tar(tmp_path / f"{name}.tar", {"a.webp": ENCODED[0]})
    assert len(open_source(tmp_path)) == len(open_source(tmp_path, split="val")) == 1
