"""`spigan evaluate`: which reference images it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

import spigan
from spigan.cli.evaluate import reference_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run on the test split of CIFAR-10, as far as an evaluation looks at it before it measures."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    config = spigan.preset("cifar10", data={"split": "test", "resolution": 32})
    (tmp_path / "run" / "config.json").write_text(config.model_dump_json())
    return tmp_path / "run"


def test_the_reference_is_what_the_run_was_trained_on(folder: Path) -> None:
    kept = {"split": None, "channels": None}
    for model in (folder, folder / "model"):
        reference = reference_config(str(model), None, kept)
        assert (reference.source, reference.split) == ("cifar10", "test")
        assert reference.resolution is None  # the evaluation resizes, by the filter that it records
    assert reference_config(str(folder), None, {"split": "train", "channels": 1}).split == "train"
    assert reference_config(str(folder), "elsewhere", kept) == spigan.DataConfig(source="elsewhere")


def test_without_a_run_the_reference_must_be_given(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a training run, so its training images are unknown: pass --data"):
        reference_config(str(tmp_path), None, {})
