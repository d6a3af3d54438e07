"""Pictures and data sets of every kind, shared by the tests of this folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
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

from spigan.data import DataConfig, ImageDataset, open_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


def open_source(source: str | Path, **options: Any) -> ImageDataset:
    return open_dataset(DataConfig(source=str(source), **options), progress=False)


def picture(seed: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """A picture of random pixels."""
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chw(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]


def everything(dataset: ImageDataset) -> torch.Tensor:
    return dataset.images(range(len(dataset)))


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_parquet(path: Path, images: list[bytes], column: str = "img") -> Path:
    """A shard as the hub stores it: {bytes, path} and a label, in row groups of two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": None} for data in images]
    struct_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(rows, struct_type), "label": list(range(len(images)))})
    pq.write_table(table, path, row_group_size=2)
    return path


# Two images at the top, one nested, and what must be left out. In sorted order: a.png, deep/er/c.PNG, z.bmp.
PICTURES = {"z.bmp": picture(2), "a.png": picture(0), "deep/er/c.PNG": picture(1)}


FILES = {name: encoded(image, Path(name).suffix[1:].upper()) for name, image in PICTURES.items()} | {
    ".hidden.png": b"",
    ".cache/d.png": b"",
    "deep/._c.png": b"",
    "notes.txt": b"no image",
}


STACKED = torch.stack([chw(PICTURES[name]) for name in sorted(PICTURES)])


def one_image(root: Path, data: bytes, suffix: str = "png", **options: Any) -> ImageDataset:
    return open_source(write_folder(root, {f"image.{suffix}": data}), **options)


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not here")
    return SHARED / name


def encoded_picture(seed: int, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    """An encoded encoded_picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


ENCODED = [encoded_picture(seed, kind="WEBP") for seed in range(23)]


def write_numbered(root: Path, images: list[bytes], suffix: str = "webp") -> Path:
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


def write_parquet_set(root: Path, images: list[bytes], group: int = 2) -> Path:
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
    "row groups": write_parquet_set,
    "arrow": write_parquet_set,
}
