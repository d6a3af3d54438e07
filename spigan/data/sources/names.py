"""Choose the images of a split among the names of the files in a folder or an archive, and count what is left out."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from spigan.data.decode import FORMER_SUFFIXES, IMAGE_SUFFIXES
from spigan.data.sources.base import READING, SPLITS, no_split, split_word
from spigan.files import printable

_NAMED = 5  # files that are left out are named up to this number


class Chosen(NamedTuple):
    """Names of images in sorted order, and the number of other files by a short description of them."""

    images: list[str]
    left_out: dict[str, int]


def choose_images(names: list[str], split: str, where: Path, reading: int = READING) -> Chosen:
    """Choose the images of a split.

    The folders at the top are splits if their names say so, in any case of letters, for example Train, testing or
    val2017. They may lie in a folder that holds everything. Files beside them are left out.

    Args:
        names: names of files, relative to the folder or archive, with forward slashes. Hidden ones are ignored.
        split: name of the split.
        where: the folder or archive, for error messages.
        reading: version of the rules; see `READING`.

    Raises:
        ValueError: if there are no images or no such split, or if it is in doubt which images are meant.
    """
    shown = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    suffixes = FORMER_SUFFIXES if reading == 1 else IMAGE_SUFFIXES
    images = sorted(name for name in shown if name.lower().endswith(suffixes))
    others = Counter(
        PurePosixPath(name).suffix.lower() or "without a suffix"
        for name in shown
        if not name.lower().endswith(suffixes) and not name.endswith("/")
    )
    if not images:
        found = f"; there are {describe(others)}" if others else ""
        raise ValueError(f"{where} has no images in it: expected files named *{', *'.join(suffixes)}{found}")
    if reading == 1:
        return Chosen(_former(images, split, where), {})
    base = _wrapping(images)
    tops: dict[str, list[str]] = {}  # "": images at the top itself
    for name in images:
        folder, slash, _ = name.removeprefix(base).partition("/")
        tops.setdefault(folder if slash else "", []).append(name)
    splits = _splits(tops.keys() - {""})
    beside = [name for folder, inside in tops.items() if folder not in splits for name in inside]
    # One folder called train or test among others is rather a class of that name.
    if not splits or (len(set(splits.values())) == 1 and tops.keys() - splits.keys() - {""}):
        if split != "train":
            raise no_split(where, split, "it has no split folders at its top; pass the folder of images")
        _refuse_inner_splits(images, where)
        return Chosen(images, dict(others))
    if len(beside) * 10 > len(images):
        folders = " and ".join(map(printable, sorted(splits)))
        meant = min((folder for folder in splits if splits[folder] == split_word(split)), default=min(splits))
        raise ValueError(
            f"{where} has the folders {folders}, which may be splits, and {len(beside)} images beside them, such as "
            f"{printable(beside[0])}: pass {where / base / meant} to read only that folder, or move all images "
            "into folders with other names to read all of them"
        )
    return Chosen(_of_split(tops, splits, split, where), dict(others) | named("image beside the splits", beside))


def describe(counts: dict[str, int]) -> str:
    """Return the counts of files as text, such as "3 .txt, 2 without a suffix"."""
    return ", ".join(f"{count} {printable(what)}" for what, count in counts.items())


def named(what: str, names: list[str]) -> dict[str, int]:
    """Return a dict for `Chosen.left_out` that names files, or counts them beyond the first five."""
    counts = {f"{what} ({name})": 1 for name in names[:_NAMED]}
    return counts | ({f"more: {what}": len(names) - _NAMED} if len(names) > _NAMED else {})


def _splits(folders: set[str]) -> dict[str, str]:
    """Return the split of each folder that is named after one: train, or all of train2017, val2017 and the like."""
    named = {folder: word for folder in folders if (word := split_word(folder))}
    if named:
        return named
    found = {folder: {split_word(part) for part in re.split(r"[^a-zA-Z]+", folder)} - {None} for folder in folders}
    spoken = {folder: str(*words) for folder, words in found.items() if len(words) == 1}
    return spoken if len(spoken) == len(folders) and len(set(spoken.values())) > 1 else {}


def _wrapping(images: list[str]) -> str:
    """Return the folder that holds all images and is no split, such as "mydata/", if splits are in it; else ""."""
    base = ""
    while True:
        tops = {folder if slash else "" for folder, slash, _ in (name[len(base) :].partition("/") for name in images)}
        if _splits(tops - {""}):
            return base
        if len(tops) > 1 or "" in tops:
            return ""
        base += f"{tops.pop()}/"


def _refuse_inner_splits(images: list[str], where: Path) -> None:
    """Raise ValueError if folders for training and for tests lie deeper than the top: they might be splits."""
    inside: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in images}:
        parts = folder.split("/")
        for depth, part in enumerate(parts):
            if word := split_word(part):
                inside.setdefault("/".join(parts[:depth]), set()).add(word)
    for folder, words in sorted(inside.items()):
        if len(words) > 1 and "train" in words:
            raise ValueError(
                f"{where} has folders called {' and '.join(sorted(words))} in {printable(folder)}, which may be "
                f"splits: pass {printable(where / folder)} to use them, or rename them to read all images"
            )


def _of_split(tops: dict[str, list[str]], splits: dict[str, str], split: str, where: Path) -> list[str]:
    word = split_word(split)
    found = [folder for folder in splits if splits[folder] == word]
    if split in found and word != "train":
        found = [split]
    if not found:
        raise no_split(
            where, split, f"its folders are {sorted(splits)}; choose one of them, or pass the folder of images"
        )
    if len(found) > 1:
        names = " and ".join(map(printable, sorted(found)))
        raise ValueError(f"{where} has the folders {names}, which may both be the split {split!r}: pass one of them")
    return tops[found[0]]


def _former(images: list[str], split: str, where: Path) -> list[str]:
    """Choose as reading 1 did: folders are splits only if nothing is beside them."""
    tops = {name.split("/")[0] for name in images}
    if tops <= SPLITS:
        images = [name for name in images if name.startswith(f"{split}/")]
    if not images or (split != "train" and not tops <= SPLITS):
        raise no_split(where, split, "the run was begun with an earlier version, which found no such split")
    return images
