"""spigan.data: every kind of source, every error (it must name the file), and an order that resumes exactly."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from pydantic import ValidationError

import spigan.data.dataset
from spigan.data import DataConfig, ImageDataset, loader, open_dataset
from spigan.data.dataset import InfiniteShuffle

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SHARED = Path(__file__).parents[2] / "shared" / "data"


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
    return dataset.__getitems__(range(len(dataset)))


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


# Sources ------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    dataset = open_source("digits")
    assert (dataset.name, len(dataset), dataset.channels, dataset.resolution, dataset.cached) == (
        "digits",
        1797,
        1,
        8,
        True,
    )
    expected = np.floor(load_digits().images * 255 / 16 + 0.5)
    images = everything(dataset)
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 1, 8, 8)
    np.testing.assert_array_equal(images[:, 0].numpy(), expected)
    assert dataset.description["native_width"] == [8, 8]

    with pytest.raises(ValueError, match="digits has no split 'test'"):
        open_source("digits", split="test")


@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
def test_resize_filter_is_used_and_recorded(resize: str) -> None:
    native, dataset = open_source("digits"), open_source("digits", resolution=16, resize=resize)
    assert dataset.resolution == 16
    assert dataset.description["resize"] == resize
    expected = Image.fromarray(native[5][0].numpy()).resize((16, 16), Image.Resampling[resize.upper()])
    assert torch.equal(dataset[5], chw(expected))


def test_resize_filters_differ() -> None:
    prints = {
        open_source("digits", resolution=16, resize=name).fingerprint for name in ("lanczos", "bicubic", "bilinear")
    }
    assert len(prints) == 3


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_folder(tmp_path: Path, cache: str) -> None:
    dataset = open_source(write_folder(tmp_path / "photos", FILES), cache=cache)
    assert (dataset.name, len(dataset), dataset.cached) == ("photos", 3, cache == "auto")
    assert torch.equal(everything(dataset), STACKED)
    assert torch.equal(torch.stack(list(dataset)), STACKED)  # iteration ends
    assert torch.equal(dataset[-1], STACKED[-1])
    with pytest.raises(IndexError):
        dataset[3]
    dataset[0].zero_()
    assert torch.equal(dataset[0], STACKED[0])  # what is handed out is a copy


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_zip(tmp_path: Path, cache: str) -> None:
    dataset = open_source(write_zip(tmp_path / "photos.zip", FILES | {"__MACOSX/._a.png": b""}), cache=cache)
    assert dataset.name == "photos"
    assert torch.equal(everything(dataset), STACKED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.zip"]  # nothing is extracted
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[1], STACKED[1])


def test_folder_follows_links_but_not_round_in_circles(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", {"a.png": FILES["a.png"]})
    root = write_folder(tmp_path / "root", {"b.png": FILES["z.bmp"]})
    (root / "linked").symlink_to(elsewhere)
    assert len(open_source(root)) == 2
    (root / "circle").symlink_to(root)
    with pytest.raises(ValueError, match="circle links to a folder"):
        open_source(root)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_splits_of_images(tmp_path: Path, kind: str) -> None:
    files = {"train/a.png": FILES["a.png"], "train/b.png": FILES["z.bmp"], "test/c.png": FILES["deep/er/c.PNG"]}
    path = write_folder(tmp_path / "set", files) if kind == "folder" else write_zip(tmp_path / "set.zip", files)
    assert len(open_source(path)) == 2
    assert len(open_source(path, split="test")) == 1
    with pytest.raises(ValueError, match=r"no split 'val': its folders are \['test', 'train'\]"):
        open_source(path, split="val")


def test_a_class_called_train_is_no_split(tmp_path: Path) -> None:
    root = write_folder(tmp_path, {"train/a.png": FILES["a.png"], "tram/b.png": FILES["a.png"]})
    assert len(open_source(root)) == 2
    with pytest.raises(ValueError, match="no split 'test': it has no split folders"):
        open_source(root, split="test")


@pytest.mark.parametrize("below", ["", "data"])
def test_parquet_folder(tmp_path: Path, below: str) -> None:
    images = [picture(seed) for seed in range(7)]
    data = [encoded(image) for image in images]
    for part, rows in enumerate((data[:3], data[3:4], data[4:6])):
        write_parquet(tmp_path / below / f"train-0000{part}-of-00003.parquet", rows)
    write_parquet(tmp_path / below / "test-00000-of-00001.parquet", data[6:])
    assert torch.equal(everything(open_source(tmp_path)), torch.stack([chw(image) for image in images[:6]]))
    assert torch.equal(everything(open_source(tmp_path, cache="none")), everything(open_source(tmp_path)))
    assert torch.equal(open_source(tmp_path, split="test")[0], chw(images[6]))
    with pytest.raises(ValueError, match=r"no split 'validation'.*\['test', 'train'\]"):
        open_source(tmp_path, split="validation")
    (tmp_path / below / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="should have 3 parquet files of 'train'"):
        open_source(tmp_path)


def test_parquet_file(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "test-00000-of-00001.parquet", [FILES["a.png"]])
    assert torch.equal(open_source(file)[0], STACKED[0])
    assert torch.equal(open_source(file, split="test")[0], STACKED[0])
    with pytest.raises(ValueError, match="holds the split 'test', not 'val'"):
        open_source(file, split="val")


def test_parquet_columns(tmp_path: Path) -> None:
    image = pa.array([{"bytes": FILES["a.png"], "path": "a.png"}])
    file = tmp_path / "two.parquet"
    pq.write_table(pa.table({"photo": image, "mask": image, "raw": [FILES["z.bmp"]], "label": [1]}), file)
    with pytest.raises(ValueError, match=r"two\.parquet has 2 columns of images.*photo \(.*mask \(.*label \(int64\)"):
        open_source(file)
    with pytest.raises(ValueError, match=r"two\.parquet has no column of images called 'label'"):
        open_source(file, column="label")
    assert torch.equal(open_source(file, column="mask")[0], STACKED[0])
    assert torch.equal(open_source(file, column="raw")[0], STACKED[2])


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_folder(tmp_path, {"a.png": FILES["a.png"]}) / "a.png"
    rows = [{"bytes": FILES["z.bmp"], "path": None}, {"bytes": None, "path": str(file)}]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    asked = []

    def load_dataset(name: str, split: str) -> Any:
        asked.append((name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = open_source("someone/faces", split="valid")
    assert (dataset.name, asked) == ("faces", [("someone/faces", "valid")])
    assert torch.equal(everything(dataset), STACKED[[2, 0]])
    open_source("cifar10")
    assert asked[1] == ("uoft-cs/cifar10", "train")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, split: str) -> Any:
        raise ConnectionError("no route") if split == "train" else ValueError("Unknown split")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        FileNotFoundError, match=r"no route.*local path.*cifar-10-python\.tar\.gz from https://www.cs.tor"
    ):
        open_source("cifar10")
    with pytest.raises(FileNotFoundError, match=r"'someone/faces'.*no route.*local path"):
        open_source("someone/faces")
    with pytest.raises(ValueError, match=r"'someone/faces', split 'wild'.*Unknown split"):
        open_source("someone/faces", split="wild")


# The original CIFAR-10 archive --------------------------------------------------------------------------------------


def cifar_pixels(batch: int) -> np.ndarray:
    """uint8 [10000, 3072], different in every batch and image."""
    pixels = np.tile(np.random.default_rng(0).integers(0, 256, (4, 3072), dtype=np.uint8), (2_500, 1))
    pixels[:, 0] = batch
    pixels[:, 1:3] = np.arange(10_000, dtype=">u2").view(np.uint8).reshape(-1, 2)
    return pixels


def cifar_pickle(pixels: np.ndarray, *, fortran: bool = False, extra: bytes = b"") -> bytes:
    """A batch as Python 2's cPickle wrote it (protocol 2, strings as BINSTRING), instruction by instruction."""
    data = pixels.tobytes("F" if fortran else "C")
    return (
        b"\x80\x02}(U\x0bbatch_labelU\x15training batch 1 of 5U\x06labels](" + b"K\x07" * 10_000 + b"eU\x04data"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01M\x10'M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + (b"\x88" if fortran else b"\x89")
        + (b"T" + struct.pack("<i", len(data)) + data + b"tb" + extra + b"u.")
    )


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.slow
def test_cifar_tar(tmp_path: Path) -> None:
    order = [4, 1, 5, 2, 3]  # members come in any order; their names tell
    members = {f"data_batch_{batch}": cifar_pickle(cifar_pixels(batch), fortran=batch == 2) for batch in order}
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"readme.html": b"", **members})
    dataset = open_source(path)
    assert (dataset.name, len(dataset), dataset.channels, dataset.resolution) == ("cifar-10-python", 50_000, 3, 32)
    for index in (0, 9_999, 10_000, 12_345, 49_999):
        expected = cifar_pixels(1 + index // 10_000)[index % 10_000].reshape(3, 32, 32)
        np.testing.assert_array_equal(dataset[index].numpy(), expected)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz lacks test_batch"):
        open_source(path, split="test")
    with pytest.raises(ValueError, match="has no split 'val'"):
        open_source(path, split="val")


def test_cifar_folder(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "cifar-10-batches-py", {"test_batch": cifar_pickle(cifar_pixels(0))})
    dataset = open_source(folder, split="test")
    np.testing.assert_array_equal(everything(dataset).reshape(10_000, 3072).numpy(), cifar_pixels(0))
    with pytest.raises(ValueError, match="lacks data_batch_1, data_batch_2"):
        open_source(folder)


@pytest.mark.parametrize("kind", ["alone", "with images", "instance", "protocol 4"])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "executed"
    command = f"touch {marker}".encode()
    call = b"cos\nsystem\n(U" + bytes([len(command)]) + command + b"tR"
    payload = {
        "alone": b"\x80\x02" + call + b".",
        "with images": cifar_pickle(cifar_pixels(0), extra=call + b"0"),
        "instance": b"(S'" + command + b"'\nios\nsystem\n.",
        "protocol 4": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
    }[kind]
    folder = write_folder(tmp_path / "cifar-10-batches-py", {"test_batch": payload})
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": payload})
    for source, name in ((folder, "cifar-10-batches-py/test_batch"), (path, r"cifar-10-python\.tar\.gz!test_batch")):
        with pytest.raises(ValueError, match=rf"{name} is not a batch of the CIFAR-10 .*it would import"):
            open_source(source, split="test")
    assert not marker.exists()
    if kind != "with images":  # the test's own teeth: unpickling does execute it
        pickle.loads(payload)
        assert marker.exists()


@pytest.mark.parametrize(
    "payload", [b"", b"garbage", cifar_pickle(cifar_pixels(0))[:-5_000], cifar_pickle(cifar_pixels(0)[:9_999])]
)
def test_cifar_batch_that_is_none(tmp_path: Path, payload: bytes) -> None:
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": payload})
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz!test_batch is not a batch"):
        open_source(path, split="test")


def test_cifar_archive_cut_short(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "cifar-10-python.tar.gz", {"test_batch": cifar_pickle(cifar_pixels(0))})
    path.write_bytes(path.read_bytes()[:-10_000])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz cannot be read as a tar archive"):
        open_source(path, split="test")


# How an image becomes a square of bytes -----------------------------------------------------------------------------


def one_image(root: Path, data: bytes, suffix: str = "png", **options: Any) -> ImageDataset:
    return open_source(write_folder(root, {f"image.{suffix}": data}), **options)


def test_centre_is_cropped_before_resizing(tmp_path: Path) -> None:
    image = picture(0, (21, 10))
    assert torch.equal(one_image(tmp_path, encoded(image))[0], chw(image.crop((5, 0, 15, 10))))
    dataset = one_image(tmp_path, encoded(image), resolution=4)
    assert torch.equal(dataset[0], chw(image.crop((5, 0, 15, 10)).resize((4, 4), Image.Resampling.LANCZOS)))
    assert dataset.description["native_width"] == [21, 21]
    assert dataset.description["native_height"] == [10, 10]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(0, (12, 8))
    data = encoded(image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = ImageOps.fit(upright, (8, 8), Image.Resampling.NEAREST)
    assert torch.equal(one_image(tmp_path, data)[0], chw(expected))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_are_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), (100,) * (len(mode) - 1) + (0,))
    image.paste((100,) * (len(mode) - 1) + (255,), (0, 0, 4, 8))
    for channels in (1, 3):
        pixels = one_image(tmp_path, encoded(image), channels=channels)[0]
        assert pixels.shape == (channels, 8, 8)
        assert (pixels[..., :4] == 100).all()
        assert (pixels[..., 4:] == 255).all()


