"""Names that somebody gives: of models, data, feature networks, grids, presets."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from fuzz_strategies import cases, texts
from fuzz_targets import TINY, Fault, attempt, fresh, model_files
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from spigan import SPIGAN, DataConfig
from spigan.ablation.grid import grid_path, read_grid
from spigan.cli import app
from spigan.data import open_dataset
from spigan.evaluation.features import load_features
from spigan.presets import preset
from spigan.training.trainer import Trainer

PIECES = ["user", "name", "..", ".", "", "~", "~root", "~nobody-at-all", "models--user--name", "a" * 200, "a\0b"]
PIECES += [
    "x" * 3000,
    "\x1b[31m",
    "\n",
    " ",
    "%2e%2e",
    "é",
    "\ud800",
    "-x",
    "@",
    "refs",
    "https:",
    "main",
    "../../../planted",
]
names = st.one_of(
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("/".join),
    st.builds(
        "{}@{}".format,
        st.sampled_from(["user/name", "user/..", "../x"]),
        st.lists(st.sampled_from(PIECES), max_size=5).map("/".join),
    ),
    texts,
)


def planted(folder: Path) -> None:
    for name, content in model_files().items():
        (folder / name).write_bytes(content)


@cases(40)
@given(names, st.one_of(st.none(), st.lists(st.sampled_from(PIECES), max_size=3).map("/".join)))
@example("user/name@../../../planted", None)
@example("user/name", "../../../planted")
def test_names_of_models(name: str, revision: str | None) -> None:
    """Whatever leads out of the cache of the hub leads to nothing: a model lies there, and a file that names it."""
    folder = fresh("case")
    cache = folder / "cache"
    snapshots = cache / "models--user--name" / "snapshots"
    snapshots.mkdir(parents=True)
    (cache / "models--user--name" / "refs").mkdir()
    (folder / "planted").write_text("../../../outside")
    (folder / "outside").mkdir()
    planted(folder / "outside")
    before = sorted(folder.rglob("*"))

    def read() -> None:
        SPIGAN.from_pretrained(name, revision=revision, cache_dir=cache, local_files_only=True)

    if attempt("name of a model", read):
        raise Fault(f"{name!r}, revision {revision!r}, is a model")
    assert [path for path in sorted(folder.rglob("*")) if ".locks" not in str(path)] == before


def test_a_model_in_the_cache_is_found() -> None:
    """Else the test above would say nothing."""
    cache = fresh("case") / "cache"
    snapshot = cache / "models--user--name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    planted(snapshot)
    refs = cache / "models--user--name" / "refs"
    (refs / "refs" / "pr").mkdir(parents=True)
    for revision in ("main", "v1.0", "refs/pr/1"):
        (refs / revision).write_text(snapshot.name)
    for name in ("user/name", "user/name@v1.0", "user/name@refs/pr/1", f"user/name@{snapshot.name}"):
        assert SPIGAN.from_pretrained(name, cache_dir=cache, local_files_only=True).config.dim_h == TINY["dim_h"]


@pytest.mark.parametrize(
    "revision", ["../../../../planted", "..", "a/../../b", "a//b", ".x", "a/.x", "/etc/x", "a b", "a\nb", "~", "a^"]
)
def test_revisions_that_are_none(revision: str) -> None:
    for given_, keyword in ((f"user/name@{revision}", None), ("user/name", revision)):
        with pytest.raises(ValueError, match="cannot be the name of a branch"):
            SPIGAN.from_pretrained(given_, revision=keyword, local_files_only=True)


@cases(30)
@given(names)
def test_names_of_data(name: str) -> None:
    asked = []

    def load_dataset(identifier: str, **options: Any) -> None:
        asked.append(identifier)
        raise ConnectionError("nothing is asked here")

    kept, datasets.load_dataset = datasets.load_dataset, load_dataset
    try:
        attempt("name of data", lambda: open_dataset(DataConfig(source=name), progress=False))
    finally:
        datasets.load_dataset = kept
    assert all(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", identifier) for identifier in asked)


@cases(30)
@given(names, st.sampled_from(["", "inception=", "Name=", "cifar10-resnet56="]))
def test_names_of_files(name: str, start: str) -> None:
    """None of them is there, or is a folder."""
    for kind, read in (
        ("feature network", lambda: load_features(start + name)),
        ("name of a grid", lambda: read_grid(grid_path(name))),
        ("name of a preset", lambda: preset(name, data={"source": "digits"})),
        ("name of a run", lambda: Trainer.resume(name)),
    ):
        if attempt(kind, read):
            raise Fault(f"{kind} {name!r} exists")


def test_control_characters_do_not_reach_a_terminal() -> None:
    name = "run\x1b]0;owned\x07\x1b[2J"
    result = CliRunner().invoke(app, ["train", "--resume", name])
    assert result.exit_code and r"run\x1b]0;owned\x07\x1b[2J is not a run folder" in result.output
    assert "\x1b]" not in result.output and "\x07" not in result.output


def test_no_file_was_left() -> None:
    assert not [path for path in Path().iterdir() if path.name.startswith(("models--", "datasets--", "planted"))]
    shutil.rmtree(fresh("case"))
