"""Two processes (gloo, on the CPU) compute what one does, resume what one began, stop together and exit cleanly.

Every case is a launch of its own: two processes that join, train and exit, so that a crash fails one test. They are
forked from a process that has imported everything, because importing takes longer than training. The launchers are
tested with the command line.

SPIGAN_EXITS=100 pytest -s tests/training/test_processes.py -k exits is the long mode of the tests of exiting.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from spigan.cli import app
from spigan.config import TrainConfig
from spigan.models.discriminator import minibatch_std
from spigan.runs import read_metrics, read_stats
from spigan.training.checkpoint import checkpoints, load_checkpoint
from spigan.training.processes import Processes, Rows
from spigan.training.trainer import Trainer

TIMES = {"seconds", "images_per_sec"}
# Small steps: Adam's first steps have the size of the learning rate whatever the gradient, so a gradient that is only
# rounding error would otherwise move weights in a random direction.
JOB = {"batch": 8, "total_kimg": 0.016, "tick_kimg": 0.016, "mbstd_group": 2, "lr_g": 1e-5, "lr_d": 1e-5}
EVERYTHING = {
    "augment": "ada", "ada_kimg": 0.04, "ada_target": -1, "xflip": True, "r1_gamma": 1.0, "r1_interval": 2,
    "pl_weight": 1.0, "pl_interval": 2, "metric_samples": 41, "metric_ticks": 1, "total_kimg": 0.048,
}  # 12 iterations, three ticks  # fmt: skip
CASES = {
    "everything": EVERYTHING,
    # 4 iterations, one tick each
    "joint": {"updates": "joint", "intervals": 3, "augment": "diffaug", "r1_interval": 1, "pl_weight": 1.0},
    "accumulated": {"batch_gpu": 2, "r1_interval": 1, "pl_weight": 1.0, "augment": "diffaug"},
    "mlp": {"model": {"mapping": "mlp"}, "intervals": 1, "xflip": True},
    # The images of a process belong to both times, in groups that are also groups of the joint minibatch.
    "split": {"path": "analytic", "times": "split", "r1_interval": 1, "pl_weight": 1.0, "pl_interval": 1},
}
EXITS = int(os.environ.get("SPIGAN_EXITS", "4"))
"""Launches of each case of `test_exits_while`; see CONTRIBUTING.md."""

# Plays the launcher for one job a line: forks two processes, waits, and prints their exit codes. A job trains the runs
# that it lists, one after the other; a "stop" or "fault" happens to process 1. What it saw goes to found.RANK, what it
# printed to output.RANK. Processes leave like any program, through the end of the script or an exception.
_LAUNCHER = r"""
import atexit, contextlib, json, os, signal, socket, sys
import accelerate, safetensors.torch, sklearn.datasets, torch, torch.utils.tensorboard
torch.set_num_threads(1)
from spigan.config import TrainConfig
from spigan.training.measure import RunMetrics
from spigan.training.trainer import Trainer

class Disturbed(Trainer):
    def train_iteration(self, images):
        super().train_iteration(images)
        if rank == 1 and self.iteration == job.get("iteration"):
            if job["disturb"] == "signal":
                for _ in range(2):  # as when a batch system tells all processes and the launcher passes on its own
                    signal.raise_signal(signal.SIGTERM)
            elif job["disturb"] == "die":
                os._exit(3)
            elif job["disturb"] == "raise":
                raise OSError("the images of process 1 are gone")

def signal_when_measuring():
    original = RunMetrics.measure
    def measure(self, model):
        signal.raise_signal(signal.SIGTERM)
        return original(self, model)
    RunMetrics.measure = measure

def slow_gloo(processes):
    # Its threads run when nothing else does, and so are often still busy with the last collective at exit.
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # other threads may end meanwhile
            with open(f"/proc/self/task/{thread}/comm") as file:
                if file.read().startswith("pt_gloo"):
                    os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
    processes.wait()