def test_modes(tmp_path: Path) -> None:
    colours, greys = picture(0), picture(0, mode="L")
    assert torch.equal(one_image(tmp_path / "1", encoded(colours), channels=1)[0], chw(colours.convert("L")))
    assert torch.equal(one_image(tmp_path / "2", encoded(greys), channels=3)[0], chw(greys).expand(3, 8, 8))
    palette = colours.quantize(16)
    assert torch.equal(one_image(tmp_path / "3", encoded(palette))[0], chw(palette.convert("RGB")))
    assert torch.equal(one_image(tmp_path / "4", encoded(palette, "GIF"), "gif")[0], chw(palette.convert("RGB")))
    bits = greys.convert("1")
    assert torch.equal(one_image(tmp_path / "5", encoded(bits))[0], chw(bits.convert("L")))
    assert torch.equal(one_image(tmp_path / "6", encoded(colours, "WEBP", lossless=True), "webp")[0], chw(colours))
    assert torch.equal(one_image(tmp_path / "7", encoded(colours, "TIFF"), "tif")[0], chw(colours))
    cmyk = encoded(picture(0, (16, 16)).convert("CMYK"), "JPEG")
    expected = chw(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    assert torch.equal(one_image(tmp_path / "8", cmyk, "jpg")[0], expected)


def test_second_picture_of_a_camera_is_left_alone(tmp_path: Path) -> None:
    first = picture(0, (16, 16))
    data = encoded(first, "MPO", save_all=True, append_images=[picture(1, (16, 16))])
    assert torch.equal(one_image(tmp_path, data, "jpg")[0], chw(Image.open(io.BytesIO(encoded(first, "JPEG")))))


# Images that are refused --------------------------------------------------------------------------------------------


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, pixels: bytes = b"") -> bytes:
    """A PNG file written by hand: colour type 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png16(colour: int) -> bytes:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    return png(8, 8, bits=16, colour=colour, pixels=(b"\0" + bytes(range(16)) * channels) * 8)


FRAMES: dict[str, Any] = {"save_all": True, "append_images": [picture(1)]}
REFUSED: dict[str, tuple[bytes, dict[str, Any], str]] = {  # the second of two images, options, what the error says
    "empty": (b"", {}, "cannot be read as an image"),
    "text": (b"no image at all", {}, "cannot be read as an image"),
    "other format": (encoded(picture(0), "PPM"), {}, "cannot be read as an image"),
    "animated gif": (encoded(picture(0), "GIF", **FRAMES), {}, "several frames"),
    "animated png": (encoded(picture(0), "PNG", **FRAMES), {}, "several frames"),
    "pages": (encoded(picture(0), "TIFF", **FRAMES), {}, "several frames"),
    "16-bit grey": (png16(0), {}, "more than 8 bits"),
    "16-bit rgb": (png16(2), {"channels": 3}, "more than 8 bits"),
    "16-bit rgba": (png16(6), {"channels": 3}, "more than 8 bits"),
    "float": (encoded(picture(0, mode="L").convert("F"), "TIFF"), {}, "more than 8 bits"),
    "rgba": (encoded(picture(0, mode="RGBA")), {}, "alpha channel: give channels=3"),
    "palette": (encoded(picture(0).quantize(16), transparency=3), {}, "alpha channel: give channels=3"),
    "grey": (encoded(picture(0, mode="L")), {}, r"is grey but .*a\.png is RGB: give channels=3"),
    "size": (encoded(picture(0, (9, 9))), {}, r"has 9 x 9 pixels but .*a\.png makes a square of 8: give a resolution"),
    "oblong": (encoded(picture(0, (9, 8))), {"crop": "none", "resolution": 8}, "has 9 x 8 pixels, not a square"),
    "bomb": (png(8193, 8192), {"resolution": 8}, "8193 x 8192 pixels; at most 67108864"),
    "big bomb": (png(60_000, 60_000), {"resolution": 8}, "cannot be read as an image .*DecompressionBomb"),
}


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("case", REFUSED)
def test_refused_image_is_named_when_opened(tmp_path: Path, case: str, cache: str) -> None:
    data, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=rf"deep/b\.png .*{message}"):
        open_source(write_folder(tmp_path, {"a.png": encoded(picture(0)), "deep/b.png": data}), cache=cache, **options)


def test_refused_image_is_named_in_zip_and_parquet(tmp_path: Path) -> None:
    good, bad = encoded(picture(0)), encoded(picture(0))[:100]
    with pytest.raises(ValueError, match=r"images\.zip!deep/b\.png cannot be read"):
        open_source(write_zip(tmp_path / "images.zip", {"a.png": good, "deep/b.png": bad}))
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [good] * 3)
    second = write_parquet(tmp_path / "train-00001-of-00002.parquet", [good] * 17 + [bad, good])
    for source in (tmp_path, second):
        with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet row 17 cannot be read"):
            open_source(source)
    rows = pa.array([{"bytes": good, "path": None}, None, {"bytes": None, "path": None}])
    for row in (1, 2):
        pq.write_table(pa.table({"img": rows.take([0, row])}), tmp_path / "null.parquet")
        with pytest.raises(ValueError, match=r"null\.parquet row 1 holds no image"):
            open_source(tmp_path / "null.parquet")


def test_truncated_image_is_named_when_decoded(tmp_path: Path) -> None:
    data = encoded(picture(0, (64, 64)), "JPEG")[:-500]
    with pytest.raises(ValueError, match=r"image\.jpg cannot be read as an image \(OSError: image file is truncated"):
        one_image(tmp_path, data, "jpg")
    dataset = one_image(tmp_path, data, "jpg", cache="none")  # its header is fine
    with pytest.raises(ValueError, match=r"image\.jpg cannot be read"):
        dataset[0]


def test_decompression_bomb_in_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", encoded(picture(0)) + bytes(100_000))
    monkeypatch.setattr(spigan.data.dataset, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match=r"images\.zip!a\.png unpacks to \d+ bytes"):
        open_source(path)


def test_corrupt_member_of_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "images.zip", {"a.png": encoded(picture(0))})
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"images\.zip!a\.png cannot be read as an image \(BadZipFile"):
        open_source(path)


# Sources that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["no-such-thing", "/no/such/folder", "./no/such", "no/such.zip", "a/b/c"])
def test_missing_source(source: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{source!r} does not exist: expected \"digits\", \"cifar10\""):
        open_source(source)


def test_sources_of_no_use(tmp_path: Path) -> None:
    write_folder(tmp_path, {"empty/.keep": b"", "a.png": b"", "b.zip": b"x", "c.parquet": b"x", "d.tar.gz": b"x"})
    for name, message in {
        "empty": "has no images in it",
        "a.png": "is no source of images.*give its folder",
        "b.zip": "cannot be read as a zip file",
        "c.parquet": "cannot be read as a parquet file",
        "d.tar.gz": "cannot be read as a tar archive",
    }.items():
        with pytest.raises(ValueError, match=f"{name} {message}"):
            open_source(tmp_path / name)
    with pytest.raises(ValueError, match=r"e\.zip has no images in it"):
        open_source(write_zip(tmp_path / "e.zip", {"notes.txt": b""}))
    with pytest.raises(ValueError, match=r"f\.parquet has no rows"):
        open_source(write_parquet(tmp_path / "f.parquet", []))


def test_unreadable_folder_is_not_left_out(tmp_path: Path) -> None:
    locked = write_folder(tmp_path, {"a.png": FILES["a.png"], "locked/b.png": FILES["a.png"]}) / "locked"
    locked.chmod(0)
    try:
        if os.access(locked, os.R_OK):
            pytest.skip("this user may read every folder")
        with pytest.raises(PermissionError, match="locked"):
            open_source(tmp_path)
    finally:
        locked.chmod(0o700)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "train.parquet", [FILES["a.png"]])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pyarrow"):
        open_source(file)


@pytest.mark.parametrize(
    "options", [{"resolution": 0}, {"channels": 4}, {"resize": "area"}, {"source": ""}, {"size": 3}, {"crop": None}]
)
def test_config_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        DataConfig(**{"source": "digits", **options})


def test_config_fields_are_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())


# Cache, description, fingerprint ------------------------------------------------------------------------------------


def test_cache_auto_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, FILES)
    monkeypatch.setattr(spigan.data.dataset, "CACHE_BYTES", 3 * 3 * 8 * 8)
    assert open_source(tmp_path).cached
    monkeypatch.setattr(spigan.data.dataset, "CACHE_BYTES", 3 * 3 * 8 * 8 - 1)
    assert not open_source(tmp_path).cached
    assert open_source(tmp_path, cache="memory").cached


def test_description_is_what_a_run_records(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.png": encoded(picture(0, (20, 9))), "b.png": encoded(picture(1, (10, 12)))})
    for cache in ("memory", "none"):
        dataset = open_source(tmp_path, resolution=8, cache=cache)
        assert json.loads(json.dumps(dataset.description)) == {
            "source": str(tmp_path),
            "split": "train",
            "count": 2,
            "resolution": 8,
            "channels": 3,
            "resize": "lanczos",
            "crop": "center",
            "native_width": [10, 20],
            "native_height": [9, 12],
        }


def test_fingerprint(tmp_path: Path) -> None:
    here = write_folder(tmp_path / "here", FILES)
    moved = write_folder(tmp_path / "moved", FILES)
    other = write_folder(tmp_path / "other", FILES | {"a.png": encoded(picture(7))})
    longer = write_folder(tmp_path / "longer", FILES | {"a.png": FILES["a.png"] + b"\0"})
    zipped = write_zip(tmp_path / "zipped.zip", FILES)
    cached = open_source(here).fingerprint
    assert len(cached) == 64
    assert int(cached, 16)
    # Cached: the pixels decide.
    assert (
        cached == open_source(moved).fingerprint == open_source(longer).fingerprint == open_source(zipped).fingerprint
    )
    assert cached != open_source(other).fingerprint
    # Not cached: names, sizes and the options do.
    uncached = open_source(here, cache="none").fingerprint
    assert uncached == open_source(moved, cache="none").fingerprint
    assert uncached != open_source(longer, cache="none").fingerprint
    assert uncached != open_source(here, cache="none", resolution=4).fingerprint


# Order --------------------------------------------------------------------------------------------------------------


def images_of(count: int, total: int, batch_size: int, *, seed: int, start: int = 0) -> list[int]:
    """The first `total` indices after `start`."""
    batches = iter(InfiniteShuffle(count, batch_size, seed=seed, start=start))
    taken = list(itertools.islice(batches, -(-total // batch_size)))
    assert all(len(batch) == batch_size for batch in taken)
    return list(itertools.chain(*taken))[:total]


@settings(deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(0, 2**70))
def test_each_epoch_is_a_permutation(count: int, batch_size: int, seed: int) -> None:
    indices = images_of(count, 3 * count, batch_size, seed=seed)
    for epoch in range(3):
        assert sorted(indices[epoch * count : (epoch + 1) * count]) == list(range(count))


@settings(deadline=None)
@given(count=st.integers(1, 40), sizes=st.tuples(st.integers(1, 60), st.integers(1, 60)), start=st.integers(0, 10**12))
def test_resuming_anywhere_gives_the_rest(count: int, sizes: tuple[int, int], start: int) -> None:
    past = start % (3 * count)
    base = start - past
    whole = images_of(count, past + 50, sizes[0], seed=1, start=base)
    assert images_of(count, 50, sizes[1], seed=1, start=start) == whole[past:]  # even with another batch size


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [tuple(InfiniteShuffle(100, 1, seed=seed).permutation(epoch)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    # Frozen: a run must resume in the same order after an upgrade of its packages.
    assert images_of(10, 12, 4, seed=0) == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4, 7, 3]


def test_parts_make_the_batches() -> None:
    """What processes that share a batch load: each its images of the same batches."""
    dataset = open_source("digits")
    whole = loader(dataset, batch_size=12, seed=3, start=1795)
    parts = [loader(dataset, batch_size=12, seed=3, start=1795, part=slice(rank, None, 3)) for rank in range(3)]
    for _ in range(3):
        batch = next(whole)
        for rank, part in enumerate(parts):
            assert torch.equal(next(part), batch[rank::3])


@pytest.mark.parametrize("name", ["count", "batch_size", "seed", "start"])
def test_shuffle_refuses(name: str) -> None:
    values: dict[str, Any] = {"count": 3, "batch_size": 2, "seed": 0, "start": 0} | {name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1; expected"):
        InfiniteShuffle(values["count"], values["batch_size"], seed=values["seed"], start=values["start"])


# Loader -------------------------------------------------------------------------------------------------------------


def test_loader_resumes_and_leaves_the_global_generator_alone() -> None:
    dataset = open_source("digits")
    state = torch.get_rng_state()
    batches = [batch for batch, _ in zip(loader(dataset, batch_size=700, seed=3), range(6), strict=False)]
    assert batches[0].dtype == torch.uint8
    assert batches[0].shape == (700, 1, 8, 8)
    order = InfiniteShuffle(1797, 700, seed=3).permutation(0)
    assert torch.equal(batches[0], everything(dataset)[order[:700]])
    resumed = loader(dataset, batch_size=700, seed=3, start=4 * 700)
    assert torch.equal(next(resumed), batches[4])
    assert torch.equal(next(resumed), batches[5])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet"])
def test_workers_load_the_same_batches(tmp_path: Path, kind: str) -> None:
    files = {f"{seed:02}.png": encoded(picture(seed)) for seed in range(20)}
    path = {
        "folder": lambda: write_folder(tmp_path / "set", files),
        "zip": lambda: write_zip(tmp_path / "set.zip", files),
        "parquet": lambda: write_parquet(tmp_path / "train.parquet", list(files.values())),
    }[kind]()
    cached, decoding = open_source(path), open_source(path, cache="none")
    state = torch.get_rng_state()
    expected = loader(cached, batch_size=6, seed=0, start=5)
    loaded = loader(decoding, batch_size=6, seed=0, start=5, num_workers=2)
    for _ in range(8):
        batch = next(loaded)
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, next(expected))
    assert torch.equal(torch.get_rng_state(), state)


def test_error_in_a_worker_names_the_file(tmp_path: Path) -> None:
    dataset = one_image(tmp_path, encoded(picture(0)), cache="none")
    (tmp_path / "image.png").write_bytes(b"overwritten since")
    with pytest.raises(ValueError, match=r"image\.png cannot be read as an image"):
        next(loader(dataset, batch_size=1, seed=0, num_workers=1))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="only Linux tells who has sent a signal")
def test_signals_do_not_end_workers(tmp_path: Path) -> None:
    """Launchers and terminals send them to the whole group of processes; training has to finish an iteration then."""
    dataset = open_source(write_folder(tmp_path, {"a.png": encoded(picture(0))}), cache="none")
    before = set(multiprocessing.active_children())
    batches = loader(dataset, batch_size=1, seed=0, num_workers=2)
    next(batches), next(batches)  # both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        # The one thread that waits for the signal shows it as blocked, too.
        statuses = [path.read_text() for path in Path(f"/proc/{worker.pid}/task").glob("*/status")]
        masks = [int(status.split("SigBlk:\t")[1].split()[0], 16) for status in statuses]
        waiting = [mask for mask in masks if not mask >> (signal.SIGTERM - 1) & 1]
        assert len(waiting) <= 1, "a thread that a signal would end the worker through"
        for number in (signal.SIGINT, signal.SIGTERM):
            # From another process: `terminate` is from this one.
            subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    for _ in range(8):  # more than each had prepared
        next(batches)
    for worker in workers:  # as at the exit of a program that has not let go of the loader
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0


# Real images --------------------------------------------------------------------------------------------------------


def shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"../shared/data/{name} is not here")
    return SHARED / name


@pytest.mark.slow
def test_cifar10() -> None:
    dataset = open_source(shared("cifar10"))
    images = everything(dataset)
    assert images.shape == (50_000, 3, 32, 32)
    values = torch.arange(256).double()
    for channel, (mean, std) in enumerate([(125.307, 62.993), (122.950, 62.089), (113.865, 66.705)]):
        share = torch.bincount(images[:, channel].flatten(), minlength=256) / (50_000 * 32 * 32)
        measured = (share * values).sum().item()
        assert measured == pytest.approx(mean, abs=1e-3)
        assert (share * (values - measured) ** 2).sum().item() ** 0.5 == pytest.approx(std, abs=1e-3)


def test_cifar10_test_split() -> None:
    dataset = open_source(shared("cifar10"), split="test", cache="none")
    assert len(dataset) == 10_000
    assert dataset[9_999].shape == (3, 32, 32)


def test_photographs() -> None:
    folder = shared("celebahq256-sample")
    dataset = open_source(folder)
    assert (len(dataset), dataset.channels, dataset.resolution) == (56, 3, 256)
    first = sorted(os.listdir(folder))[0]
    assert torch.equal(dataset[0], chw(Image.open(folder / first)))
    assert open_source(folder, resolution=64, channels=1)[55].shape == (1, 64, 64)
