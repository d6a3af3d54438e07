"""`DataConfig`: which images to use, and how to turn them into squares of one size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from spigan.files import printable


class DataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which images to use, and how to turn them into squares of one size."""

    source: str = Field(
        min_length=1,
        description='"digits" (bundled with scikit-learn), "cifar10" (from the Hugging Face Hub), a path, or a Hub '
        'dataset id such as "uoft-cs/cifar10" or "owner/name:configuration". A path can be a folder or zip file of '
        "images, a parquet file or a folder of them, an LMDB folder (as LSUN uses) or a folder of them, a tar file or "
        "a folder of them (as WebDataset uses), cifar-10-python.tar.gz, or its extracted folder. To use a local folder "
        'called "digits", write "./digits".',
    )
    split: str = Field(
        "train",
        min_length=1,
        description="Part of the source to use. For parquet and tar files, the file names give the split "
        "(train-00000-of-00003.parquet, train-000000.tar). For a folder or zip file of images, the top-level folders "
        "do, if they are called train, training, test, testing, val, valid, validation or dev, in any case of letters; "
        "they may lie in one folder that holds everything. A folder of LMDB folders is split by their names. CIFAR-10 "
        "and Hub datasets have their own splits. All other sources only have train.",
    )
    resolution: int | None = Field(
        None,
        gt=0,
        description="Side of the square images in pixels. None: as stored; all images must then have the same size.",
    )
    channels: Literal[1, 3] | None = Field(
        None,
        description="1 (grey) or 3 (RGB): convert every image, with transparent areas on white. None: as stored; all "
        "images must then have the same channels, without transparent areas. Palette images count as RGB.",
    )
    resize: Literal["lanczos", "bicubic", "bilinear", "box", "nearest"] = Field(
        "lanczos", description="Pillow filter (antialiased) for images that do not have the resolution already."
    )
    crop: Literal["center", "none"] = Field(
        "center",
        description="center: crop the largest centered square before resizing. none: an image that is not square is "
        "an error.",
    )
    column: str | None = Field(
        None,
        description="Column of the images in parquet files and Hub datasets. In tar files: the extension of the "
        "images, which is everything after the first dot of the member's name. In LMDB folders that hold every image "
        "in several sizes: the size. None: the only one, or the size that fits.",
    )
    cache: Literal["auto", "memory", "none"] = Field(
        "auto",
        description="memory: decode every image once and keep the pixels. none: check every header once and decode "
        "on demand. auto: memory if the pixels take at most 2 GiB, otherwise none.",
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Number of processes that decode images in training and evaluation, if the pixels are not kept in "
        "memory. The number does not change the images. 0: decode in the process itself. None: one per CPU core, at "
        "most 8; a container's limit of CPU time counts.",
    )
    check: bool = Field(
        False, description="Decode every image at the start, so that a damaged one is found before training begins."
    )
    skip: bool = Field(
        False,
        description="Decode every image at the start and leave out those that cannot be used. A run records which, and "
        "leaves out the same ones when it resumes.",
    )


def source_name(config: DataConfig) -> str:
    """Return a short name of the source for titles and file names: the last part of its path, without suffix."""
    return printable(re.sub(r"\.(zip|parquet|tar|tar\.gz|tgz)$", "", Path(config.source).resolve().name))