def note(**values):
    found.append(values)
    with open(f"{job['folder']}/found.{rank}", "w") as file:
        json.dump(found, file)

def work():
    if job.get("own group"):
        torch.distributed.init_process_group("gloo")
        atexit.register(lambda: note(still_there=torch.distributed.is_initialized()))
    if job.get("disturb") == "signal when measuring" and rank == 0:
        signal_when_measuring()
    for run in job["runs"]:
        try:
            if job.get("config") is None:
                trainer = Disturbed.resume(run, progress=True)
            else:
                config = job["config"] | {"seed": job["config"].get("seed", 0) + rank * job.get("differ", 0)}
                trainer = Disturbed(TrainConfig.model_validate(config), run, progress=True)
            trainer.fit()
        except (ValueError, FloatingPointError) as error:
            note(error=str(error))
        else:
            note(iteration=trainer.iteration, interrupted=trainer.interrupted)
            if job.get("slow gloo"):
                slow_gloo(trainer.processes)

for line in sys.stdin:
    job, found = json.loads(line), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(240)  # ends a process that hangs
            output = os.open(f"{job['folder']}/output.{rank}", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1), os.dup2(output, 2)
            os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            work()
            sys.exit()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""

# The command line, but process 1 fails in iteration 10.
_FAULT = """
import os
from spigan import cli
from spigan.training.trainer import Trainer

original = Trainer.train_iteration
def train_iteration(self, images):
    if os.environ["RANK"] == "1" and self.iteration == 10:
        raise OSError("the images of process 1 are gone")
    original(self, images)
Trainer.train_iteration = train_iteration
cli.main()
"""


class Means(nn.Module):
    """2 x 2 means."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 2).flatten(1) / 255


@dataclass
class Ended:
    """Two processes that have ended: by rank their exit codes, what they noted and what they printed."""

    codes: list[int]
    found: list[list[dict[str, Any]]]
    output: list[str]


class Launcher:
    """Starts two processes and waits for both."""

    def __init__(self, to: IO[str], back: IO[str], make_folder: Callable[[str], Path]) -> None:
        self.to, self.back, self.make_folder = to, back, make_folder

    def run(self, *runs: Path, config: TrainConfig | None = None, **job: Any) -> Ended:
        """Trains (with a config) or resumes the runs, one after the other."""
        folder = self.make_folder("pair")
        fields = None if config is None else config.model_dump(mode="json")
        job |= {"folder": str(folder), "runs": [str(run) for run in runs], "config": fields}
        self.to.write(json.dumps(job) + "\n")
        self.to.flush()
        codes = json.loads(self.back.readline())
        notes = [folder / f"found.{rank}" for rank in (0, 1)]
        found = [json.loads(path.read_text()) if path.exists() else [] for path in notes]
        return Ended(codes, found, [(folder / f"output.{rank}").read_text() for rank in (0, 1)])

    def both(self, *runs: Path, **job: Any) -> tuple[list[dict[str, Any]], str]:
        """What each of the two noted of a single run and what both printed; they exit without an error."""
        ended = self.run(*runs, **job)
        assert ended.codes == [0, 0], "\n".join(ended.output)
        assert [len(found) for found in ended.found] == [1, 1]
        return [found[0] for found in ended.found], "".join(ended.output)


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    return dict(os.environ) | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "SPIGAN_CACHE": str(cache)}


@pytest.fixture(scope="module")
def pair(shared_cache: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    command = [sys.executable, "-c", _LAUNCHER]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=shared_cache)
    assert process.stdin and process.stdout
    with process:
        yield Launcher(process.stdin, process.stdout, tmp_path_factory.mktemp)
        process.stdin.close()


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(path))

    def build(name: str, **changes: Any) -> TrainConfig:
        fields = JOB | CASES[name] | changes
        return tiny_config(**fields | ({"metric_features": str(path)} if "metric_ticks" in fields else {}))

    return build


@pytest.fixture(autouse=True)
def _cache(shared_cache: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPIGAN_CACHE", shared_cache["SPIGAN_CACHE"])


@pytest.fixture(scope="module")
def by_one(config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run "everything" of one process."""
    run = tmp_path_factory.mktemp("one") / "run"
    Trainer(config("everything"), run, progress=False).fit()
    return run


