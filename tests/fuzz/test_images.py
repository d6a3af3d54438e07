"""Images of every kind and what holds them (folders, zips, tar files, parquet), made to mislead or to exhaust."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fuzz_strategies import cases, extremes, lying_images, pieces, png_chunks
from fuzz_targets import (
    attempt,
    encoded,
    fresh,
    image_rows,
    images,
    parquet_of,
    read_cifar,
    read_images,
    scratch,
    tarred,
    zipped,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from spigan.data import limits

PNG = images()["png-RGB"]


def written(name: str, content: bytes) -> Path:
    path = fresh("case") / name
    path.write_bytes(content)
    return path


# ---- Single images ----


@cases(40)
@given(lying_images(), st.sampled_from([None, 1, 3]), st.sampled_from([None, 8]))
def test_images_that_lie(content: bytes, channels: int | None, resolution: int | None) -> None:
    path = written("picture.png", content)
    attempt(
        "image", lambda: read_images(path.parent, channels=channels, resolution=resolution, crop="none"), "picture.png"
    )


def test_a_length_that_lies_allocates_nothing() -> None:
    """A file allocates what it is asked to read before it looks how much there is."""
    at = PNG.index(b"IDAT")
    path = written("picture.png", PNG[: at - 4] + struct.pack(">I", 2**32 - 1) + PNG[at:])
    attempt("image", lambda: read_images(path.parent), "picture.png", memory=256 << 20)


def deep_png(mode: str) -> bytes:
    """16 bits a channel, which Pillow cannot write in colour."""
    kind, count = {"RGB": (2, 3), "RGBA": (6, 4), "L": (0, 1), "LA": (4, 2)}[mode]
    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    return png_chunks((b"IHDR", header), (b"IDAT", zlib.compress(bytes(8 * (1 + 16 * count)))), (b"IEND", b""))


def wide_png(width: int, height: int) -> bytes:
    """An image of one colour, in some 1/1000 of its bytes."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return png_chunks((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))


