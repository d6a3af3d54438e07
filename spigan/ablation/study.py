"""Train the runs of an ablation study (the paper's section 4.4).

A study is a folder. It contains a run folder for each arm, or for each arm and seed, with finished.json once the run
has finished; `RUN.error.txt` for a run that failed; kept.json, the arms that continued after each value of the budget;
and the report: table.md, table.json and curve.png. A study can be stopped at any time, and `run` resumes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spigan.ablation.grid import Study
from spigan.ablation.jobs import Job, train_at_once, train_in_turn
from spigan.ablation.report import has_ended, last_value, require_matplotlib, write_report
from spigan.config import TrainConfig
from spigan.files import read_json, write_text
from spigan.runs import CHECKPOINTS, CONFIG_FILE, DATA_FILE, REALS_FILE, read_config
from spigan.training.checkpoint import checkpoints

KEPT_FILE = "kept.json"


def run(
    study: Study,
    out: Path,
    *,
    cores: Sequence[int] = (),
    progress: bool = True,
    say: Callable[[str], object] = print,
) -> tuple[list[str], bool]:
    """Train the runs of a study, and update the report after each.

    Finished runs are kept, an interrupted run resumes exactly from its checkpoint, and the others start. If a run
    fails, its traceback is written to `RUN.error.txt` and the next one starts. After each value of the budget but the
    last, the better half of the arms (rounded up) continues, by the mean of the metric over the seeds.

    Args:
        study: the study.
        out: folder of the study.
        cores: numbers of CPU cores. As many runs train at once, each in a process and with one thread on its core.
            Empty: one after another, in this process.
        progress: whether to show a progress bar for each run. Runs that train at once have none.
        say: function called with a line of text when a run starts, is kept, ends or fails.

    Returns:
        The names of the runs that failed, and whether Ctrl-C or SIGTERM stopped the study.

    Raises:
        ValueError: if a folder contains a run whose configuration differs from the grid's. In this case no file has
            been changed.
        ImportError: if matplotlib, for the curve, is not installed.
    """
    require_matplotlib()
    _check_folders(study, out)
    failed: list[str] = []
    arms = list(study.arms)
    for seconds in study.budget or (None,):
        jobs = []
        names = [name for arm in arms for name in study.arms[arm]]
        for number, name in enumerate(names, 1):
            config = study.runs[name].model_copy(update={} if seconds is None else {"total_seconds": seconds})
            job = Job(f"{name} ({number} of {len(names)})", out, name, config)
            if has_ended(out / name, config):
                say(f"{job.title}: already finished, kept")
            else:
                jobs.append(job)

        def report() -> None:
            write_report(study, out)

        if cores:
            now_failed, interrupted = train_at_once(jobs, cores, say, report)
        else:
            now_failed, interrupted = train_in_turn(jobs, progress, say, report)
        failed += now_failed
        if interrupted:
            return failed, True
        if seconds is not None and seconds != study.budget[-1]:
            arms = _keep_better_half(study, out, arms, seconds)
            say(f"After {seconds:g} s, the better half continues: {', '.join(arms)}")
            failed = [name for name in failed if any(name in study.arms[arm] for arm in arms)]
    return failed, False


def _keep_better_half(study: Study, out: Path, arms: list[str], seconds: float) -> list[str]:
    """Return the arms that continue after `seconds`. They are recorded, because their metrics will change."""
    file = out / KEPT_FILE
    record = read_json(file) if file.is_file() else {}
    key = f"{seconds:g}"
    if key not in record:
        sign = 1 if study.better == "lower" else -1
        means = {arm: last_value(study, out, arm) for arm in arms}
        order = sorted(arms, key=lambda arm: (means[arm] is None, sign * (means[arm] or 0.0)))
        record[key] = order[: (len(arms) + 1) // 2]
        write_text(file, json.dumps(record, indent=1) + "\n")
    return [arm for arm in arms if arm in record[key]]


# Files of a run that was killed before its first checkpoint. Names that begin with a dot are half-written files.
_BEFORE_CHECKPOINT = {CONFIG_FILE, DATA_FILE, REALS_FILE, CHECKPOINTS}


def _check_folders(study: Study, out: Path) -> None:
    """Raise ValueError unless every run's folder contains a run with its configuration, or can become one."""
    for name, config in study.runs.items():
        folder = out / name
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
        if found <= {"data.json"}:  # all that a run has which was killed while it began
            continue
        if CONFIG_FILE not in found or (not checkpoints(folder) and found - _BEFORE_CHECKPOINT):
            raise ValueError(
                f"{folder} is neither empty nor a run that can be resumed: choose another --out or remove it"
            )
        old = read_config(folder)
        if study.budget and old.total_seconds in study.budget:  # it has trained for an earlier value
            old = old.model_copy(update={"total_seconds": config.total_seconds})
        if config.precision == "auto":  # chosen when the run began
            config = config.model_copy(update={"precision": old.precision})
        if changed := _differences(old.model_dump(), config.model_dump()):
            raise ValueError(_changed(folder, config, changed))


def _changed(folder: Path, config: TrainConfig, changed: list[tuple[str, Any, Any]]) -> str:
    what = ", ".join(f"{field} {old!r} (now {new!r} in the grid)" for field, old, new in changed)
    advice = "undo the change in the grid file, give the arm another name, or remove the folder to train it again"
    if [field for field, _, _ in changed] == ["total_kimg"]:
        advice += f"; to extend the run: spigan train --resume {folder} --kimg {config.total_kimg:g}"
    return f"{folder} contains a run with {what}: {advice}"


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the fields whose values differ, as (name, old, new)."""
    found = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            found += _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            found.append((prefix + key, old.get(key), new[key]))
    return found