class Stopped(Trainer):
    """A signal arrives during iteration 5."""

    def train_iteration(self, images: Tensor) -> None:
        super().train_iteration(images)
        if self.iteration == 5:
            signal.raise_signal(signal.SIGTERM)


def end_of(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_checkpoint(checkpoints(run)[-1])


def assert_same_run(run: Path, expected: Path) -> None:
    """The same counters and random state, and up to rounding the same gradients, weights, statistics and metrics."""
    (tensors, state), (expected_tensors, expected_state) = end_of(run), end_of(expected)
    assert state | {"elapsed": 0} == expected_state | {"elapsed": 0}
    assert tensors.keys() == expected_tensors.keys()
    assert torch.equal(tensors["rng.cpu"], expected_tensors["rng.cpu"])
    for name, value in expected_tensors.items():
        # Adam's first moment, with beta1 = 0, is the last gradient.
        scale = value.double().abs().max().item() if value.numel() else 0.0
        error = (tensors[name].double() - value.double()).abs().max().item() if value.numel() else 0.0
        assert error <= 1e-3 * scale + 1e-6, f"{name} differs by {error:.2e} of {scale:.2e}"
    for read in (read_stats, read_metrics):
        rows, expected_rows = read(run), read(expected)
        assert len(rows) == len(expected_rows)
        for row, expected_row in zip(rows, expected_rows, strict=True):
            assert row.keys() == expected_row.keys()
            for name in row.keys() - TIMES:
                assert row[name] == pytest.approx(expected_row[name], rel=1e-3, abs=1e-5), name


def files_of(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if not path.name.startswith("events")}


# ---- The same update ----


@pytest.mark.slow
def test_two_processes_compute_what_one_does(pair, config, by_one, tmp_path):
    """Gradients of D, R1, G and path length, EMA, ADA's p, data, noise, random numbers of every kind, metrics."""
    found, output = pair.both(tmp_path / "run", config=config("everything"))
    assert found == [{"iteration": 12, "interrupted": False}] * 2
    assert_same_run(tmp_path / "run", by_one)
    tensors, state = end_of(tmp_path / "run")
    assert state["images_seen"] == 48 and state["images_drawn"] == 96
    assert tensors["augment.p"] == pytest.approx(0.8)
    assert tensors["optimizer_g.0.exp_avg"].abs().max() > 0
    assert len(read_metrics(tmp_path / "run")) == 3
    # The main process alone shows progress and writes.
    assert output.count(" 48/48 ") == output.count("100%") > 0
    for run in (tmp_path / "run", by_one):
        assert len([path for path in run.iterdir() if path.name.startswith("events")]) == 1
    assert files_of(tmp_path / "run") == files_of(by_one)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "everything"])
def test_two_processes_compute_what_one_does_with_other_settings(pair, config, tmp_path, name):
    settings = config(name)
    found, _ = pair.both(tmp_path / "two", config=settings)
    assert found == [{"iteration": 4, "interrupted": False}] * 2
    if settings.batch_gpu is not None:  # two processes hold batch_gpu images at a time each, one holds twice as many
        settings = config(name, batch_gpu=2 * settings.batch_gpu)
    Trainer(settings, tmp_path / "one", progress=False).fit()
    assert_same_run(tmp_path / "two", tmp_path / "one")
    tensors, state = end_of(tmp_path / "two")
    assert state["images_seen"] == 16 and state["images_drawn"] == 32
    noise = [key for key in tensors if key.endswith("noise_strength") and key.startswith("model.")]
    assert noise and all(tensors[key] != 0 for key in noise)  # 0 at first: the drawn noise has had its gradient


