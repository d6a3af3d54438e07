"""Two processes (gloo, on the CPU) do what one does, go on with what one began, and end together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
# Small steps: Adam's first ones have the size of the learning rate whatever the gradient, so that where a gradient is
# nothing but rounding its sign would be, too.
JOB = {
    "batch": 8,
    "total_kimg": 0.048,
    "tick_kimg": 0.016,
    "mbstd_group": 2,
    "lr_g": 1e-5,
    "lr_d": 1e-5,
}  # 12 iterations
EVERYTHING = {
    "augment": "ada", "ada_kimg": 0.04, "ada_target": -1, "xflip": True, "r1_gamma": 1.0, "r1_interval": 2,
    "pl_weight": 1.0, "pl_interval": 2, "metric_samples": 41, "metric_ticks": 1,
}  # fmt: skip
CASES = {
    "everything": EVERYTHING,
    "joint": {"updates": "joint", "intervals": 3, "augment": "diffaug", "r1_interval": 1, "pl_weight": 1.0},
    "accumulated": {"batch_gpu": 2, "r1_interval": 1, "pl_weight": 1.0, "augment": "diffaug"},
    "mlp": {"model": {"mapping": "mlp"}, "intervals": 1, "xflip": True},
}

# Both processes do all jobs; what happened goes to a file for each. A job may be stopped by a signal to one of them.
_WORKER = r"""
import json, os, signal, sys
import torch
from spigan.config import TrainConfig
from spigan.training.trainer import Trainer

rank, found = int(os.environ["RANK"]), {}
for name, job in json.load(open(sys.argv[1])).items():
    try:
        if job.get("resume"):
            trainer = Trainer.resume(job["run"], progress=True)
        else:
            seed = job["config"].get("seed", 0) + rank * job.get("differ", 0)
            trainer = Trainer(TrainConfig.model_validate(job["config"] | {"seed": seed}), job["run"], progress=True)
        original = trainer.train_iteration
        def train_iteration(images):
            original(images)
            if rank == 1 and trainer.iteration == job.get("stop"):
                for _ in range(2):  # as where a batch system tells all and the launcher passes on its own
                    signal.raise_signal(signal.SIGTERM)
        trainer.train_iteration = train_iteration
        if rank == 0 and job.get("stop") == "measuring":
            measure = trainer.metrics.measure
            def measure_signalled(model):
                signal.raise_signal(signal.SIGTERM)
                return measure(model)
            trainer.metrics.measure = measure_signalled
        trainer.fit()
        found[name] = {"iteration": trainer.iteration, "interrupted": trainer.interrupted}
    except (ValueError, FloatingPointError) as error:
        found[name] = {"error": str(error)}
json.dump(found, open(f"{sys.argv[1]}.{rank}", "w"))
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


def stop(trainer: Trainer, iteration: int) -> Trainer:
    """Lets a signal arrive during an iteration."""
    original = trainer.train_iteration

    def train_iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == iteration:
            signal.raise_signal(signal.SIGTERM)

    trainer.train_iteration = train_iteration  # type: ignore[method-assign]
    return trainer


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


