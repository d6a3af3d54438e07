"""Worker processes: the same batches, errors, signals."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from data_helpers import encoded, one_image, open_source, picture, write_folder, write_parquet, write_zip

from spigan.data import loader


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
    with pytest.raises(ValueError, match=r"image\.png cannot be read as an image"):
        next(loader(dataset, batch_size=1, seed=0, num_workers=1))


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="only Linux tells who has sent a signal")
def test_signals_do_not_end_workers(tmp_path: Path) -> None:
    """Launchers and terminals send them to the whole group of processes; training has to finish an iteration then."""
    dataset = open_source(write_folder(tmp_path, {"a.png": encoded(picture(0))}), cache="none")
    before = set(multiprocessing.active_children())
    batches = loader(dataset, batch_size=1, seed=0, num_workers=2)
    next(batches), next(batches)  # both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
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
    for worker in workers:  # as at the exit of a program that has not let go of the loader
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0
