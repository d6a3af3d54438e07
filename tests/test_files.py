"""Files that are written completely or not at all, and untrusted text that is read within bounds."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest

from spigan.files import MAX_TEXT, atomic_path, cache_folder, read_json, read_text, shorten, user_path, write_text


def test_atomic_path_replaces_when_the_block_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_path(path) as scratch:
            scratch.write_text(text)
            assert scratch.name == path.name and scratch.parent.parent == path.parent
            assert scratch.parent.name.startswith(".file.txt-")
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_keeps_the_old_file_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_path(path) as scratch:
            scratch.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_atomic_path_leaves_nothing_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), atomic_path(tmp_path / "folder") as scratch:  # noqa: PT011  # which one: by platform
        scratch.write_text("text")
    assert os.listdir(tmp_path) == ["folder"]


def test_scratch_of_killed_programs_is_removed(tmp_path: Path) -> None:
    """Not that of a program that still writes, nor what only looks like it."""
    pytest.importorskip("fcntl", reason="no locks of folders")
    path, long_ago = tmp_path / "file.txt", time.time() - 3600
    stale, young, other = (
        tmp_path / f".{name}" for name in ("file.txt-12345678", "file.txt-abcdefgh", "file.txt-kept")
    )
    for folder in (stale, young, other):
        folder.mkdir()
        (folder / "file.txt").write_text("half")
    for folder in (stale, other):
        os.utime(folder, (long_ago, long_ago))
    with atomic_path(path) as writing:
        assert set(tmp_path.iterdir()) == {young, other, writing.parent}
        writing.write_text("first")
        os.utime(writing.parent, (long_ago, long_ago))
        with atomic_path(path) as second:  # as another process would
            second.write_text("second")
        assert writing.read_text() == "first"
    assert path.read_text() == "first" and set(tmp_path.iterdir()) == {path, young, other}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_atomic_path_gives_the_permissions_of_a_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    old = os.umask(umask)
    try:
        with atomic_path(tmp_path / "file.txt") as scratch:
            scratch.write_text("text")
        assert os.umask(umask) == umask  # and leaves the umask alone
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == mode


def test_atomic_path_refuses_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is not a regular file"), atomic_path(tmp_path / "pipe"):
        pass
    assert os.listdir(tmp_path) == ["pipe"]


def test_text_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "é" * (MAX_TEXT // 2))
    assert read_text(path) == "é" * (MAX_TEXT // 2)
    write_text(path, "é" * (MAX_TEXT // 2) + "x")
    with pytest.raises(ValueError, match=rf"a\.json has more than {MAX_TEXT} bytes"):
        read_text(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a\.json is not UTF-8"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ('{"a":' * 100_000, "is nested too deeply"),
        ("", "is not JSON"),
    ],
    ids=["cut short", "list", "deep", "empty"],
)
def test_json_is_an_object(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "a.json"
    write_text(path, text)
    with pytest.raises(ValueError, match=rf"a\.json {message}"):
        read_json(path)
    write_text(path, json.dumps({"a": [1, "é"]}))
    assert read_json(path) == {"a": [1, "é"]}


def test_long_names_are_shortened() -> None:
    assert shorten("x" * 100) == "x" * 100
    assert shorten("x" * 101) == "x" * 97 + "..."


def test_paths_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    assert user_path("~/a") == Path("/home/user/a")
    assert user_path("~nobody-at-all/a") == Path("~nobody-at-all/a")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "cache"
    assert cache_folder("~/mine") == Path.home() / "mine"
    monkeypatch.delenv("SPIGAN_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "spigan"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "spigan"
