"""spigan.ops.plans: what is measured and chosen, how it is kept, and files that are not trusted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spigan.files import MAX_TEXT
from spigan.ops import plans

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache, empty. Nothing is known."""
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plans, "_known", {})
    monkeypatch.setattr(plans, "decisions", {})
    return tmp_path / "cache" / "plans"


class Candidates(dict[str, Callable[[], Callable[[], object]]]):
    """Candidates with given times in seconds; an exception instead of a time is raised. Counts what is prepared."""

    def __init__(self, **times: float | Exception) -> None:
        super().__init__({name: lambda name=name: self.prepare(name) for name in times})
        self.times, self.prepared = times, []

    def prepare(self, name: str) -> Callable[[], object]:
        self.prepared.append(name)

        def function() -> None:
            if isinstance(self.times[name], Exception):
                raise self.times[name]  # type: ignore[misc]

        function.seconds = self.times[name]  # type: ignore[attr-defined]
        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Calls of `seconds_per_call`, as (seconds, calls), which answers with the times of `Candidates`."""
    measured = []

    def seconds_per_call(function: Any, calls: int, device: torch.device) -> float:
        measured.append((function.seconds, calls))
        return function.seconds  # type: ignore[no-any-return]

    monkeypatch.setattr(plans, "seconds_per_call", seconds_per_call)
    return measured


def test_the_fastest_is_chosen_and_kept(clock: list[Any], folder: Path) -> None:
    candidates = Candidates(fixed=3e-4, fast=1e-4, slow=1e-2)
    assert plans.choose("a layer", CPU, candidates) == "fast"
    assert candidates.prepared == ["fixed", "fast", "slow"]
    # One call to estimate, then three rounds of about a millisecond, and at least one call.
    assert clock == [(3e-4, 1), (1e-4, 1), (1e-2, 1)] + 3 * [(3e-4, 3), (1e-4, 10), (1e-2, 1)]
    assert plans.choose("a layer", CPU, candidates) == "fast"
    plans.decisions["derived"] = "fast"
    plans.forget()  # as in another process
    assert not plans.decisions
    assert plans.choose("a layer", CPU, candidates) == "fast"
    assert len(candidates.prepared) == 3
    assert plans.choose("another layer", CPU, candidates) == "fast"
    assert len(candidates.prepared) == 6
    (path,) = folder.iterdir()
    assert plans.saved_plans(CPU)[0] == path
    assert json.loads(path.read_text())["plans"]["a layer"] == {
        "chosen": "fast",
        "milliseconds": {"fixed": 0.3, "fast": 0.1, "slow": 10.0},
    }


def test_the_fixed_choice_stays_unless_another_is_clearly_faster(clock: list[Any]) -> None:
    assert plans.choose("a", CPU, Candidates(fixed=1.0, other=0.96)) == "fixed"
    assert plans.choose("b", CPU, Candidates(fixed=1.0, other=0.94)) == "other"


def test_other_candidates_are_measured_again(clock: list[Any]) -> None:
    assert plans.choose("a", CPU, Candidates(fixed=1.0, other=0.5)) == "other"
    assert plans.choose("a", CPU, Candidates(fixed=1.0, new=0.25)) == "new"
    assert plans.choose("a", CPU, Candidates(fixed=1.0)) == "fixed"


def test_a_candidate_that_fails_is_left_out(clock: list[Any]) -> None:
    candidates = Candidates(fixed=1.0, broken=RuntimeError("does not compile"), other=0.5)
    assert plans.choose("a", CPU, candidates) == "other"
    assert plans.saved_plans(CPU)[1]["a"].milliseconds == {"fixed": 1e3, "broken": None, "other": 500.0}
    plans.forget()
    plans.choose("a", CPU, candidates)
    assert len(candidates.prepared) == 3
    with pytest.raises(RuntimeError, match="does not compile"):  # the layer itself cannot run
        plans.choose("b", CPU, Candidates(fixed=RuntimeError("does not compile"), other=0.5))


def test_a_lack_of_memory_is_not_saved(clock: list[Any]) -> None:
    candidates = Candidates(fixed=1.0, large=torch.OutOfMemoryError("out of memory"))
    for _ in range(2):
        assert plans.choose("a", CPU, candidates) == "fixed"
    assert len(candidates.prepared) == 2 and not plans.saved_plans(CPU)[1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: "\xff" * 10,
        lambda content: " " * (MAX_TEXT + 1),
        lambda content: json.dumps(content | {"made_on": {"device": "another GPU"}}),
        lambda content: json.dumps(content | {"made_on": content["made_on"] | {"torch": "1.0"}}),
        lambda content: json.dumps(content | {"plans": [1]}),
        lambda content: json.dumps(content | {"plans": {"a": {"chosen": "fixed"}}}),
        lambda content: json.dumps(content | {"plans": {"a": {"chosen": "gone", "milliseconds": {"fixed": 1.0}}}}),
        lambda content: json.dumps(content | {"plans": {"a": {"chosen": "fixed", "milliseconds": {"fixed": "1"}}}}),
        lambda content: json.dumps(
            content | {"plans": {"a": {"chosen": "fixed", "milliseconds": {"fixed": float("nan")}}}}
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning(
    damage: Callable[[Any], str], clock: list[Any], folder: Path
) -> None:
    plans.choose("a", CPU, Candidates(fixed=1.0, other=0.5))
    (path,) = folder.iterdir()
    path.write_text(damage(json.loads(path.read_text())), encoding="latin-1")
    plans.forget()
    with pytest.warns(UserWarning, match="is ignored .* measured again") as caught:
        assert plans.choose("a", CPU, Candidates(fixed=0.5, other=1.0)) == "fixed"
    assert len(caught) == 1
    assert [*plans.saved_plans(CPU)[1]] == ["a"]  # the file is sound again


def test_files_of_several_processes_are_merged_and_bounded(clock: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = Candidates(fixed=1.0, other=0.5)
    plans.choose("of one process", CPU, candidates)
    monkeypatch.setattr(plans, "_known", {(CPU, torch.get_num_threads()): {}})  # of another, which began before
    plans.choose("of another", CPU, candidates)
    assert [*plans.saved_plans(CPU)[1]] == ["of one process", "of another"]
    monkeypatch.setattr(plans, "MAX_PLANS", 2)
    plans.choose("newest", CPU, candidates)
    assert [*plans.saved_plans(CPU)[1]] == ["of another", "newest"]


def test_a_folder_that_cannot_be_written(clock: list[Any], folder: Path) -> None:
    folder.parent.write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written .* set SPIGAN_CACHE"):
        assert plans.choose("a", CPU, Candidates(fixed=1.0, other=0.5)) == "other"


def test_plans_of_another_device_version_or_number_of_threads_have_their_own_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = plans.describe_device(CPU)
    assert here["torch"] == torch.__version__ and str(torch.get_num_threads()) in here["device"]
    paths = {plans.plan_file(here | change) for change in ({}, {"torch": "1"}, {"device": "x"}, {"spigan": "0"})}
    assert len(paths) == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert plans.plan_file(plans.describe_device(CPU)) not in paths


def test_nothing_is_measured_while_a_graph_is_captured(clock: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, capturing = torch.device("cuda:0"), [True]
    monkeypatch.setattr(plans, "describe_device", lambda device: {"device": "a GPU"})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    candidates = Candidates(fixed=1.0, other=0.5)
    assert plans.choose("a", cuda, candidates) is None and not candidates.prepared
    capturing[0] = False
    assert plans.choose("a", cuda, candidates) == "other"
    capturing[0] = True
    assert plans.choose("a", cuda, candidates) == "other"


@pytest.mark.parametrize(
    ("setting", "device", "kept", "expected"),
    [
        (None, "cpu", True, False),  # images of a seed do not change on a CPU
        (None, "cuda", True, True),
        (None, "cuda", False, False),  # training
        ("", "cuda", True, True),
        ("0", "cuda", True, False),
        ("1", "cpu", True, True),
        ("1", "cuda", False, True),
    ],
)
def test_where_plans_are_made(
    setting: str | None, device: str, kept: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPIGAN_AUTOTUNE")
    if setting is not None:
        monkeypatch.setenv("SPIGAN_AUTOTUNE", setting)
    assert plans.measures(torch.device(device), kept) == expected
    torch.use_deterministic_algorithms(True)
    try:
        assert not plans.measures(torch.device(device), kept)
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_unknown_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIGAN_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"SPIGAN_AUTOTUNE must be 0 .* or 1 .*, got 'yes'"):
        plans.measures(CPU, True)


def test_real_times() -> None:
    candidates = {"sleeps": lambda: lambda: time.sleep(2e-2), "does nothing": lambda: lambda: None}
    assert plans.choose("a", CPU, candidates) == "does nothing"


def test_report(clock: list[Any], folder: Path) -> None:
    assert "plans on cpu (" in plans.report() and "none yet: sampling makes them if SPIGAN_AUTOTUNE=1" in plans.report()
    plans.choose("a layer", CPU, Candidates(fixed=1.0, fast=0.5, broken=RuntimeError("no")))
    lines = [line.split() for line in plans.report().splitlines()]
    assert lines[1:5] == [
        ["a", "layer"], ["fixed", "1000", "ms"], ["*", "fast", "500", "ms"], ["broken", "cannot", "run"],
    ]  # fmt: skip
    described = json.loads(json.dumps(plans.describe()))["cpu"]
    assert described["plans"]["a layer"]["chosen"] == "fast"
    assert [str(path) for path in folder.iterdir()] == [described["file"]]
