"""A run that is killed, told to stop, or that the disk fails: nothing saved is lost, and what goes on ends to the bit
as if nothing had happened.

SPIGAN_KILLS=50 pytest -s tests/training/test_faults.py -k killed is the long mode; it prints what the kills met.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor, nn

from spigan.config import TrainConfig
from spigan.runs import read_best, read_metrics, read_stats
from spigan.training import signals
from spigan.training.checkpoint import checkpoint_path, checkpoints, load_checkpoint
from spigan.training.trainer import Trainer

TIMES = {"seconds", "images_per_sec"}  # all of a row that may differ

# A process that has loaded everything and forks one for each job: a fresh process for each session of a run without
# the seconds that importing takes. Its threads: none, so that forking is safe. Every session writes checkpoints as a
# slow disk does, so that a kill often meets one half-written; a job may ask for more.
_FORKS = r"""
import ctypes, json, os, pathlib, signal, sys, time
import safetensors.torch, sklearn.datasets, torch, torch.utils.tensorboard
torch.set_num_threads(1)
from spigan.config import TrainConfig
from spigan.training import checkpoint, measure, signals, snapshots, statistics
from spigan.training.trainer import Trainer

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save_file(tensors, path, metadata):
    data = safetensors.torch.save(tensors, metadata)
    step = len(data) // 16 + 1
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(data), step):
            file.write(data[start : start + step])
            time.sleep(save_file.pause)
            save_file.left -= 1
            if not save_file.left:
                die()
save_file.pause, save_file.left = float(sys.argv[2]), 0

def note():  # "now": what the job asked for is reached
    pathlib.Path(sys.argv[1]).touch()

def block():  # as an operation in C++ does that takes very long: no signal handler of Python's runs
    lock = ctypes.CDLL(None).pthread_mutex_lock
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    note()
    lock(mutex)

def wait():
    note()
    while True:
        time.sleep(0.01)

