"""Worker processes: the same batches, errors, signals."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_helpers import encoded, one_image, open_source, picture, write_folder, write_parquet, write_zip

from spigan.data import loader, workers
from spigan.data.workers import cpu_quota


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet"])
def test_workers_load_the_same_batches(tmp_path: Path, kind: str) -> None:
    files = {f"{seed:02}.png": encoded(picture(seed)) for seed in range(20)}
    path = {
        "folder": lambda: write_folder(tmp_path / "set", files),
        "zip": lambda: write_zip(tmp_path / "set.zip", files),
        "parquet": lambda: write_parquet(tmp_path / "train.parquet", list(files.values())),
    }[kind]()
    cached, decoding = open_source(path), open_source(path, cache="none")
    state = torch.get_rng_state()
    expected = loader(cached, batch_size=6, seed=0, start=5)
    loaded = loader(decoding, batch_size=6, seed=0, start=5, num_workers=2)
    for _ in range(8):
        batch = next(loaded)
        assert batch.dtype == torch.uint8
        assert torch.equal(batch, next(expected))
    assert torch.equal(torch.get_rng_state(), state)


def test_error_in_a_worker_names_the_file(tmp_path: Path) -> None:
    dataset = one_image(tmp_path, encoded(picture(0)), cache="none")
    (tmp_path / "image.png").write_bytes(b"overwritten since")
    with pytest.raises(ValueError, match=r"^\S+/image\.png cannot be read as an image [^\n]*$"):  # and no traceback
        next(loader(dataset, batch_size=1, seed=0, num_workers=1))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="only Linux tells who has sent a signal")
def test_signals_do_not_end_workers(tmp_path: Path) -> None:
    """Launchers and terminals send them to the whole group of processes; training has to finish an iteration then."""
    dataset = open_source(write_folder(tmp_path, {"a.png": encoded(picture(0))}), cache="none")
    before = set(multiprocessing.active_children())
    batches = loader(dataset, batch_size=1, seed=0, num_workers=2)
    next(batches), next(batches)  # both have begun
    started = set(multiprocessing.active_children()) - before
    assert len(started) == 2
    for worker in started:
        # The one thread that waits for the signal shows it as blocked, too.
        statuses = [path.read_text() for path in Path(f"/proc/{worker.pid}/task").glob("*/status")]
        masks = [int(status.split("SigBlk:\t")[1].split()[0], 16) for status in statuses]
        waiting = [mask for mask in masks if not mask >> (signal.SIGTERM - 1) & 1]
        assert len(waiting) <= 1, "a thread that a signal would end the worker through"
        for number in (signal.SIGINT, signal.SIGTERM):
            # From another process: `terminate` is from this one.
            subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
    for _ in range(8):  # more than each had prepared
        next(batches)
    for worker in started:  # as at the exit of a program that has not let go of the loader
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0


def test_batches_where_shared_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker gives 64 MB by default. A worker that found none left could not tell, and training waited for ever."""

    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device")

    def late(*_: object) -> None:
        raise TimeoutError("the workers never answer")

    files = {f"{seed:02}.png": encoded(picture(seed)) for seed in range(8)}
    dataset = open_source(write_folder(tmp_path, files), cache="none")
    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    monkeypatch.setattr(torch.UntypedStorage, "_share_filename_cpu_", full)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try:
        batches = loader(dataset, batch_size=4, seed=0, num_workers=2)
        assert [next(batches).shape for _ in range(3)] == [(4, 3, 8, 8)] * 3
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of DataLoader's half-made iterator
def test_workers_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.multiprocessing, "Queue", full)
    dataset = open_source(write_folder(tmp_path, {"a.png": encoded(picture(0))}), cache="none")
    with pytest.raises(OSError, match=r"/dev/shm is .*: set data\.workers=0 \(--workers 0\), or .* --shm-size"):
        loader(dataset, batch_size=1, seed=0, num_workers=1)


def test_quota_of_a_container(tmp_path: Path) -> None:
    """cpu.max of control groups, version 2: of the group and of those that hold it."""
    groups, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "docker" / "one").mkdir(parents=True)
    assert cpu_quota(tmp_path / "none", root) == math.inf
    groups.write_text("1:cpu:/old\n0::/docker/one\n")
    assert cpu_quota(groups, root) == math.inf
    (root / "docker" / "one" / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(groups, root) == math.inf
    (root / "docker" / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(groups, root) == 1.5
    (root / "docker" / "one" / "cpu.max").write_text("50000 100000\n")
    assert cpu_quota(groups, root) == 0.5


@pytest.mark.parametrize(("quota", "cores"), [(0.5, 1), (1.5, 2), (math.inf, 64)])
def test_cores_within_the_quota(monkeypatch: pytest.MonkeyPatch, quota: float, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(workers, "cpu_quota", lambda *_: quota)
    assert workers.available_cores() == cores


@pytest.mark.slow
def test_a_program_without_the_guard_is_told(tmp_path: Path) -> None:
    """With spawn, every worker runs the program again, and would start workers itself."""
    write_folder(tmp_path / "set", {"a.png": encoded(picture(0))})
    program = f"""
import multiprocessing
multiprocessing.set_start_method("spawn", force=True)
from spigan.data import DataConfig, loader, open_dataset
dataset = open_dataset(DataConfig(source={str(tmp_path / "set")!r}, cache="none"), progress=False)
next(loader(dataset, batch_size=1, seed=0, num_workers=1))
"""
    (tmp_path / "program.py").write_text(program)
    result = subprocess.run([sys.executable, tmp_path / "program.py"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert '(start method spawn): put your program\'s calls under `if __name__ == "__main__":`' in last
