"""A run that was stopped, killed or damaged: what is left is whole, and going on equals never having stopped."""

from __future__ import annotations

import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from spigan.cli import app
from spigan.config import TrainConfig
from spigan.runs import read_config, read_stats
from spigan.training import checkpoint
from spigan.training.checkpoint import (
    checkpoint_path,
    checkpoints,
    load_checkpoint,
    load_module,
    load_optimizer,
    module_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from spigan.training.trainer import Trainer

TIMES = {"seconds", "images_per_sec"}  # all of a row that may differ


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_stats(run_dir)]


def assert_same_end(run_dir: Path, expected: Path) -> None:
    """Both runs ended in the same state, to the bit, and wrote the same statistics on the way."""
    (tensors, state), (expected_tensors, expected_state) = (
        load_checkpoint(checkpoints(folder)[-1]) for folder in (run_dir, expected)
    )
    assert {k: v for k, v in state.items() if k != "elapsed"} == {
        k: v for k, v in expected_state.items() if k != "elapsed"
    }
    assert tensors.keys() == expected_tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected_tensors[name])] == []
    assert rows(run_dir) == rows(expected)


def stop_after(trainer: Trainer, iteration: int, number: signal.Signals) -> None:
    """A signal arrives during an iteration."""
    original = trainer.train_iteration

    def train_iteration(images: Tensor) -> None:
        original(images)
        if trainer.iteration == iteration:
            signal.raise_signal(number)

    trainer.train_iteration = train_iteration  # type: ignore[method-assign]