def arrange(place, count):
    calls = [0]
    def due(wanted=True):
        calls[0] += wanted
        return wanted and calls[0] == count
    def before(owner, name, action):
        original = getattr(owner, name)
        def patched(*args, **kwargs):
            if due():
                action()
            return original(*args, **kwargs)
        setattr(owner, name, patched)
    if place == "half a line of statistics":
        def write(self, row):
            line = json.dumps(row) + "\n"
            with self.path.open("a") as file:
                file.write(line[: len(line) // 2] if due() else line)
            if calls[0] == count:
                die()
        statistics.StatsLog.write = write
    elif place == "half a checkpoint":
        save_file.left = 16 * count - 8
    elif place == "before a snapshot":
        before(snapshots.Snapshots, "take", die)
    elif place == "a slow checkpoint":
        save_file.pause = 0.05
        before(checkpoint, "save_file", note)
    elif place == "an iteration":
        before(Trainer, "train_iteration", note)
    elif place == "a stuck iteration":
        signals.SLOW = 0.0
        before(Trainer, "train_iteration", block)
    elif place == "a measurement":
        before(measure.RunMetrics, "measure", wait)
    elif place == "a stuck measurement":
        before(measure.RunMetrics, "measure", block)
    else:  # around the moment when a file gets its name
        when, pattern = place.split(" ")
        replace = os.replace
        def patched(source, target):
            ours = due(pattern in os.fspath(target))
            if ours and when == "before":
                die()
            replace(source, target)
            if ours:
                die()
        os.replace = patched

while line := sys.stdin.readline():
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        checkpoint.save_file = save_file
        if job["place"]:
            arrange(*job["place"])
        if job["config"]:
            run = Trainer(TrainConfig.model_validate(job["config"]), job["run_dir"], progress=False)
        else:
            run = Trainer.resume(job["run_dir"], progress=False)
        run.fit()
        os._exit(130 if run.interrupted else 0)
    print(pid, flush=True)
    sys.stdin.readline()  # until then the process keeps its number, ended or not, and no other can be killed by it
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Forks:
    """Runs sessions of a run, each in a process of its own, one at a time."""

    def __init__(self, to: IO[str], back: IO[str], noted: Path) -> None:
        self.to, self.back, self.noted = to, back, noted

    def start(self, run_dir: Path, config: TrainConfig | None = None, place: tuple[str, int] | None = None) -> int:
        """Process of a session that begins (with a config, where there is no run yet) or goes on."""
        new = config is not None and not (run_dir / "config.json").exists()
        job = {"run_dir": str(run_dir), "config": config.model_dump(mode="json") if new else None, "place": place}
        self.noted.unlink(missing_ok=True)
        self.to.write(json.dumps(job) + "\n")
        self.to.flush()
        return int(self.back.readline())

    def wait(self) -> int:
        """Exit code of the session."""
        self.to.write("\n")
        self.to.flush()
        return int(self.back.readline())

    def wait_for(self, condition: Callable[[], Any]) -> float:
        """Seconds until something is the case."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() < began + 120, "nothing happened for two minutes"
            time.sleep(0.005)
        return time.monotonic() - began


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("forks")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SPIGAN_CACHE": str(folder / "cache")}
    command = [sys.executable, "-c", _FORKS, str(folder / "noted"), "0.04" if KILLS > 4 else "0.01"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdin and process.stdout
    with process:
        yield Forks(process.stdin, process.stdout, folder / "noted")
        process.stdin.close()


class Means(nn.Module):
    """2 x 2 means."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1) / 255


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """9 ticks of 2 iterations, each with a checkpoint, every second one with a measurement; the first is the best."""
    features = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(features))
    return tiny_config(
        total_kimg=0.036, tick_kimg=0.004, snapshot_ticks=1, keep_checkpoints=2, xflip=True, augment="ada",
        ada_kimg=0.1, r1_interval=4, pl_weight=1.0, ema_kimg=0.01, metric_features=str(features), metric_samples=40,
        metric_ticks=2, seed=1, lr_g=0.01,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(config: TrainConfig, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run that nothing disturbs, and the seconds that it takes."""
    run_dir, began = tmp_path_factory.mktemp("straight") / "run", time.monotonic()
    forks.start(run_dir, config)
    assert forks.wait() == 0
    assert len(read_stats(run_dir)) == 9 and len(read_metrics(run_dir)) == 4
    return run_dir, time.monotonic() - began


def rows(run_dir: Path) -> list[list[dict[str, Any]]]:
    """Statistics and metrics."""
    return [
        [{name: value for name, value in row.items() if name not in TIMES} for row in read(run_dir)]
        for read in (read_stats, read_metrics)
    ]


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """All that a run leaves is equal to the bit, but for its times and TensorBoard's copy of the rows: every tensor of
    its checkpoints (weights, averages, moments, random state), counters, rows, pictures, the model and the best."""
    names, expected_names = ([path.name for path in checkpoints(folder)] for folder in (run_dir, expected))
    assert names == expected_names
    for name in names:
        (tensors, state), (expected_tensors, expected_state) = (
            load_checkpoint(folder / "checkpoints" / name) for folder in (run_dir, expected)
        )
        assert state | {"elapsed": 0} == expected_state | {"elapsed": 0}
        assert tensors.keys() == expected_tensors.keys()
        assert [key for key in tensors if not torch.equal(tensors[key], expected_tensors[key])] == []
    assert rows(run_dir) == rows(expected)
    ours, theirs = (
        {str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name}
        for folder in (run_dir, expected)
    )
    assert ours == theirs  # no scratch file either
    for name in ours:
        if (run_dir / name).is_file() and not name.startswith(("checkpoints", "stats.jsonl", "metrics.jsonl")):
            assert (run_dir / name).read_bytes() == (expected / name).read_bytes(), name


# ---- SIGKILL ----

KILLS = int(os.environ.get("SPIGAN_KILLS", "4"))
"""Kills at random moments; as many are placed."""
PLACES = [
    "half a checkpoint", "half a line of statistics", "after checkpoint-", "before best/metrics.json",
    "before stats.jsonl",
    "after model.safetensors", "before a snapshot", "after stats.jsonl", "before config.json", "after config.json",
    "before checkpoint-", "after best/metrics.json", "before samples-", "after data.json", "before reals.png",
]  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments(config, straight, forks, tmp_path, capsys):
    """SIGKILL from outside at random moments, and between them at the worst places in turn; each time the newest
    checkpoint is whole, and what restarts the run (as at its very beginning) gets to the end of an undisturbed one."""
    expected, seconds = straight
    generator = random.Random(7)
    done, within = {"by chance": 0, "placed": 0}, {"by chance": 0, "placed": 0}
    lives = 0
    while done["by chance"] < KILLS:
        lives += 1
        run_dir, last = tmp_path / f"run{lives}", -1
        while True:
            place, kind = None, "by chance" if done["by chance"] < KILLS else "none"
            if kind != "none" and done["by chance"] > done["placed"]:
                place, kind = (PLACES[done["placed"] % len(PLACES)], generator.randint(1, 2)), "placed"
            pid = forks.start(run_dir, config, place)
            if kind == "by chance":
                time.sleep(generator.uniform(0.0, 0.35 * seconds))
                os.kill(pid, signal.SIGKILL)
            ended = forks.wait()
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            done[kind] += 1
            within[kind] += bool(list((run_dir / "checkpoints").glob(".checkpoint-*")))
            if whole := checkpoints(run_dir):
                tensors, state = load_checkpoint(whole[-1])
                assert whole[-1] == checkpoint_path(run_dir, state["iteration"]) and state["iteration"] >= last
                assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())
                last = state["iteration"]
            assert len(whole) <= config.keep_checkpoints + 2  # one not yet rotated, and the best
            assert last < 0 or whole, "a checkpoint was lost"
        assert_same_run(run_dir, expected)
    assert any(within.values()), "no kill hit the writing of a checkpoint"
    with capsys.disabled():
        print(f"\nkills survived in {lives} runs: {done}; within the writing of a checkpoint: {within}")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before data.json", "after data.json", "before config.json", "after config.json",
                                   "before reals.png", "before checkpoint-"])  # fmt: skip
def test_killed_before_its_first_checkpoint(config, straight, forks, tmp_path, place):
    """The same command begins the run where there is none yet, `resume` goes on where there is one."""
    forks.start(tmp_path / "run", config, (place, 1))
    assert forks.wait() == -signal.SIGKILL
    assert not checkpoints(tmp_path / "run")
    if (tmp_path / "run" / "config.json").exists():
        Trainer.resume(tmp_path / "run", progress=False)
    else:
        Trainer(config, tmp_path / "run", progress=False)
    assert not [path for path in (tmp_path / "run").rglob(".*") if "checkpoint" in path.name]


# ---- SIGTERM ----


@pytest.mark.slow
@pytest.mark.parametrize("place", ["an iteration", "a slow checkpoint", "a measurement"])
def test_sigterm_saves_within_ten_seconds(config, straight, forks, tmp_path, capsys, place):
    run_dir = tmp_path / "run"
    pid = forks.start(run_dir, config, (place, 3))
    forks.wait_for(forks.noted.exists)
    began, before = time.monotonic(), read_stats(run_dir)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)  # as from a launcher, where a batch system has told all processes
    assert forks.wait() == 130
    seconds = time.monotonic() - began
    assert seconds < 10
    _, state = load_checkpoint(checkpoints(run_dir)[-1])
    assert state["iteration"] >= (before[-1]["iteration"] if before else 3)
    assert not list(run_dir.rglob(".*"))
    forks.start(run_dir)
    assert forks.wait() == 0
    assert_same_run(run_dir, straight[0])
    with capsys.disabled():
        print(f"\nSIGTERM within {place}: {seconds:.2f} s to the exit")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "count", "iteration"), [("a stuck iteration", 7, 6), ("a stuck measurement", 2, 8)])
def test_sigterm_saves_beside_what_cannot_be_interrupted(
    config, straight, forks, tmp_path, capsys, place, count, iteration
):
    run_dir = tmp_path / "run"
    # No snapshot comes near, so that what is there is what the signal saved.
    pid = forks.start(run_dir, config.model_copy(update={"snapshot_ticks": 100}), (place, count))
    forks.wait_for(forks.noted.exists)
    path = checkpoint_path(run_dir, iteration)
    assert not path.exists()
    os.kill(pid, signal.SIGTERM)
    seconds = forks.wait_for(path.exists)
    assert seconds < 10
    os.kill(pid, signal.SIGKILL)  # as the end of the time that a preempted job is given
    assert forks.wait() == -signal.SIGKILL
    (run_dir / "config.json").write_text((straight[0] / "config.json").read_text())
    forks.start(run_dir)
    assert forks.wait() == 0
    # The snapshots that it had none of would have left these.
    shutil.copytree(straight[0] / "checkpoints", run_dir / "checkpoints", dirs_exist_ok=True)
    for old in checkpoints(run_dir):
        if not (straight[0] / "checkpoints" / old.name).exists():
            old.unlink()
    assert_same_run(run_dir, straight[0])
    with capsys.disabled():
        print(f"\nSIGTERM within {place}: saved after {seconds:.2f} s")


def test_a_save_that_fails_beside_what_cannot_be_interrupted_is_told(monkeypatch, capsys):
    monkeypatch.setattr(signals, "GRACE", 0.0)
    tried = threading.Event()

    def save() -> None:
        tried.set()
        raise OSError("the disk is full")

    with signals.StopSignals() as stop, stop.backed(save):
        signal.raise_signal(signal.SIGTERM)
        assert tried.wait(30) and stop.is_set()
    assert capsys.readouterr().err == "The state could not be saved yet: the disk is full\n"


@pytest.mark.slow
def test_ctrl_c_after_a_signal_ends_at_once_without_damage(config, straight, forks, tmp_path):
    run_dir = tmp_path / "run"
    pid = forks.start(run_dir, config, ("a slow checkpoint", 3))
    forks.wait_for(forks.noted.exists)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(pid, signal.SIGINT)
    assert forks.wait() not in (0, 130)
    assert time.monotonic() - began < 5
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [
        path.name for path in checkpoints(run_dir)
    ]  # no scratch of the third
    assert load_checkpoint(checkpoints(run_dir)[-1])[1]["iteration"] == 2
    forks.start(run_dir)
    assert forks.wait() == 0
    assert_same_run(run_dir, straight[0])


# ---- Disks ----


def mount(*arguments: str | Path) -> None:
    """Skips the test where it is not allowed."""
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mount is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    if shutil.which("mount") is None:
        pytest.skip("there is no mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", folder)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def at_iteration(trainer: Trainer, iteration: int, action: Callable[[], object]) -> None:
    original = trainer.train_iteration

    def train_iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == iteration:
            action()

    trainer.train_iteration = train_iteration  # type: ignore[method-assign]


def fill(folder: Path) -> Path:
    """A file that takes all the room that there is."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return folder / "filler"


def test_full_disk(tiny_config, small_disk, tmp_path):
    config = tiny_config(snapshot_ticks=1)
    expected = Trainer(config, tmp_path / "straight", progress=False)
    expected.fit()
    trainer = Trainer(config, small_disk / "run", progress=False)
    at_iteration(trainer, 7, lambda: fill(small_disk))
    with pytest.raises(OSError, match=r"could not be written: .*No space left") as caught:
        trainer.fit()
    good = checkpoint_path(trainer.run_dir, 4)
    for text in (
        str(trainer.run_dir),
        f"{good} and all checkpoints before it are safe",
        "Free some space",
        f"spigan train --resume {trainer.run_dir}",
    ):
        assert text in str(caught.value)
    assert checkpoints(trainer.run_dir) == [checkpoint_path(trainer.run_dir, 0), good]
    assert not list(trainer.run_dir.rglob(".*"))
    with pytest.raises(OSError, match=r"cannot be written|could not be written"):  # still full
        Trainer.resume(trainer.run_dir, progress=False).fit()
    (small_disk / "filler").unlink()
    Trainer.resume(trainer.run_dir, progress=False).fit()
    (tensors, _), (others, _) = (load_checkpoint(checkpoints(t.run_dir)[-1]) for t in (trainer, expected))
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert rows(trainer.run_dir) == rows(expected.run_dir)


def test_full_disk_while_a_checkpoint_is_written(tiny_config, small_disk):
    """There is room for a line of statistics and for half a checkpoint."""
    trainer = Trainer(tiny_config(snapshot_ticks=1), small_disk / "run", progress=False)

    def leave_little() -> None:
        size = checkpoint_path(trainer.run_dir, 4).stat().st_size
        os.truncate(filler := fill(small_disk), (small_disk / "filler").stat().st_size - size // 2)
        # A filler with a hole would give the room back.
        assert filler.stat().st_blocks * 512 >= filler.stat().st_size

    at_iteration(trainer, 8, leave_little)
    with pytest.raises(OSError, match=r"the checkpoint of iteration 8 in .* could not be written: .*No space left"):
        trainer.fit()
    assert checkpoints(trainer.run_dir)[-1] == checkpoint_path(trainer.run_dir, 4)
    assert not list(trainer.run_dir.rglob(".*"))
    assert load_checkpoint(checkpoints(trainer.run_dir)[-1])[1]["iteration"] == 4


@pytest.fixture
def make_read_only() -> Iterator[Callable[[Path], None]]:
    """A function of a folder that makes it read-only until the test ends, for root by a mount."""
    undo: list[list[str | Path]] = []

    def make(folder: Path) -> None:
        if os.geteuid():
            folder.chmod(0o555)
            undo.append(["chmod", "755", folder])
            return
        mount("--bind", folder, folder)
        undo.append(["umount", "-l", folder])
        mount("-o", "remount,bind,ro", folder)

    yield make
    for command in reversed(undo):
        subprocess.run(command, check=True)


def test_read_only_folder(tiny_config, tmp_path, make_read_only):
    trainer = Trainer(tiny_config(snapshot_ticks=1), tmp_path / "run", progress=False)
    at_iteration(trainer, 7, lambda: make_read_only(trainer.run_dir / "checkpoints"))
    with pytest.raises(OSError, match=r"the checkpoint of iteration 8 in .* could not be written") as caught:
        trainer.fit()
    assert f"{checkpoint_path(trainer.run_dir, 4)} and all checkpoints before it are safe" in str(caught.value)
    assert len(checkpoints(trainer.run_dir)) == 2
    make_read_only(trainer.run_dir)
    before = {path: path.stat().st_mtime_ns for path in trainer.run_dir.rglob("*")}
    with pytest.raises(OSError, match=r"cannot be written: .* Nothing has been changed") as caught:
        Trainer.resume(trainer.run_dir, progress=False)
    assert str(trainer.run_dir) in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in trainer.run_dir.rglob("*")} == before


def test_a_new_run_where_nothing_can_be_written(tiny_config, tmp_path, make_read_only):
    """Told before the data are read."""
    (tmp_path / "runs").mkdir()
    make_read_only(tmp_path / "runs")
    config = tiny_config(data={"source": str(tmp_path / "nowhere")})
    with pytest.raises(OSError, match="cannot be written") as caught:
        Trainer(config, tmp_path / "runs" / "new", progress=False)
    assert str(tmp_path / "runs" / "new") in str(caught.value)


# ---- Rotation ----


def test_the_checkpoint_of_the_best_model_is_kept(straight, tmp_path, monkeypatch):
    """And training can go on from it."""
    best = read_best(straight[0])
    assert best is not None and best["iteration"] == 4
    assert [load_checkpoint(path)[1]["iteration"] for path in checkpoints(straight[0])] == [4, 16, 18]
    run_dir = shutil.copytree(straight[0], tmp_path / "run")
    for newer in checkpoints(run_dir)[1:]:
        newer.unlink()
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    Trainer.resume(run_dir, progress=False).fit()
    assert_same_run(run_dir, straight[0])


def test_a_best_model_between_snapshots_has_its_checkpoint(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    settings = config.model_copy(update={"snapshot_ticks": 100, "keep_checkpoints": 1})
    trainer = Trainer(settings, tmp_path / "run", progress=False)
    assert trainer.metrics is not None
    values = iter([3.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(trainer.metrics, "measure", lambda model: {trainer.metrics.distance: next(values)})
    trainer.fit()
    assert checkpoints(trainer.run_dir) == [checkpoint_path(trainer.run_dir, iteration) for iteration in (8, 18)]
