"""Turn a stored image into pixels: open it safely, check it, and make a square of it."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from spigan.data import limits
from spigan.data.config import DataConfig
from spigan.data.sources.base import Source, UnsuitableImage
from spigan.data.sources.kinds import kind_of
from spigan.files import printable

if TYPE_CHECKING:
    from PIL import Image

FORMER_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")  # see `ImageDataset.reading`
IMAGE_SUFFIXES = (*FORMER_SUFFIXES, ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".dib")
# Pillow's names for the same formats. Pillow must never try others on untrusted data (EPS would start Ghostscript).
PILLOW_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")

CHANNELS_ADVICE = "set channels=3 (or 1) to convert all images (--channels 3; spigan train: --set data.channels=3)"


class ImageReader:
    """Reads the images of a source as squares. Every error names the image.

    Attributes:
        source: where the images are stored.
        config: how to turn them into squares.
        resolution: side of the squares in pixels. None: as stored.
        channels: 1 or 3. None: as stored.
    """

    def __init__(self, source: Source, config: DataConfig) -> None:
        self.source, self.config = source, config
        self.resolution: int | None = config.resolution
        self.channels: int | None = config.channels

    def require_like(self, first: Image.Image) -> tuple[int, int]:
        """Require the size and channels of an image of all others, unless the configuration sets them.

        Returns:
            The resolution and channels of the squares from now on.
        """
        self.resolution = resolution = self.config.resolution or min(first.size)
        self.channels = channels = self.config.channels or channels_of(first)
        return resolution, channels

    def name(self, index: int) -> str:
        """Return the name of image `index`, with everything escaped that a terminal would not show."""
        return printable(self.source.name(index))

    @contextmanager
    def opened(self, index: int) -> Iterator[Image.Image]:
        """Open image `index` and check its header. Its pixels are not decoded yet.

        Raises:
            ValueError: if the image is unsuitable or damaged, even if this is only found within the `with` block.
        """
        try:
            with self.source.open(index) as image:
                self._check(image)
                yield image
        except UnsuitableImage as error:
            raise ValueError(f"{self.name(index)} {error}") from None
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error and more
            raise ValueError(
                f"{self.name(index)} cannot be read as an image ({_cause(error)}): repair or remove it"
            ) from error

    def read(self, index: int, out: np.ndarray) -> tuple[int, int]:
        """Decode image `index` into `out`, uint8 [C, H, W]. Return its stored width and height.

        Raises:
            ValueError: see `opened`.
        """
        with self.opened(index) as image:
            size = image.size
            pixels = np.asarray(self.square(image))
            out[:] = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels
        return size

    def stored_size(self, index: int) -> tuple[int, int]:
        """Return the stored width and height of image `index`, without decoding it.

        Raises:
            ValueError: see `opened`.
        """
        with self.opened(index) as image:
            return image.size

    def decoded_size(self, index: int) -> tuple[int, int]:
        """Decode image `index`, and return its stored width and height.

        Raises:
            ValueError: see `opened`.
        """
        with self.opened(index) as image:
            size = image.size
            self.square(image)
            return size

    def square(self, image: Image.Image) -> Image.Image:
        """Turn an image upright, convert it to `channels`, crop its centre and resize it to `resolution`."""
        from PIL import Image, ImageOps

        try:
            ImageOps.exif_transpose(image, in_place=True)
        except Exception:  # damaged EXIF says nothing about the orientation, but the pixels may be good
            image.load()  # raises if they are not
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        mode = "L" if self.channels == 1 else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        side = min(image.size)
        if image.size != (side, side):
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if self.resolution is not None and side != self.resolution:
            image = image.resize((self.resolution,) * 2, Image.Resampling[self.config.resize.upper()])
        return image

    def _check(self, image: Image.Image) -> None:
        width, height = image.size
        if width * height > limits.MAX_PIXELS:
            raise UnsuitableImage(
                f"has {width} x {height} pixels; at most {limits.MAX_PIXELS} are accepted: make it smaller"
            )
        # A camera's MPO is a photograph, followed by a second view or a preview.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise UnsuitableImage("holds several frames; expected one image: save the frames as files, or remove it")
        # Pillow silently opens 16-bit RGB as 8-bit RGB, but the decoder's raw mode ("RGB;16B") reveals it.
        if image.mode[0] in "IF" or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
            raise UnsuitableImage(
                "has more than 8 bits per channel; expected 8: convert it first and choose how to scale the values"
            )
        if self.config.channels is None:
            self._check_channels(image)
        if self.config.crop == "none" and width != height:
            raise UnsuitableImage(f'has {width} x {height} pixels, not a square: use crop="center", or crop it first')
        if self.config.resolution is None and self.resolution not in (None, min(width, height)):
            raise UnsuitableImage(
                f"has {width} x {height} pixels, but {self.name(0)} makes a square of {self.resolution}: set "
                "resolution to resize all images"
            )

    def _check_channels(self, image: Image.Image) -> None:
        if image.has_transparency_data and not _opaque(image):
            raise UnsuitableImage(f"has an alpha channel: {CHANNELS_ADVICE}, with transparent areas on white")
        found = channels_of(image)
        if self.channels is not None and self.channels != found:
            kinds = {1: "grey", 3: "RGB"}
            raise UnsuitableImage(f"is {kinds[found]}, but {self.name(0)} is {kinds[self.channels]}: {CHANNELS_ADVICE}")


def _opaque(image: Image.Image) -> bool:
    """Return whether an image with an alpha channel or a transparent colour has no transparent pixel. Decodes it."""
    return image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def _cause(error: Exception) -> str:
    """Describe an error of Pillow without the addresses of objects that its messages contain."""
    text = re.sub(r"\s*<[^<>]*>", "", str(error)).strip()
    if "MAX_TEXT" in text:
        text = "its metadata exceed what Pillow accepts; save it without them"
    return f"{type(error).__name__}: {text}"


def channels_of(image: Image.Image) -> int:
    """Return the number of channels of a stored image: 1 for grey, otherwise 3."""
    return 1 if image.mode in ("1", "L", "LA") else 3


def open_image(file: Path | io.BytesIO | io.BufferedReader) -> Image.Image:
    """Open an encoded image from an untrusted file. Only its header is read.

    Args:
        file: path of the file, or its contents.

    Raises:
        UnsuitableImage: if `file` is a pipe or a device, or its contents are not those of an image in one of
            `PILLOW_FORMATS`.
        Exception: if the image is damaged. Pillow raises many types of errors.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(file, Path):
        if file.exists() and not file.is_file():  # opening a pipe would wait forever
            raise UnsuitableImage("is not a regular file: remove it")
        if not file.exists() and file.is_symlink():
            target = printable(os.readlink(file))
            raise UnsuitableImage(f"is a link to {target}, which is not there: remove it, or mount the disk")
        file = _File(file)
    try:
        return Image.open(file, formats=PILLOW_FORMATS)
    except UnidentifiedImageError:
        file.seek(0)
        kind, advice = kind_of(file.read(64))
        raise UnsuitableImage(
            f"cannot be read as an image ({kind}; expected {', '.join(PILLOW_FORMATS)}): {advice}"
        ) from None


def check_size(size: int, has: str = "has") -> None:
    """Raise UnsuitableImage if an encoded image has more bytes than any image within `limits.MAX_PIXELS` needs."""
    most = 4 * limits.MAX_PIXELS
    if size > most:
        raise UnsuitableImage(f"{has} {size} bytes; at most {most} are accepted: make it smaller")


class _File(io.BufferedReader):
    """A file whose reads never allocate more than the size of the file, no matter what length a header claims."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self._size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None else min(size, self._size))

    def __del__(self) -> None:
        if hasattr(self, "_size"):  # Pillow only closes files that it opened itself; it just drops this one
            self.close()
