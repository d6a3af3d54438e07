"""Data sets from the Hugging Face Hub."""

from __future__ import annotations

from spigan.data.sources.base import require
from spigan.data.sources.parquet import RowSource, image_column

CIFAR10 = "uoft-cs/cifar10"


def open_hub(identifier: str, split: str, column: str | None, configuration: str | None = None) -> RowSource:
    """Download a data set from the Hub, unless it is in the cache of `datasets`, and open its images.

    Args:
        identifier: "owner/name".
        split: name of the split for `datasets`, such as "train" or "train[:10%]".
        column: name of the column of images. None: the only one.
        configuration: name of the configuration. None: the only one, or the default.

    Raises:
        FileNotFoundError: if the data set does not exist, or the network cannot be reached.
        ModuleNotFoundError: if `datasets` is not installed.
        OSError: if the data set cannot be stored, for example because the disk is full.
        ValueError: if the split or column does not exist, or the split has no rows.
    """
    datasets = require("datasets", "datasets")
    name = (identifier, configuration) if configuration else (identifier,)
    try:
        rows = datasets.load_dataset(*name, split=split).with_format("arrow")[:]
    except Exception as error:  # no network, no such dataset, no such split: the Hub's clients raise many kinds
        # Errors of the network are subclasses of OSError. `datasets` wraps errors that occur while it writes files.
        if any(type(found) in (OSError, PermissionError) for found in (error, error.__cause__)):
            raise OSError(
                f"{identifier!r}, split {split!r}, could not be stored ({error.__cause__ or error}): free some space, "
                "or set HF_HOME to a folder on another disk"
            ) from error
        advice = (
            "check the name and split (owner/name:configuration names one of several configurations), or pass a local "
            "path: a folder of images, a zip file or a folder of parquet files"
        )
        if identifier == CIFAR10:
            advice = (
                "pass a local path as source: cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, "
                "or a folder of the parquet files of https://huggingface.co/datasets/uoft-cs/cifar10"
            )
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(
            f"{identifier!r}, split {split!r}, is not a local path and could not be loaded from the Hugging Face Hub "
            f"({type(error).__name__}: {error}): {advice}"
        ) from error
    images = image_column(rows.schema, column, identifier)
    if not len(rows):
        raise ValueError(f"{identifier}, split {split!r}, has no rows: expected images")
    # Data sets that consist of single image files are downloaded as files, and their rows hold paths.
    return RowSource([(identifier, rows.column(images))], open_paths=True)