@pytest.mark.slow
def test_one_process_resumes_a_run_of_two(pair, config, by_one, tmp_path):
    """Stopped between a discriminator's and its generator's iteration, within a tick and within ADA's interval."""
    found, output = pair.both(tmp_path / "run", config=config("everything"), disturb="signal", iteration=5)
    # The signal came to process 1 alone: both stopped after that iteration, and process 0 saved.
    assert found == [{"iteration": 5, "interrupted": True}] * 2
    assert output.count(f"spigan train --resume {tmp_path / 'run'}") == 1
    Trainer.resume(tmp_path / "run", progress=False).fit()
    assert_same_run(tmp_path / "run", by_one)


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(pair, config, by_one, tmp_path):
    Stopped(config("everything"), tmp_path / "run", progress=False).fit()
    assert end_of(tmp_path / "run")[1]["iteration"] == 5
    found, _ = pair.both(tmp_path / "run")
    assert found == [{"iteration": 12, "interrupted": False}] * 2
    assert_same_run(tmp_path / "run", by_one)


# ---- Stopping together ----


@pytest.mark.slow
def test_a_signal_while_measuring_leaves_no_process_alone(pair, config, tmp_path):
    """The measurement, in which the processes communicate, is finished; then all stop and the state is saved."""
    found, _ = pair.both(tmp_path / "run", config=config("everything"), disturb="signal when measuring")
    assert found == [{"iteration": 4, "interrupted": True}] * 2
    assert len(read_metrics(tmp_path / "run")) == 1
    assert [path.name for path in checkpoints(tmp_path / "run")][-1] == "checkpoint-00000004.safetensors"


@pytest.mark.slow
def test_all_processes_find_the_same_divergence_and_the_main_one_saves_it(pair, config, tmp_path):
    run = tmp_path / "run"
    found, _ = pair.both(run, config=config("mlp", grad_norm_limit=1e-9))
    errors = [found[rank]["error"] for rank in (0, 1)]
    assert all("diverged: grad_norm_d (" in error for error in errors)
    assert [str(run / "failed") in error for error in errors] == [True, False]
    assert [path.name for path in checkpoints(run)] == ["checkpoint-00000000.safetensors"]
    assert {path.name for path in (run / "failed").iterdir()} == {"state-00000000.safetensors", "error.txt"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "differ", "message"),
    [
        ({}, 1, "the processes differ in configuration: start all of them with"),
        ({"batch": 9, "mbstd_group": 1}, 0, "batch must be a multiple of the number of processes"),
    ],
)
def test_processes_that_do_not_belong_together(pair, config, tmp_path, changes, differ, message):
    found, _ = pair.both(tmp_path / "run", config=config("mlp", **changes), differ=differ)
    assert all(message in found[rank]["error"] for rank in (0, 1))
    assert not (tmp_path / "run").exists()


# ---- Exiting: programs call `fit` and never `close` ----


@pytest.mark.slow
def test_exits_while_gloo_still_holds_the_last_tensors(pair, config, tmp_path, capsys):
    """Each of these processes aborted about once in ten times when nothing closed the group."""
    runs = [tmp_path / str(n) for n in range(EXITS)]
    ended = [pair.run(run, config=config("mlp"), **{"slow gloo": True}) for run in runs]
    assert [one.codes for one in ended] == [[0, 0]] * EXITS, "\n".join(text for one in ended for text in one.output)
    with capsys.disabled():
        print(f"\n{EXITS} launches of two processes, all with exit code 0")


@pytest.mark.slow
def test_several_trainers_share_the_group(pair, config, tmp_path):
    ended = pair.run(tmp_path / "first", tmp_path / "second", config=config("mlp"))
    assert ended.codes == [0, 0], "\n".join(ended.output)
    assert ended.found == [[{"iteration": 4, "interrupted": False}] * 2] * 2


