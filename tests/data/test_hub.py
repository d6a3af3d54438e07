"""Data sets of the Hugging Face Hub, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import FILES, STACKED, everything, open_source, write_folder


def test_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    file = write_folder(tmp_path, {"a.png": FILES["a.png"]}) / "a.png"
    rows = [{"bytes": FILES["z.bmp"], "path": None}, {"bytes": None, "path": str(file)}]
    table = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    asked: list[tuple[str, ...]] = []

    def load_dataset(*name: str, split: str) -> Any:
        asked.append((*name, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = open_source("someone/faces", split="valid")
    assert (dataset.name, asked) == ("faces", [("someone/faces", "valid")])
    assert torch.equal(everything(dataset), STACKED[[2, 0]])
    open_source("cifar10")
    assert asked[1] == ("uoft-cs/cifar10", "train")
    open_source("someone/faces:small")
    assert asked[2] == ("someone/faces", "small", "train")


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


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_is_not_a_missing_data_set(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, split: str) -> Any:
        full = OSError(28, "No space left on device")
        if not wrapped:
            raise full
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from full

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"'someone/faces'.*could not be stored.*No space left") as raised:
        open_source("someone/faces")
    assert type(raised.value) is OSError
