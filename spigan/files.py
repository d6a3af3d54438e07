"""Write files completely or not at all, and read untrusted text within limits."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
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

MAX_TEXT = 1 << 20  # largest size in bytes of a configuration or a record; real ones are far smaller


# ---- Reading ----


def user_path(path: str) -> Path:
    """Return the path that a user wrote, with "~" replaced by the home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # "~nobody" with no such user: the file does not exist either
        return Path(path)


def folders_in(root: Path) -> list[Path]:
    """Return the folders in a folder, sorted, with links to folders, without hidden ones.

    Raises:
        OSError: if the folder cannot be read.
    """
    with os.scandir(root) as entries:
        # os.path.isdir takes a link in a circle for a file; entry.is_dir would raise.
        names = [e.name for e in entries if e.is_dir(follow_symlinks=False) or (e.is_symlink() and os.path.isdir(e))]
    return [root / name for name in sorted(names) if not name.startswith(".")]


def cache_folder(folder: str | Path | None = None) -> Path:
    """Return the folder of the cache.

    This is `folder` if given, else $SPIGAN_CACHE, else $XDG_CACHE_HOME/spigan, else ~/.cache/spigan.
    """
    if folder is None:
        folder = os.environ.get("SPIGAN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spigan"
    return Path(folder).expanduser()


def is_hub_id(name: str) -> bool:
    """Return whether a name can be that of a repository on the Hugging Face Hub: "owner/name"."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def read_text(path: Path) -> str:
    """Return the text of an untrusted file.

    Raises:
        ValueError: if the file is larger than `MAX_TEXT`, or is not UTF-8.
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise ValueError(f"{path} has more than {MAX_TEXT} bytes, the limit for such a file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in an untrusted file.

    Raises:
        ValueError: if the file does not hold a JSON object, is too large, or is nested too deeply.
        OSError: if the file cannot be read.
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


def shorten(text: object) -> str:
    """Return a text from an untrusted file, cut to at most 100 characters for an error message."""
    shown = str(text)
    return shown if len(shown) <= 100 else shown[:97] + "..."


def printable(text: object, keep: str = "") -> str:
    """Escape what may not be shown as it is, because names from untrusted files may contain terminal commands.

    Every name of a file, a member or a column passes through this function before it is printed or becomes part of a
    message. Bytes of a name that are not UTF-8 are escaped too.

    Args:
        text: a name, or a text that contains one.
        keep: control characters to keep, such as the "\\n" of a message of several lines.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


# ---- Writing ----


@contextmanager
def atomic_path(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield a path to write to instead of `path`. The file is moved to `path` if the block succeeds, else removed.

    A reader therefore never sees half a file, and a program that is killed never leaves one.

    Args:
        path: the file to write. Its folder is created if needed.
        durable: whether to wait until the file is on disk, so that it survives a power failure.

    Raises:
        OSError: if `path` is a device or a pipe, or cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path} is not a regular file, and a regular file would replace it: choose another path")
    path.parent.mkdir(parents=True, exist_ok=True)
    if durable:  # not for each of 50,000 pictures, because it lists the folder
        remove_stale(path.parent, f".{glob.escape(path.name)}-")
    # Use a separate folder, because some libraries (safetensors) also write other files next to the given path.
    with scratch_folder(path.parent, f".{path.name}-") as folder:
        scratch = folder / path.name
        yield scratch
        if durable:
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        # Some libraries create private files. Give the file the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        scratch.chmod(0o666 & ~umask)
        os.replace(scratch, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, completely or not at all."""
    with atomic_path(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Create a folder in `parent` for files that will be moved out of it. Remove the folder when the block ends.

    A killed program cannot remove its folder. Therefore each folder is locked. The system releases the lock when the
    process ends, however it ends, and `remove_stale` removes folders that are not locked.
    """
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        lock = _lock(folder)
        try:
            yield Path(folder)
        finally:
            if lock is not None:
                os.close(lock)


def remove_stale(parent: Path, prefix: str, age: float = 60) -> None:
    """Remove folders created by `scratch_folder(parent, prefix)` that killed programs left behind.

    Args:
        parent: the folder that contains them.
        prefix: start of their names. It may contain wildcards.
        age: only remove folders that have not changed for this many seconds.
    """
    for path in parent.glob(f"{prefix}????????"):
        with contextlib.suppress(OSError):
            # A folder is only locked a moment after it is created, so very new folders must be kept.
            if path.is_dir() and time.time() - path.stat().st_mtime >= age and (lock := _lock(path)) is not None:
                shutil.rmtree(path)
                os.close(lock)


def _lock(folder: str | Path) -> int | None:
    """Lock a folder and return the descriptor that holds the lock.

    Return None if the folder is already locked, or if the system has no locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