@pytest.mark.slow
def test_a_group_that_the_program_began_is_left_to_it(pair, config, tmp_path):
    ended = pair.run(tmp_path / "run", config=config("mlp"), **{"own group": True})
    assert [found[-1] for found in ended.found] == [{"still_there": True}] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("disturb", "code"), [("raise", 1), ("die", 3)])
def test_exits_after_a_failure_of_another_process(pair, config, tmp_path, disturb, code):
    """No process hangs or aborts."""
    ended = pair.run(tmp_path / "run", config=config("mlp"), disturb=disturb, iteration=2)
    assert ended.codes == [1, code], "\n".join(ended.output)
    assert "another of the 2 processes has ended; see the error it printed" in ended.output[0]


# ---- Both launchers, and a failure under one ----


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", port]
    # Without --multi_gpu it starts several processes on a CPU by MPI alone.
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port]
    command = [sys.executable, "-m", *(torchrun if launcher == "torchrun" else accelerate), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_one_failing_ends_all_and_the_run_resumes(config, by_one, tmp_path):
    settings, run = config("everything", snapshot_ticks=1), tmp_path / "run"
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    (tmp_path / "fault.py").write_text(_FAULT)
    arguments = ["train", "--config", str(tmp_path / "config.json"), "--out", str(run), "--quiet"]
    failed = launch("torchrun", str(tmp_path / "fault.py"), *arguments)
    assert failed.returncode != 0
    lines = failed.stdout.splitlines()
    assert "error in process 1 of 2: the images of process 1 are gone" in lines
    assert len([line for line in lines if line.startswith(f"{run}: 0.048 kimg on 2 processes on cpu")]) == 1
    # The launcher may end the other process before it can print its error.
    others = [line for line in lines if line.startswith("error in process 0")]
    assert all("another of the 2 processes has ended; see the error it printed" in line for line in others)
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{n:08d}.safetensors" for n in (4, 8)]

    done = launch("accelerate", "-m", "spigan", "train", "--resume", str(run), "--quiet")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Done. ") == 1
    assert_same_run(run, by_one)


# ---- Without other processes ----


@pytest.mark.parametrize("times", [1, 3])
def test_rows_of_all_processes_make_the_minibatch(times):
    """Dealt out image by image; and the groups of the minibatch standard deviation stay together."""
    x = torch.randn(12 * times, 2, 4, 4)
    parts = [Rows(3, rank, times).own(x) for rank in range(3)]
    assert Rows(3, 1, times).joint(len(parts[1])) == len(x)
    images = x.view(12, times, 2, 4, 4)
    for rank, part in enumerate(parts):
        assert torch.equal(part, images[rank::3].flatten(0, 1))
        assert torch.equal(Rows(3, rank, times).own(x.movedim(0, 1), dim=1), part.movedim(0, 1))
    whole = minibatch_std(x, 4)
    for rank, part in enumerate(parts):
        torch.testing.assert_close(minibatch_std(part, 4), Rows(3, rank, times).own(whole))
    assert Rows().own(x) is x and Rows().joint(5) == 5


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, but WORLD_SIZE, RANK"),
    ],
)
def test_processes_that_no_launcher_started(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        Processes(torch.device("cpu"))


def test_a_missing_accelerate_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(
        ImportError, match=r'training in 2 processes needs accelerate: pip install "spigan\[distributed\]"'
    ):
        Processes(torch.device("cpu"))


@pytest.mark.parametrize("command", ["demo", "ablate"])
def test_other_commands_run_in_one_process(monkeypatch, command):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(app, [command, *(["digits"] if command == "ablate" else [])])
    assert result.exit_code == 1
    assert f"error in process 1 of 2: {command} runs in one process" in result.output


def test_one_process_does_not_import_accelerate(new_trainer):
    before = sys.modules.pop("accelerate", None)
    try:
        new_trainer(total_kimg=0.004).fit()
        assert "accelerate" not in sys.modules
    finally:
        if before is not None:
            sys.modules["accelerate"] = before
