"""Train the arms of an ablation study (the paper's section 4.4), one after another.

A study is a folder. It contains a run folder for each arm, with finished.json once the arm has finished;
`ARM.error.txt` for an arm that failed; and the report: table.md, table.json and curve.png. A study can be stopped at
any time, and `run` resumes it.
"""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spigan.ablation.grid import Study
from spigan.ablation.report import end_file, error_file, has_ended, require_matplotlib, write_report
from spigan.config import TrainConfig
from spigan.files import write_text
from spigan.runs import CHECKPOINTS, CONFIG_FILE, DATA_FILE, REALS_FILE, read_config
from spigan.training.checkpoint import checkpoints
from spigan.training.trainer import Trainer


def run(
    study: Study, out: Path, *, progress: bool = True, say: Callable[[str], object] = print
) -> tuple[list[str], bool]:
    """Train the arms one after another, and update the report after each arm.

    Finished arms are kept, an interrupted arm resumes exactly from its checkpoint, and the other arms start. If an arm
    fails, its traceback is written to `ARM.error.txt` and the next arm runs.

    Args:
        study: the study.
        out: folder of the study.
        progress: whether to show a progress bar for each arm.
        say: function called with a line of text when an arm starts, is kept or fails.

    Returns:
        The names of the arms that failed, and whether Ctrl-C or SIGTERM stopped the study.

    Raises:
        ValueError: if a folder contains a run whose configuration differs from the grid's. In this case no file has
            been changed.
        ImportError: if matplotlib, for the curve, is not installed.
    """
    require_matplotlib()
    _check_folders(study, out)
    failed: list[str] = []
    for number, (name, config) in enumerate(study.arms.items(), 1):
        title = f"{name} ({number} of {len(study.arms)})"
        if has_ended(out / name, config):
            say(f"{title}: already finished, kept")
            continue
        say(f"{title}: {config.total_kimg:g} kimg, K = {config.intervals}")
        failure = error_file(out, name)
        failure.unlink(missing_ok=True)
        interrupted = False
        try:
            interrupted = _train(out, name, config, progress)
        except Exception as error:  # whatever it is, it must not stop the next arms
            failed.append(name)
            out.mkdir(parents=True, exist_ok=True)
            write_text(failure, f"{_first_line(error)}\n\n{traceback.format_exc()}")
            say(f"{title}: failed: {_first_line(error)} (traceback: {failure})")
        write_report(study, out)
        if interrupted:
            return failed, True
    return failed, False


def _train(out: Path, name: str, config: TrainConfig, progress: bool) -> bool:
    """Start or resume an arm. Return whether a signal stopped it."""
    folder = out / name
    if checkpoints(folder):
        trainer = Trainer.resume(folder, progress=progress)
    else:
        if folder.exists():
            shutil.rmtree(folder)  # `_check_folders` has checked its contents
        trainer = Trainer(config, folder, progress=progress)
    trainer.fit()
    if not trainer.interrupted:
        # The last checkpoint is not enough: the run may have been killed before it exported the model.
        write_text(end_file(folder), json.dumps({"total_kimg": config.total_kimg}) + "\n")
    return trainer.interrupted


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Files of a run that was killed before its first checkpoint. Names that begin with a dot are half-written files.
_BEFORE_CHECKPOINT = {CONFIG_FILE, DATA_FILE, REALS_FILE, CHECKPOINTS}


def _check_folders(study: Study, out: Path) -> None:
    """Raise ValueError unless every arm's folder contains a run with the arm's configuration, or can become one."""
    for name, config in study.arms.items():
        folder = out / name
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
        if found <= {"data.json"}:  # all that a run has which was killed while it began
            continue
        if CONFIG_FILE not in found or (not checkpoints(folder) and found - _BEFORE_CHECKPOINT):
            raise ValueError(
                f"{folder} is neither empty nor a run that can be resumed: choose another --out or remove it"
            )
        begun = read_config(folder)
        if config.precision == "auto":  # chosen when the run began
            config = config.model_copy(update={"precision": begun.precision})
        if changed := _differences(begun.model_dump(), config.model_dump()):
            what = ", ".join(f"{field} {old!r} (now {new!r} in the grid)" for field, old, new in changed)
            advice = (
                "undo the change in the grid file, give the arm another name, or remove the folder to train it again"
            )
            if [field for field, _, _ in changed] == ["total_kimg"]:
                advice += f"; to extend the run: spigan train --resume {folder} --kimg {config.total_kimg:g}"
            raise ValueError(f"{folder} contains a run with {what}: {advice}")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return the fields whose values differ, as (name, old, new)."""
    found = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            found += _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            found.append((prefix + key, old.get(key), new[key]))
    return found