def disturb() -> None:
    """What other code may do to the global generators between two sessions."""
    torch.manual_seed(99)
    torch.rand(17)
    np.random.seed(99)  # noqa: NPY002  # the global generator is the point
    random.seed(99)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def finished(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 iterations with checkpoints of the last two; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    Trainer(tiny_config(snapshot_ticks=1), folder, progress=False).fit()
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` to break."""
    return shutil.copytree(finished, tmp_path / "copy")


# ---- Exact resume ----


@pytest.mark.parametrize(
    ("stops", "changes"),
    # A tick ends with iterations 4, 8 and 12. Odd: between a discriminator's and its generator's iteration.
    [
        ((3, 8), {}),
        ((1, 6), {"updates": "joint", "intervals": 3, "mbstd_group": 2}),
        ((5, 9), {"augment": "ada", "ada_kimg": 0.1}),
        ((6,), {"augment": "diffaug"}),
        ((3, 7), {"pl_weight": 2.0}),
        ((7,), {"precision": "bf16", "r1_interval": 4}),
        ((2,), {"xflip": True, "batch_gpu": 2}),
        ((5,), {"model": {"mapping": "mlp"}, "intervals": 1}),
        ((5,), {"path": "analytic", "times": "split"}),
    ],
    ids=["sequential", "joint", "ada", "diffaug", "path length", "bf16", "xflip", "mlp", "split"],
)
def test_a_stopped_run_equals_one_that_never_stopped(tiny_config, tmp_path, stops, changes):
    config = tiny_config(**changes)
    Trainer(config, tmp_path / "straight", progress=False).fit()
    trainer = Trainer(config, tmp_path / "stopped", progress=False)
    for stop, number in zip(stops, (signal.SIGINT, signal.SIGTERM), strict=False):
        stop_after(trainer, stop, number)
        trainer.fit()
        assert trainer.interrupted and trainer.iteration == stop
        disturb()
        trainer = Trainer.resume(tmp_path / "stopped", progress=False)
        assert trainer.iteration == stop
    trainer.fit()
    assert not trainer.interrupted and trainer.iteration == 12
    assert_same_end(tmp_path / "stopped", tmp_path / "straight")
    assert len(rows(tmp_path / "stopped")) == 3
    for name, tensor in trainer.ema.state_dict().items():  # what fit returns is what was saved
        assert torch.equal(tensor, load_checkpoint(checkpoints(trainer.run_dir)[-1])[0][f"ema.{name}"])


def test_noise_goes_on_where_it_stopped(copy):
    trainer = Trainer.resume(copy, total_kimg=0.1, progress=False)
    assert trainer.state.noise_offset == 12 * 4 * 64
    assert (trainer.iteration, trainer.images_seen, trainer.state.images_drawn) == (12, 24, 48)


def test_a_longer_resume_equals_one_long_run(tiny_config, finished, tmp_path):
    """The first part ends between ticks (5 of 8 images); only config.json then tells that there were two."""
    Trainer(tiny_config(total_kimg=0.012, snapshot_ticks=1), tmp_path / "run", progress=False).fit()
    assert len(rows(tmp_path / "run")) == 1
    trainer = Trainer.resume(tmp_path / "run", total_kimg=0.024, progress=False)
    assert trainer.config.total_kimg == 0.024 and read_config(tmp_path / "run").total_kimg == 0.024
    trainer.fit()
    assert_same_end(tmp_path / "run", finished)


def test_resuming_a_finished_run_changes_nothing(finished, copy):
    trainer = Trainer.resume(copy, progress=False)
    trainer.fit()
    assert trainer.iteration == 12
    assert_same_end(copy, finished)


def test_a_run_stopped_before_its_first_iteration(finished, copy):
    """Only the checkpoint of iteration 0 is left."""
    config = read_config(copy)
    trainer = Trainer(config, copy.parent / "new", progress=False)
    trainer.snapshot()
    disturb()
    Trainer.resume(trainer.run_dir, progress=False).fit()
    assert_same_end(trainer.run_dir, finished)


def test_elapsed_time_adds_up(copy):
    before = read_stats(copy)[-1]["seconds"]
    Trainer.resume(copy, total_kimg=0.032, progress=False).fit()
    assert read_stats(copy)[-1]["seconds"] > before > 0


# ---- Signals, in processes of their own ----


def cli(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spigan.cli", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "nothing happened for two minutes"
        time.sleep(0.02)


@pytest.mark.slow
def test_sigint_and_sigterm_save_and_tell_how_to_go_on(tiny_config, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(tiny_config(total_kimg=1000).model_dump_json())
    numbers = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM}
    processes = {
        name: cli("train", "--config", str(config), "--out", str(tmp_path / name), "--quiet") for name in numbers
    }
    commands = {}
    try:
        for name, process in processes.items():
            wait_for(lambda name=name: len(read_stats(tmp_path / name)) >= 2, process)
            process.send_signal(numbers[name])
            output, _ = process.communicate(timeout=60)
            assert process.returncode == 130, output
            assert "Traceback" not in output
            commands[name] = next(line.strip() for line in output.splitlines() if "spigan train --resume" in line)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()

    for name, command in commands.items():
        program, *arguments = shlex.split(command[command.index("spigan train") :])
        assert program == "spigan" and arguments == ["train", "--resume", str(tmp_path / name)]
        (_, state) = load_checkpoint(checkpoints(tmp_path / name)[-1])
        assert state["iteration"] >= 8
    # One goes on by the command that was printed, the other by its Python twin.
    ends = {name: load_checkpoint(checkpoints(tmp_path / name)[-1])[1]["images_seen"] + 20 for name in numbers}
    arguments = ["train", "--resume", str(tmp_path / "SIGINT"), "--kimg", str(ends["SIGINT"] / 1000), "--quiet"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    Trainer.resume(tmp_path / "SIGTERM", total_kimg=ends["SIGTERM"] / 1000, progress=False).fit()
    straight = Trainer(read_config(tmp_path / "SIGINT"), tmp_path / "straight", progress=False)
    straight.fit()
    assert_same_end(tmp_path / "SIGINT", tmp_path / "straight")
    state = load_checkpoint(checkpoints(tmp_path / "SIGTERM")[-1])[1]
    assert state["images_seen"] == pytest.approx(ends["SIGTERM"], abs=4)


# ---- Writing ----


def test_a_failure_while_saving_leaves_the_last_checkpoint(new_trainer, finished, monkeypatch):
    trainer = new_trainer(snapshot_ticks=1)
    whole, calls = checkpoint.save_file, []

    def full_disk(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(path)
        whole(tensors, path, metadata)
        if len(calls) == 3:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit()
    names = [path.name for path in (trainer.run_dir / "checkpoints").iterdir()]
    assert sorted(names) == ["checkpoint-00000000.safetensors", "checkpoint-00000004.safetensors"]
    monkeypatch.undo()
    disturb()
    Trainer.resume(trainer.run_dir, progress=False).fit()
    assert_same_end(trainer.run_dir, finished)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(new_trainer, keep):
    trainer = new_trainer(tick_kimg=0.004, snapshot_ticks=1, keep_checkpoints=keep)
    folder = trainer.run_dir / "checkpoints"
    folder.mkdir()
    others = {"notes.txt", "checkpoint-best.safetensors", ".checkpoint-00000099.safetensors-k3.safetensors"}
    for name in others:
        (folder / name).write_text("not ours to delete")
    trainer.fit()
    kept = [checkpoint_path(trainer.run_dir, iteration) for iteration in (8, 10, 12)[-keep:]]
    assert checkpoints(trainer.run_dir) == kept
    assert {path.name for path in folder.iterdir()} == others | {path.name for path in kept}


def test_checkpoints_are_ordered_by_number(tmp_path):
    assert checkpoints(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    expected = [checkpoint_path(tmp_path, iteration) for iteration in (7, 10, 99_999_999, 100_000_000)]
    for path in reversed(expected):
        path.touch()
    assert checkpoints(tmp_path) == expected


def test_round_trip(tmp_path):
    tensors = {
        "float": torch.randn(3, 4).T,
        "scalar": torch.tensor(0.1, dtype=torch.float64),
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8),
        "half": torch.randn(2, 3, 4, 5).bfloat16().to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
    }
    state = {"iteration": 3, "elapsed": 0.1 + 0.2, "text": "ü"}
    save_checkpoint(tmp_path / "deep" / "a.safetensors", tensors, state)
    loaded, loaded_state = load_checkpoint(tmp_path / "deep" / "a.safetensors")
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_optimizer_round_trip():
    """The state of one that has stepped, in the layout of its parameters, and with a parameter that never had one."""

    def build() -> tuple[nn.Module, torch.optim.Adam]:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)
        module.register_parameter("scalar", nn.Parameter(torch.tensor(1.0)))
        module.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return module, torch.optim.Adam(module.parameters(), lr=0.1, betas=(0.0, 0.9), fused=True)

    def step(module: nn.Module, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        (module(torch.ones(1, 3, 5, 5)).square().sum() * module.scalar).backward()
        optimizer.step()

    module, optimizer = build()
    step(module, optimizer)
    saved = {**optimizer_tensors("o", optimizer), **module_tensors("m", module), "other.1": torch.ones(1)}
    saved = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in saved.items()}
    other, other_optimizer = build()
    load_module("m", other, saved)
    load_optimizer("o", other_optimizer, saved)
    for name, moment in optimizer_tensors("o", other_optimizer).items():
        assert torch.equal(moment, saved[name])
        if moment.ndim:
            parameter = list(other.parameters())[int(name.split(".")[1])]
            assert moment.stride() == parameter.stride()
    assert optimizer.state_dict()["state"].keys() == other_optimizer.state_dict()["state"].keys()
    for each in ((module, optimizer), (other, other_optimizer)):
        step(*each)
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_load_module_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"m.weight is torch.float32 \[3, 3\], expected torch.float32 \[3, 2\]"):
        load_module("m", nn.Linear(2, 3), module_tensors("m", nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"lacks 'm\.weight'"):
        load_module("m", nn.Linear(2, 3), module_tensors("n", nn.Linear(2, 3)))


# ---- What cannot be resumed ----


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "damage",
    [
        _half,
        lambda data: b"",
        lambda data: data[:4],
        lambda data: b"\xff" * 64 + data[64:],
        lambda data: data[:100] + b"\x00" * 50 + data[150:],
    ],
    ids=["half", "empty", "four bytes", "length overwritten", "header overwritten"],
)
def test_damaged_checkpoint(finished, copy, damage):
    before, newest = checkpoints(copy)
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.raises(ValueError, match="damaged") as caught:
        Trainer.resume(copy, progress=False)
    assert str(newest) in str(caught.value) and "remove it" in str(caught.value)
    newest.unlink()  # as the message says
    trainer = Trainer.resume(copy, progress=False)
    assert checkpoint_path(copy, trainer.iteration) == before
    trainer.fit()
    assert_same_end(copy, finished)


def test_foreign_safetensors(copy):
    newest = checkpoints(copy)[-1]
    shutil.copy(copy / "model" / "model.safetensors", newest)
    with pytest.raises(ValueError, match=r"is not a spigan checkpoint of format 1") as caught:
        Trainer.resume(copy, progress=False)
    assert str(newest) in str(caught.value)
    save_file({"a": torch.ones(1)}, newest, {"spigan_checkpoint": "2", "state": "{}"})
    with pytest.raises(ValueError, match="is not a spigan checkpoint of format 1"):
        load_checkpoint(newest)


@pytest.mark.parametrize("missing", ["pl_mean", "rng.cpu", "noise_offset", "elapsed"])
def test_checkpoint_that_lacks_something(copy, missing):
    newest = checkpoints(copy)[-1]
    tensors, state = load_checkpoint(newest)
    tensors.pop(missing, None)
    state.pop(missing, None)
    save_checkpoint(newest, tensors, state)
    with pytest.raises(ValueError, match=f"lacks '{missing}'") as caught:
        Trainer.resume(copy, progress=False)
    assert str(newest) in str(caught.value)


@pytest.mark.parametrize(
    "model", [{"dim_h": 24}, {"resolution": 16}, {"ode_layers": 2}, {"mapping": "mlp"}, {"channel_max": 4}]
)
def test_checkpoint_of_another_architecture(copy, model):
    config = json.loads((copy / "config.json").read_text())
    config["model"] |= model
    config["intervals"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    if "resolution" in model:  # or it would be refused for other images
        record = json.loads((copy / "data.json").read_text())
        fresh = Trainer(TrainConfig.model_validate(config), copy.parent / "fresh", progress=False)
        record["fingerprint"] = fresh.dataset.fingerprint
        (copy / "data.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not fit the run's configuration") as caught:
        Trainer.resume(copy, progress=False)
    assert str(checkpoints(copy)[-1]) in str(caught.value)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a run folder: it has no config\.json"):
        Trainer.resume(tmp_path / "nowhere", progress=False)
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        Trainer.resume(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_checkpoint(copy):
    for path in checkpoints(copy):
        path.rename(path.with_name("." + path.name))  # as a scratch file would be called
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume from"):
        Trainer.resume(copy, progress=False)


def test_other_images(tiny_config, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(6):
        Image.fromarray(np.full((8, 8), 40 * number, dtype=np.uint8)).save(data / f"{number}.png")
    config = tiny_config(data={"source": str(data)}, total_kimg=0.004)
    Trainer(config, tmp_path / "run", progress=False).fit()
    assert Trainer.resume(tmp_path / "run", progress=False).iteration == 2
    Image.fromarray(np.full((8, 8), 1, dtype=np.uint8)).save(data / "0.png")
    before = files_of(tmp_path / "run")
    with pytest.raises(ValueError, match=r"are not those that .* was trained on"):
        Trainer.resume(tmp_path / "run", total_kimg=9, progress=False)
    assert files_of(tmp_path / "run") == before  # nothing was changed, not even the length


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "config.json", "data.json.bak", "my-data.json"])
def test_a_folder_in_use_is_refused_and_left_alone(tiny_config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("precious")
    with pytest.raises(FileExistsError, match=r"not empty: choose another folder.*--resume"):
        Trainer(tiny_config(), tmp_path / "run", progress=False)
    assert files_of(tmp_path / "run") == {name: b"precious"}


def test_a_finished_run_is_not_overwritten(tiny_config, copy):
    before = files_of(copy)
    with pytest.raises(FileExistsError, match="not empty"):
        Trainer(tiny_config(), copy, progress=False)
    assert files_of(copy) == before


def test_an_empty_folder_is_used(tiny_config, tmp_path):
    Trainer(tiny_config(), tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "data.json"}
