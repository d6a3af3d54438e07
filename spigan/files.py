"""Files: written whole or not at all, and untrusted text read within bounds."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

MAX_TEXT = 1 << 20  # bytes of a configuration or a record: what is larger is none


def shorten(name: object) -> str:
    """A name that comes from a file, as an error can show it."""
    text = str(name)
    return text if len(text) <= 100 else text[:97] + "..."


def read_text(path: Path) -> str:
    """The text of a file that comes from anybody.

    Raises:
        ValueError: it is larger than `MAX_TEXT`, or not UTF-8.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"{path} has more than {MAX_TEXT} bytes, the most that is read of such a file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that comes from anybody.

    Raises:
        ValueError: it holds none; it is too large, or nested too deeply.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(read_text(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` for files that will be moved out of it; removed with what is left when the block ends.

    A killed program cannot remove its own. So each is locked, which the end of a process undoes however it comes, and
    `remove_stale` finds those that nobody has locked.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        lock = _locked(folder)
        try:
            yield Path(folder)
        finally:
            if lock is not None:
                os.close(lock)


def remove_stale(parent: Path, prefix: str, age: float = 60) -> None:
    """Remove what killed programs left of `scratch_folder(parent, prefix)`; `prefix` may have wildcards.

    Args:
        parent, prefix: of the folders.
        age: seconds since the last change of those that may be removed.
    """
    for path in parent.glob(f"{prefix}????????"):
        with contextlib.suppress(OSError):
            # A lock follows the creation of its folder by an instant, hence the age.
            if path.is_dir() and time.time() - path.stat().st_mtime >= age and (lock := _locked(path)) is not None:
                shutil.rmtree(path)
                os.close(lock)


def _locked(folder: str | Path) -> int | None:
    """Descriptor that holds the lock of a folder; None where another does, or the system has no such locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Path to write instead of `path`: moved there when the block ends well, removed otherwise.

    So a reader, or a program killed at any moment, never sees half a file.

    Args:
        path: where the file shall be; its folder is made.
        durable: wait until the disk has it, so that it survives a loss of power too.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is no regular file and would be replaced by one")
    path.parent.mkdir(parents=True, exist_ok=True)
    if durable:  # not of each of 50,000 pictures: it lists the folder
        remove_stale(path.parent, f".{glob.escape(path.name)}-")
    # A folder, since some libraries (safetensors) write beside the path that they are given, too.
    with scratch_folder(path.parent, f".{path.name}-") as folder:
        scratch = folder / path.name
        yield scratch
        if durable:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        # Some libraries make private files; a written file should get the permissions that any new file gets.
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        os.replace(scratch, path)