@pytest.fixture(scope="module")
def config(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    path = tmp_path_factory.mktemp("features") / "means.pt"
    torch.jit.script(Means()).save(str(path))

    def build(name: str, **changes: Any) -> TrainConfig:
        fields = JOB | CASES[name] | changes
        return tiny_config(**fields | ({"metric_features": str(path)} if "metric_ticks" in fields else {}))

    return build


@pytest.fixture(scope="module")
def runs(config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Runs of two processes and of one: their folder, what each of two saw, and what they printed."""
    folder = tmp_path_factory.mktemp("runs")
    os.environ["SPIGAN_CACHE"], before = str(folder / "cache"), os.environ.get("SPIGAN_CACHE")
    try:
        for name, changes in CASES.items():
            # What two processes do with batch_gpu at a time each, one does with twice as many.
            at_a_time = {"batch_gpu": 2 * changes["batch_gpu"]} if "batch_gpu" in changes else {}
            Trainer(config(name, **at_a_time), folder / f"{name} by one", progress=False).fit()
        stop(Trainer(config("everything"), folder / "from one to two", progress=False), iteration=5).fit()
        jobs: dict[str, dict[str, Any]] = {
            name: {"run": str(folder / name), "config": json.loads(config(name).model_dump_json())} for name in CASES
        }
        everything = jobs["everything"]["config"]
        jobs["from two to one"] = {"run": str(folder / "from two to one"), "config": everything, "stop": 5}
        jobs["from one to two"] = {"run": str(folder / "from one to two"), "resume": True}
        jobs["stopped measuring"] = {"run": str(folder / "stopped"), "config": everything, "stop": "measuring"}
        jobs["diverged"] = {"run": str(folder / "diverged"), "config": everything | {"grad_norm_limit": 1e-9}}
        jobs["other seeds"] = {"run": str(folder / "other seeds"), "config": everything, "differ": 1}
        jobs["odd batch"] = {"run": str(folder / "odd batch"), "config": everything | {"batch": 9, "mbstd_group": 1}}
        (folder / "jobs.json").write_text(json.dumps(jobs))
        (folder / "worker.py").write_text(_WORKER)
        done = launch("torchrun", str(folder / "worker.py"), str(folder / "jobs.json"))
        assert done.returncode == 0, done.stdout
        found = {rank: json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in (0, 1)}
        Trainer.resume(folder / "from two to one", progress=False).fit()
    finally:
        os.environ.pop("SPIGAN_CACHE")
        if before is not None:
            os.environ["SPIGAN_CACHE"] = before
    return folder, found, done.stdout


# ---- The same update ----


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_do_what_one_does(runs, name):
    """Gradients of D, R1, G and path length, EMA, ADA's p, data, noise, random numbers of every kind, metrics."""
    folder, found, _ = runs
    assert [found[rank][name] for rank in (0, 1)] == [{"iteration": 12, "interrupted": False}] * 2
    assert_same_run(folder / name, folder / f"{name} by one")
    tensors, state = end_of(folder / name)
    assert state["images_seen"] == 48 and state["images_drawn"] == 96
    if name == "everything":
        assert tensors["augment.p"] == pytest.approx(0.8)
        assert tensors["optimizer_g.0.exp_avg"].abs().max() > 0
        assert len(read_metrics(folder / name)) == 3
    noise = [key for key in tensors if key.endswith("noise_strength") and key.startswith("model.")]
    assert noise and all(tensors[key] != 0 for key in noise)  # began as 0: the drawn noise has had its gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", ["from two to one", "from one to two"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    """Stopped between a discriminator's and its generator's iteration, within a tick and within ADA's interval."""
    folder, found, output = runs
    assert_same_run(folder / name, folder / "everything by one")
    # The signal came to process 1 alone: both stopped after that iteration, and process 0 saved.
    interrupted = {"iteration": 5, "interrupted": True}
    assert [found[rank]["from two to one"] for rank in (0, 1)] == [interrupted] * 2
    assert output.count(f"spigan train --resume {folder / 'from two to one'}") == 1


@pytest.mark.slow
def test_a_signal_while_measuring_leaves_no_process_alone(runs):
    """The measurement, in which all talk to one another, is ended, then all stop and the state is saved."""
    folder, found, _ = runs
    interrupted = {"iteration": 4, "interrupted": True}
    assert [found[rank]["stopped measuring"] for rank in (0, 1)] == [interrupted] * 2
    assert len(read_metrics(folder / "stopped")) == 1
    assert [path.name for path in checkpoints(folder / "stopped")][-1] == "checkpoint-00000004.safetensors"


@pytest.mark.slow
def test_all_processes_find_the_same_divergence_and_the_main_one_saves_it(runs):
    folder, found, _ = runs
    told = [found[rank]["diverged"]["error"] for rank in (0, 1)]
    assert all(error.startswith("training has diverged: grad_norm_d (") for error in told)
    assert told[0].startswith(told[1]) and "The current state, with gradients, is in" in told[0]
    assert [path.name for path in checkpoints(folder / "diverged")] == ["checkpoint-00000000.safetensors"]
    assert {path.name for path in (folder / "diverged" / "failed").iterdir()} == {
        "state-00000000.safetensors",
        "error.txt",
    }


@pytest.mark.slow
def test_processes_that_do_not_belong_together(runs):
    folder, found, _ = runs
    for rank in (0, 1):
        assert "the processes differ in configuration: start all of them with" in found[rank]["other seeds"]["error"]
        error = "batch must be a multiple of the number of processes times batch_gpu, 2 x 1, got 9"
        assert found[rank]["odd batch"]["error"] == error
    assert not (folder / "other seeds").exists() and not (folder / "odd batch").exists()


@pytest.mark.slow
def test_the_main_process_alone_shows_progress_and_writes(runs):
    folder, _, output = runs
    assert output.count(" 48/48 ") == output.count("100%") > 0
    for run in (folder / "everything", folder / "everything by one"):
        assert len([path for path in run.iterdir() if path.name.startswith("events")]) == 1
    assert {p.name for p in (folder / "everything").iterdir() if not p.name.startswith("events")} == {
        p.name for p in (folder / "everything by one").iterdir() if not p.name.startswith("events")
    }


# ---- Failure of one of them, and both launchers ----


@pytest.mark.slow
def test_one_failing_ends_all_and_the_run_goes_on(config, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    settings, run = config("everything", snapshot_ticks=1), tmp_path / "run"
    (tmp_path / "config.json").write_text(settings.model_dump_json())
    (tmp_path / "fault.py").write_text(_FAULT)
    arguments = ["train", "--config", str(tmp_path / "config.json"), "--out", str(run), "--quiet"]
    failed = launch("torchrun", str(tmp_path / "fault.py"), *arguments)
    assert failed.returncode != 0
    lines = failed.stdout.splitlines()
    assert "error in process 1 of 2: the images of process 1 are gone" in lines
    assert lines.count(f"{run}: 0.048 kimg on 2 processes on cpu, K = 2") == 1
    # The other may be ended by the launcher before it can tell.
    others = [line for line in lines if line.startswith("error in process 0")]
    assert all("another of the 2 processes has ended; its own error says why" in line for line in others)
    assert [path.name for path in checkpoints(run)] == [f"checkpoint-{n:08d}.safetensors" for n in (4, 8)]

    done = launch("accelerate", "-m", "spigan", "train", "--resume", str(run), "--quiet")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("Done: ") == 1
    Trainer(settings, tmp_path / "straight", progress=False).fit()
    assert_same_run(run, tmp_path / "straight")


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
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE says 2 processes, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE says 4 processes, but WORLD_SIZE, RANK"),
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
    with pytest.raises(ImportError, match=r'2 processes train through accelerate: pip install "spigan\[distributed\]"'):
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
