"""The run folder: its name, whether it can be used, and errors when writing to it."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from spigan.training.checkpoint import newest_checkpoint


def next_run_dir(parent: Path = Path("runs")) -> Path:
    """Return the first unused folder of runs/00000, runs/00001, ..."""
    numbers = [int(p.name) for p in parent.glob("*") if p.name.isdigit()]
    return parent / f"{max(numbers, default=-1) + 1:05d}"


def unused(run_dir: Path) -> bool:
    """Return whether a run can begin in a folder.

    It can if the folder is missing or empty, or holds only the files of a run that was killed while starting.
    """
    ours = re.compile(r"data\.json|\.(config|data)\.json-.{8}")
    return not run_dir.is_dir() or all(ours.fullmatch(path.name) for path in run_dir.iterdir())


def check_writable(run_dir: Path) -> None:
    """Raise OSError unless files can be created in the folder, or the folder itself can be created."""
    folder = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{run_dir} cannot be written: {error.strerror or error} ({folder}). Nothing has been changed; make the "
            "folder writable, free some space, or choose another folder"
        ) from error


@contextlib.contextmanager
def writing(run_dir: Path, what: str) -> Iterator[None]:
    """If the block raises OSError, add to the message what has been saved and how to resume.

    Args:
        run_dir: folder of the run.
        what: description of what the block writes.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        newest = newest_checkpoint(run_dir)
        saved = f"{newest} and all checkpoints before it are safe." if newest else "Nothing had been saved yet."
        advice = f"then resume: spigan train --resume {run_dir}" if newest else "then start again"
        raise OSError(
            f"{what} could not be written: {error}. {saved} Free some space or make the folder writable, {advice}"
        ) from error