TAKEN = ["png-P", "png-L", "png-1", "png-RGBA", "png-LA", "jpeg-CMYK", "tiff-CMYK", "gif-P", "bmp-P", "jpeg-mpo"]
REFUSED = {
    "animated GIF": (images()["gif-frames"], "holds several frames"),
    "animated WebP": (images()["webp-frames"], "holds several frames"),
    "animated PNG": (images()["png-frames"], "holds several frames"),
    "TIFF of pages": (images()["tiff-frames"], "holds several frames"),
    "16-bit grey": (images()["png-I;16"], "more than 8 bits"),
    "floats": (images()["tiff-F"], "more than 8 bits"),
    **{f"16-bit {mode}": (deep_png(mode), "more than 8 bits") for mode in ("RGB", "RGBA", "L", "LA")},
    "half": (PNG[: len(PNG) // 2], "cannot be read as an image"),
    "half a JPEG": (images()["jpeg-RGB"][:400], "cannot be read as an image"),
    "empty": (b"", "cannot be read as an image"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "cannot be read as an image"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot be read as an image"),
    "bomb": (wide_png(9_000, 9_000), "has 9000 x 9000 pixels; at most"),
    "large bomb": (wide_png(60_000, 3_000), "DecompressionBombError"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_kinds_that_are_taken(name: str) -> None:
    path = written("picture.png", images()[name])
    assert attempt("image", lambda: read_images(path.parent))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("holder", ["folder", "zip", "tar", "parquet"])
def test_kinds_that_are_refused(name: str, holder: str) -> None:
    content, message = REFUSED[name]
    path = {
        "folder": lambda: written("picture.png", content).parent,
        "zip": lambda: written("pictures.zip", zipped({"picture.png": content})),
        "tar": lambda: written("pictures.tar", tarred({"picture.png": content})),
        "parquet": lambda: written("pictures.parquet", parquet_of({"image": image_rows(content)})),
    }[holder]()
    assert not attempt("image", lambda: read_images(path), message, memory=1 << 29)


def test_links_and_pipes_in_a_folder() -> None:
    folder = fresh("case")
    (folder / "a.png").write_bytes(PNG)
    for name, make, message in (
        ("pipe.png", os.mkfifo, "pipe.png is not a regular file"),
        ("zero.png", lambda path: path.symlink_to("/dev/zero"), "zero.png is not a regular file"),
        ("gone.png", lambda path: path.symlink_to("nowhere"), "gone.png is a link to nowhere"),
        ("round.png", lambda path: path.symlink_to("round.png"), "round.png is a link to round.png"),
        ("above", lambda path: path.symlink_to(folder), "links to a folder that is already in"),
    ):
        make(folder / name)
        assert not attempt("folder", lambda: read_images(folder), message)
        (folder / name).unlink()
    (folder / "b.png").symlink_to("a.png")  # a link to an image is an image
    assert attempt("folder", lambda: read_images(folder))


# ---- Archives ----

NAMES = [
    "a.png",
    "../../evil.png",
    "/evil.png",
    "..\\evil.png",
    "C:\\evil.png",
    "train/a.png",
    "test/a.png",
    "a\0b.png",
]
NAMES += [".a/b.png", "a.png/", "evil.zip", "x" * 5000 + ".png", "\x1b[2J.png", "é.png", "", ".png", "a/../../evil.png"]
names = st.one_of(st.sampled_from(NAMES), st.text(max_size=6).map(lambda text: f"{text}.png"))
contents = st.sampled_from([PNG, images()["jpeg-CMYK"], b"", bytes(1 << 20), zipped({"a.png": PNG}), PNG[:50]])
FIELDS = {"version": (6, "H"), "flags": (8, "H"), "method": (10, "H"), "time": (12, "I"), "crc": (16, "I"),
          "packed": (20, "I"), "size": (24, "I"), "name": (28, "H"), "extra": (30, "H"), "comment": (32, "H"),
          "disk": (34, "H"), "kind": (38, "I"), "offset": (42, "I")}  # fmt: skip


@st.composite
def hostile_zips(draw: st.DrawFn) -> bytes:
    """Names that lead elsewhere, links, encrypted members; a directory whose sizes, methods and offsets lie."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in draw(st.lists(names, min_size=1, max_size=3)):
            member = zipfile.ZipInfo(name or "x")
            member.filename = name.replace("\ud800", "?")
            member.external_attr = draw(st.sampled_from([0o100644, 0o120777, 0o040755])) << 16
            kinds = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the same name twice
                archive.writestr(member, draw(contents), draw(st.sampled_from(kinds)))
    data = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        entry = data.rfind(b"PK\x01\x02")
        offset, kind = draw(st.sampled_from(list(FIELDS.values())))
        value = draw(st.one_of(st.sampled_from([v for v in extremes if v < 2**32]), st.integers(0, 100)))
        struct.pack_into(f"<{kind}", data, entry + offset, value & (2 ** (8 * struct.calcsize(kind)) - 1))
    return bytes(data)


def nothing_unpacked(path: Path) -> bool:
    found = {file.name for file in (*path.parent.iterdir(), *scratch().iterdir(), *Path().iterdir())}
    return [*path.parent.iterdir()] == [path] and not any("evil" in name for name in found)


@cases(30)
@given(hostile_zips())
def test_hostile_zip(content: bytes) -> None:
    path = written("pictures.zip", content)
    attempt("zip", lambda: read_images(path), "pictures.zip")
    assert nothing_unpacked(path)


@pytest.mark.parametrize("name", ["../../evil.png", "/evil.png", "a/../../../evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_elsewhere(name: str, kind: str) -> None:
    """Archives are read in place: a name is a name."""
    path = written(f"pictures.{kind}", (zipped if kind == "zip" else tarred)({name: PNG}))
    attempt("archive", lambda: read_images(path), f"pictures.{kind}")
    assert nothing_unpacked(path)


def test_encrypted_zip() -> None:
    content = bytearray(zipped({"a.png": PNG}))
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.find(signature) + offset] |= 1
    path = written("pictures.zip", bytes(content))
    assert not attempt("zip", lambda: read_images(path), "encrypted")


def test_zip_bomb_with_a_size_that_lies() -> None:
    """2 GiB that say they are 1000 bytes."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = (packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)) * 128 + packer.flush()
    content = bytearray(zipped({"a.png": packed}, zipfile.ZIP_STORED))
    entry = content.rfind(b"PK\x01\x02")
    for offset, value in ((8, zipfile.ZIP_DEFLATED), (entry + FIELDS["method"][0], zipfile.ZIP_DEFLATED)):
        struct.pack_into("<H", content, offset, value)
    struct.pack_into("<I", content, entry + FIELDS["size"][0], 1000)
    path = written("pictures.zip", bytes(content))
    assert not attempt("bomb", lambda: read_images(path), "pictures.zip!a.png", memory=1 << 28)


def test_zip_bomb_of_another_method() -> None:
    path = written("pictures.zip", zipped({"a.png": bytes(1 << 26)}, zipfile.ZIP_BZIP2))
    assert not attempt("bomb", lambda: read_images(path), "a.png is not packed with deflate", memory=1 << 25)


def test_zip_bomb_with_its_size() -> None:
    path = written("pictures.zip", zipped({"a.png": bytes(300 << 20)}))
    assert not attempt("bomb", lambda: read_images(path), "unpacks to 314572800 bytes", memory=1 << 29)


def extended(records: bytes, kind: bytes = b"x") -> bytes:
    """A header that holds facts about the next, in the format of POSIX or GNU."""
    member = tarfile.TarInfo("facts")
    member.type, member.size = kind, len(records)
    return member.tobuf() + records + bytes(-len(records) % 512)


RECORDS = [b"16 size=-1024\n0\n", b"12 size=99\n0", b"9" * 5000 + b" size=1\n", b"0 a=b\n", b"20 path=../../evil\n\n"]
RECORDS += [b"25 GNU.sparse.major=1\n\n\n\n", b"\xff" * 20, b"", b"22 GNU.sparse.size=99\n", b"evil.png\0"]


@st.composite
def hostile_tars(draw: st.DrawFn) -> bytes:
    """Members of every type, names that lead elsewhere, headers about headers, sizes that lie."""
    parts = []
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        content = draw(contents)
        for _ in range(draw(st.sampled_from([0, 0, 1, 2, 40, 1500]))):
            records = draw(st.sampled_from(RECORDS))
            parts.append(extended(records, draw(st.sampled_from([b"x", b"g", b"L", b"K"]))))
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1" if draw(st.booleans()) else name)
        member.type = draw(st.sampled_from([tarfile.REGTYPE, *(bytes([kind]) for kind in b"1234567S\0")]))
        member.linkname = draw(names)
        member.size = draw(st.one_of(st.just(len(content)), st.sampled_from([0, 1, 511, 2**33, 8**11 - 1])))
        header = bytearray(member.tobuf(errors="replace"))
        if draw(st.integers(0, 3)) == 0:
            piece = draw(pieces)
            at = draw(st.sampled_from([0, 100, 124, 156, 257, 345]))
            header[at : at + len(piece)] = piece
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % sum(header[:512])
        parts.append(bytes(header[:512]) + content + bytes(-len(content) % 512))
    return b"".join(parts) + bytes(1024)


@cases(30)
@given(hostile_tars(), st.booleans())
def test_hostile_tar(content: bytes, archive: bool) -> None:
    path = written("pictures.tar", content)
    attempt("tar shard", lambda: read_images(path), "pictures.tar")
    assert nothing_unpacked(path)
    path = written("cifar-10-python.tar.gz", gzip.compress(content, 1) if archive else content)
    attempt("cifar archive", lambda: read_cifar(path), "cifar-10-python.tar.gz")
    assert nothing_unpacked(path)


@pytest.mark.parametrize("kind", ["a member", "a header"])
def test_cifar_archive_that_is_a_bomb(kind: str) -> None:
    """3 GiB in 14 MB, as a file of the archive or as facts about the next."""
    member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    member.type, member.size = (tarfile.REGTYPE if kind == "a member" else tarfile.XHDTYPE), 3 << 30
    path = written("cifar-10-python.tar.gz", gzip.compress(member.tobuf()) + gzip.compress(bytes(1 << 24), 1) * 192)
    assert not attempt("bomb", lambda: read_cifar(path), "unpacks to more than", memory=1 << 30)


def test_pickle_of_millions_of_instructions() -> None:
    content = tarred({f"cifar-10-batches-py/data_batch_{i}": b"\x80\x02" + b"N" * 3_000_000 for i in range(1, 6)})
    path = written("cifar-10-python.tar.gz", gzip.compress(content, 1))
    assert not attempt("bomb", lambda: read_cifar(path), "has more than 1000000 instructions", memory=1 << 30)


# ---- Parquet ----


def struct_of(values: pa.Array, path: str | None = None) -> pa.Array:
    return pa.StructArray.from_arrays([values, pa.array([path] * len(values), pa.string())], names=["bytes", "path"])


def nested(depth: int) -> pa.Array:
    values = pa.array([1, 2])
    for _ in range(depth):
        values = pa.StructArray.from_arrays([values], names=["bytes"])
    return values


COLUMNS: dict[str, pa.Array] = {
    "integers": struct_of(pa.array([1, 2])),
    "texts": struct_of(pa.array(["a", "b"])),
    "lists": struct_of(pa.array([[PNG], [PNG]])),
    "large": struct_of(pa.array([PNG, PNG], pa.large_binary())),
    "fixed": struct_of(pa.array([b"1234", b"5678"], pa.binary(4))),
    "none": struct_of(pa.array([None, None], pa.binary())),
    "path": struct_of(pa.array([None, None], pa.binary()), "/dev/zero"),
    "empty": struct_of(pa.array([], pa.binary())),
    "repeated": struct_of(pa.array([PNG] * 500, pa.binary())),
    "long": struct_of(pa.array([PNG, bytes(1 << 24)], pa.binary())),
    "plain": pa.array([PNG, PNG]),
    "dictionary": pa.array([PNG, PNG]).dictionary_encode(),
    "deep": nested(60),
    "floats": pa.array([1.5, float("nan")]),
    "text": pa.array(["a", "b"]),
    "lists of structs": pa.array([[{"bytes": PNG}], []]),
    "map": pa.array([[("bytes", PNG)], []], pa.map_(pa.string(), pa.binary())),
    "good": struct_of(pa.array([PNG, PNG], pa.binary())),
}


@cases(25)
@given(
    st.dictionaries(st.sampled_from(["image", "bytes", "a.b", ""]), st.sampled_from(sorted(COLUMNS)), max_size=2),
    st.sampled_from([None, "image", "bytes", "a.b", "image.bytes"]),
    st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    st.booleans(),
)
def test_parquet_of_other_columns(kinds: dict[str, str], column: str | None, compression: str, in_place: bool) -> None:
    rows = min((len(COLUMNS[kind]) for kind in kinds.values()), default=0)
    table = {name: COLUMNS[kind].slice(0, rows) for name, kind in kinds.items()}
    path = written("train.parquet", parquet_of(table, compression=compression, row_group_size=2))
    with pytest.MonkeyPatch.context() as patched:
        if in_place:
            patched.setattr(limits, "ENCODED_CACHE_BYTES", 0)
            patched.setattr(limits, "ROW_GROUP_BYTES", 1 << 30)
        attempt("parquet", lambda: read_images(path, column=column), "train.parquet")


@pytest.mark.parametrize("in_place", [False, True])
def test_parquet_bomb(monkeypatch: pytest.MonkeyPatch, in_place: bool) -> None:
    """100,000 rows of an image of 8 MB in 5 kB: a terabyte once unpacked."""
    import pyarrow.parquet as pq

    large = encoded(Image.fromarray(np.zeros((1700, 1700, 3), np.uint8)), "BMP")
    path = fresh("case") / "train.parquet"
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, np.int32)), pa.array([large]))
    options: dict[str, Any] = {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False, "store_schema": False}
    pq.write_table(pa.table({"image": values}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(limits, "MAX_COLUMN_BYTES", 1 << 29)  # 4 GiB take seconds
    if in_place:
        monkeypatch.setattr(limits, "ENCODED_CACHE_BYTES", 0)
        monkeypatch.setattr(limits, "ROW_GROUP_BYTES", 1 << 30)
    read = lambda: read_images(path, column="image")  # noqa: E731
    assert not attempt("bomb", read, "train.parquet", memory=1 << 29)


def test_parquet_bomb_of_one_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 rows of 128 MiB in some kB: several of them at a time would already be too much."""
    import pyarrow.parquet as pq

    path = fresh("case") / "train.parquet"
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), pa.array([bytes(1 << 27)]))
    options: dict[str, Any] = {"dictionary_pagesize_limit": 1 << 30, "write_statistics": False, "store_schema": False}
    pq.write_table(pa.table({"image": values}), path, compression="zstd", **options)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(limits, "MAX_COLUMN_BYTES", 1 << 29)
    read = lambda: read_images(path, column="image")  # noqa: E731
    assert not attempt("bomb", read, "unpacks to more than", memory=1 << 29)


def test_a_path_in_a_parquet_file_is_not_opened() -> None:
    """It may be that of anything on this machine."""
    secret = written("secret.png", PNG)
    path = secret.with_name("train.parquet")
    path.write_bytes(parquet_of({"image": struct_of(pa.array([None], pa.binary()), str(secret))}))
    assert not attempt("parquet", lambda: read_images(path), "holds a path instead of an image")


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_a_footer_with_other_rows_than_the_column(rows: int) -> None:
    content = bytearray(parquet_of({"image": [PNG] * 3}))
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    at = content.index(b"\x16\x06", footer)  # Thrift's field of 64 bits, and 3: the rows of the file
    content[at + 1] = 2 * rows
    path = written("train.parquet", bytes(content))
    assert not attempt("parquet", lambda: read_images(path, column="image"), "train.parquet")
