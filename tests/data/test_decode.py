"""How a stored image becomes a square of bytes, and which images are refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import chw, encoded, one_image, open_source, picture, write_folder
from PIL import Image, ImageOps, PngImagePlugin


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
    "rgba": (encoded(picture(0, mode="RGBA")), {}, "alpha channel: set channels=3"),
    "palette": (encoded(picture(0).quantize(16), transparency=3), {}, "alpha channel: set channels=3"),
    "grey": (encoded(picture(0, mode="L")), {}, r"is grey, but .*a\.png is RGB: set channels=3"),
    "size": (encoded(picture(0, (9, 9))), {}, r"has 9 x 9 pixels, but .*a\.png makes a square of 8: set resolution"),
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


def test_truncated_image_is_named_when_decoded(tmp_path: Path) -> None:
    data = encoded(picture(0, (64, 64)), "JPEG")[:-500]
    with pytest.raises(ValueError, match=r"image\.jpg cannot be read as an image \(OSError: image file is truncated"):
        one_image(tmp_path, data, "jpg")
    dataset = one_image(tmp_path, data, "jpg", cache="none")  # its header is fine
    with pytest.raises(ValueError, match=r"image\.jpg cannot be read"):
        dataset[0]


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_damaged_exif_is_ignored(tmp_path: Path, kind: str) -> None:
    good = encoded(picture(0), kind)
    data = encoded(picture(0), kind, exif=b"Exif\0\0this is no tiff header")
    assert torch.equal(one_image(tmp_path, data)[0], chw(Image.open(io.BytesIO(good)).convert("RGB")))
    broken = encoded(picture(0, (64, 64)), "JPEG", exif=b"Exif\0\0this is no tiff header")[:-500]
    with pytest.raises(ValueError, match="image file is truncated"):
        one_image(tmp_path, broken)


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("P", 3)])
@pytest.mark.parametrize("cache", ["memory", "none"])
def test_alpha_that_is_opaque_everywhere_is_dropped(tmp_path: Path, mode: str, channels: int, cache: str) -> None:
    image = picture(0).convert("L" if mode == "LA" else "RGB")
    options: dict[str, Any] = {}
    if mode == "P":
        image = image.quantize(16)
        options["transparency"] = 200  # a colour that no pixel has
    stored = image if mode == "P" else image.convert(mode)
    dataset = one_image(tmp_path, encoded(stored, **options), cache=cache)
    assert dataset.channels == channels
    assert torch.equal(dataset[0], chw(image.convert("RGB") if mode == "P" else image))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x20ftypavif", "it is AVIF; expected PNG, JPEG, WEBP, BMP, GIF, TIFF): convert or remove it"),
        (b"\0\0\0\x18ftypheic", "it is HEIC"),
        (b"<!DOCTYPE html><html>", "it is a page in HTML; .*): download it again"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a pointer of Git LFS; .*): run `git lfs pull`"),
        (b"\x89PNG\r\n\x1a\n", "it is damaged; .*): repair or remove it"),
        (b"", "it is empty"),
        (b"some text", "its contents are of no known format"),
    ],
)
def test_the_error_says_what_the_file_is(tmp_path: Path, data: bytes, what: str) -> None:
    with pytest.raises(
        ValueError, match=rf"image\.jpg cannot be read as an image \({what.replace(')', chr(92) + ')')}"
    ):
        one_image(tmp_path, data, "jpg")


def test_errors_have_no_addresses(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    for data in (encoded(picture(0), pnginfo=text), encoded(picture(0))[:40], b"?"):
        with pytest.raises(ValueError, match=r"image\.png") as caught:
            one_image(tmp_path, data)
        assert " at 0x" not in str(caught.value) and "<" not in str(caught.value)
    with pytest.raises(ValueError, match="its metadata exceed what Pillow accepts; save it without them"):
        one_image(tmp_path, encoded(picture(0), pnginfo=text))
