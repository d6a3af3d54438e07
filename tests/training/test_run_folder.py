"""What a run leaves on disk: that it is complete, reads back equal, and is what it says."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spigan import SPIGAN
from spigan.config import TrainConfig
from spigan.files import write_text
from spigan.images import make_grid, to_uint8
from spigan.ops import philox_normal
from spigan.runs import read_config, read_stats
from spigan.training.checkpoint import checkpoints
from spigan.training.run_folder import next_run_dir
from spigan.training.statistics import StatsLog
from spigan.training.trainer import Trainer

ALWAYS = ["iteration", "kimg", "seconds", "images_per_sec"]
MEANS = {"loss_d", "loss_g", "real_logit", "fake_logit", "real_sign", "grad_norm_d", "grad_norm_g"}


@pytest.fixture(scope="module")
def trained(tiny_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A finished run of 12 iterations and three ticks; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_config(augment="ada", pl_weight=1.0, pl_interval=2, r1_interval=2, xflip=True, seed=5)
    trainer = Trainer(config, folder, progress=False)
    trainer.fit()
    return trainer


@pytest.fixture
def copy(trained: Trainer, tmp_path: Path) -> Path:
    """A copy of `trained` to go on with or to break."""
    return shutil.copytree(trained.run_dir, tmp_path / "copy")


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_files(trained):
    names = {path.name for path in trained.run_dir.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json", "data.json", "stats.jsonl", "reals.png", "samples-000000.png", "checkpoints", "model",
    }  # fmt: skip
    everything = [path for path in trained.run_dir.rglob("*") if path.is_file()]
    assert not [path for path in everything if path.name.startswith(".")]  # no scratch files


# ---- Configuration and data ----


def test_config_reads_back_equal(trained):
    assert read_config(trained.run_dir) == trained.config
    assert json.loads((trained.run_dir / "config.json").read_text())["model"]["dim_h"] == 16


def test_config_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"data": {"source": "digits"}, "batch": 0}', '{"unknown": 1}'])
def test_damaged_config(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="is not the configuration of a training run") as caught:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_config_of_a_model_is_not_that_of_a_run(trained):
    with pytest.raises(ValueError, match="is not the configuration of a training run"):
        read_config(trained.run_dir / "model")


def test_data_record(trained, tiny_config, tmp_path):
    """Whatever changes the images that D sees as real, and so every metric, is on record."""
    record = json.loads((trained.run_dir / "data.json").read_text())
    assert {
        "source": "digits", "split": "train", "count": 1797, "resolution": 8, "channels": 1,
        "resize": "lanczos", "crop": "center", "xflip": True,
    }.items() <= record.items()  # fmt: skip
    assert record["fingerprint"] == trained.dataset.fingerprint and len(record["fingerprint"]) == 64
    other = tiny_config(data={"source": "digits", "resize": "box", "crop": "none"}, model={"resolution": 16})
    Trainer(other, tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (record["resize"], record["crop"], record["xflip"]) == ("box", "none", False)
    assert record["resolution"] == 16 and record["native_width"] == [8, 8]


# ---- Statistics ----


def test_stats(trained):
    lines = (trained.run_dir / "stats.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == read_stats(trained.run_dir)
    assert [(row["iteration"], row["kimg"]) for row in rows] == [(4, 0.008), (8, 0.016), (12, 0.024)]
    for row in rows:
        assert list(row)[:4] == ALWAYS
        # Two rounds a tick, so penalties of every second round are due once a tick.
        assert set(row) - set(ALWAYS) == MEANS | {
            "augment_p", "r1", "grad_norm_r1", "path_length", "path_length_penalty", "grad_norm_pl",
        }  # fmt: skip
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
        assert row["images_per_sec"] > 0 and -1 <= row["real_sign"] <= 1 and 0 <= row["augment_p"] <= 1
    assert [row["seconds"] for row in rows] == sorted({row["seconds"] for row in rows})


def test_stats_of_a_plain_run(new_trainer):
    trainer = new_trainer(total_kimg=0.008, r1_gamma=0)
    trainer.fit()
    (row,) = read_stats(trainer.run_dir)
    assert set(row) == {*ALWAYS, *MEANS}


def test_stats_are_means_of_the_tick(new_trainer, monkeypatch):
    trainer = new_trainer(r1_gamma=0)
    values = iter(range(100))
    monkeypatch.setattr("spigan.training.updates.generator_loss", lambda logits: 0 * logits.sum() + float(next(values)))
    trainer.fit()
    # Two generator iterations a tick, two updates each: 0..3, 4..7, 8..11.
    assert [row["loss_g"] for row in read_stats(trainer.run_dir)] == [1.5, 5.5, 9.5]


def test_ticks_of_batches_that_do_not_divide_them(new_trainer):
    """A tick ends with the batch that reaches it."""
    trainer = new_trainer(batch=6, total_kimg=0.036, tick_kimg=0.01)
    trainer.fit()
    assert [row["kimg"] for row in read_stats(trainer.run_dir)] == [0.012, 0.024, 0.03]


@pytest.mark.parametrize("cut", [1, 20, -2])
def test_a_half_written_line_is_dropped(copy, cut):
    path = copy / "stats.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    before = read_stats(copy)
    path.write_text("".join(lines) + lines[-1][:cut])
    assert read_stats(copy) == before
    Trainer.resume(copy, total_kimg=0.032, progress=False).fit()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[:3] == before and [row["iteration"] for row in rows] == [4, 8, 12, 16]


def test_rows_beyond_the_checkpoint_are_dropped(tmp_path):
    """They are of an attempt that was killed before it saved what it had measured; they will be measured again."""
    first = StatsLog(tmp_path, 0)
    for iteration in (4, 8, 12):
        first.write({"iteration": iteration, "loss_d": float(iteration)})
    first.close()
    again = StatsLog(tmp_path, 8)
    again.write({"iteration": 12, "loss_d": -12.0})
    again.close()
    assert [(row["iteration"], row["loss_d"]) for row in read_stats(tmp_path)] == [(4, 4.0), (8, 8.0), (12, -12.0)]
    assert scalars(tmp_path) == {"loss_d": [(4, 4.0), (8, 8.0), (12, -12.0)]}


def test_rows_of_an_attempt_without_a_checkpoint_are_dropped(tmp_path):
    first = StatsLog(tmp_path, 0)
    first.write({"iteration": 4, "loss_d": 1.0})
    first.close()
    time.sleep(1.1)  # TensorBoard orders its files by the second in their names
    again = StatsLog(tmp_path, 0)
    again.write({"iteration": 4, "loss_d": 2.0})
    again.write({"iteration": 8, "loss_d": 3.0})
    again.close()
    assert [row["loss_d"] for row in read_stats(tmp_path)] == [2.0, 3.0]
    assert scalars(tmp_path) == {"loss_d": [(4, 2.0), (8, 3.0)]}


def test_a_row_is_on_disk_when_write_returns(tmp_path):
    log = StatsLog(tmp_path, 0)
    log.write({"iteration": 4, "loss_d": 1.5})
    assert (tmp_path / "stats.jsonl").read_text() == '{"iteration": 4, "loss_d": 1.5}\n'
    assert scalars(tmp_path) == {"loss_d": [(4, 1.5)]}
    log.close()


def test_no_stats(tmp_path):
    assert read_stats(tmp_path) == []


def test_tensorboard_has_the_same_numbers(trained):
    rows = read_stats(trained.run_dir)
    expected = {
        name: [(row["iteration"], pytest.approx(row[name], rel=1e-6, abs=1e-9)) for row in rows]
        for name in rows[0]
        if name != "iteration"
    }
    assert scalars(trained.run_dir) == expected


def test_tensorboard_of_a_resumed_run_is_one_curve(copy):
    Trainer.resume(copy, total_kimg=0.032, progress=False).fit()
    assert len(list(copy.glob("events.out.tfevents*"))) == 2
    found = scalars(copy)
    assert [step for step, _ in found["loss_d"]] == [4, 8, 12, 16]
    assert [value for _, value in found["loss_d"]] == pytest.approx([row["loss_d"] for row in read_stats(copy)])


# ---- Pictures ----


def picture(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "L"
        return torch.from_numpy(np.array(image))[None]


def test_reals(trained):
    """64 images spread over the data, 8 in a row, each pixel enlarged 8 times, with gaps of 1."""
    grid = picture(trained.run_dir / "reals.png")
    assert grid.shape == (1, 568, 568)
    images = trained.dataset.__getitems__([28 * i for i in range(64)])
    assert torch.equal(grid, make_grid(images, columns=8, scale=8))


def test_reals_of_a_small_set(tiny_config, tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(5):
        Image.fromarray(np.full((8, 8), 50 * number, dtype=np.uint8)).save(tmp_path / "data" / f"{number}.png")
    trainer = Trainer(
        tiny_config(data={"source": str(tmp_path / "data")}, total_kimg=0.004), tmp_path / "run", progress=False
    )
    trainer.fit()
    grid = picture(trainer.run_dir / "reals.png")
    assert grid.shape == (1, 64, 568)
    assert grid[0, 0, [0, 72, 144, 216, 288, 360]].tolist() == [0, 50, 100, 150, 200, 0]


@pytest.mark.parametrize(("resolution", "size"), [(8, 568), (16, 540)])
def test_samples_are_the_averaged_model_of_seeds_0_to_63(new_trainer, resolution, size):
    trainer = new_trainer(model={"resolution": resolution}, total_kimg=0.004)
    trainer.fit()
    grid = picture(trainer.run_dir / "samples-000000.png")
    assert grid.shape == (1, size, size)
    z = philox_normal((64, 1, resolution, resolution), seed=torch.arange(64))
    with torch.no_grad():
        expected = make_grid(to_uint8(trainer.ema(z)), columns=8, scale=64 // resolution)
    # In batches of another size the sums are rounded in another order.
    assert (grid.int() - expected.int()).abs().max() <= 1
    assert grid.float().std() > 1, "an empty picture"


def test_sample_grid_depends_on_the_weights_alone(trained):
    first = trained.sample_grid()
    torch.manual_seed(1234)
    assert torch.equal(trained.sample_grid(), first)
    assert torch.equal(Trainer.resume(trained.run_dir, progress=False).sample_grid(), first)
    assert torch.equal(picture(trained.run_dir / "samples-000000.png"), first)


def test_drawing_samples_does_not_touch_the_generator(trained):
    before = torch.get_rng_state()
    trained.sample_grid()
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures_are_named_by_kimg(new_trainer):
    trainer = new_trainer(batch=500, total_kimg=2, tick_kimg=1, snapshot_ticks=1)

    def iteration(images: torch.Tensor) -> None:
        """In place of training: count only."""
        trainer.state.images_seen += len(images) * (trainer.iteration % 2 == 0)
        trainer.state.record(loss_d=torch.zeros(()), loss_g=torch.zeros(()))
        trainer.state.iteration += 1

    trainer.train_iteration = iteration  # type: ignore[method-assign]
    trainer.fit()
    names = sorted(path.name for path in trainer.run_dir.glob("samples-*"))
    assert names == ["samples-000000.png", "samples-000001.png", "samples-000002.png"]


# ---- Exported model ----


def test_model_is_the_averaged_one(trained):
    model = SPIGAN.from_pretrained(trained.run_dir / "model")
    assert model.config == trained.config.model and not model.training
    expected, raw = trained.ema.state_dict(), trained.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(expected["generator.b8.conv1.weight"], raw["generator.b8.conv1.weight"])
    z = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(z), trained.ema(z), rtol=1e-5, atol=1e-6)


def test_snapshots_come_every_so_many_ticks(new_trainer):
    trainer = new_trainer(tick_kimg=0.004, snapshot_ticks=2, total_kimg=0.02, keep_checkpoints=99)
    trainer.fit()
    numbers = [int(path.stem.removeprefix("checkpoint-")) for path in checkpoints(trainer.run_dir)]
    assert numbers == [0, 4, 8, 10]


# ---- Folders and files ----


def test_next_run_dir(tmp_path):
    runs = tmp_path / "runs"
    assert next_run_dir(runs) == runs / "00000"
    assert not runs.exists()
    for name in ("00000", "00007", "other", "12a"):
        (runs / name).mkdir(parents=True)
    assert next_run_dir(runs) == runs / "00008"


def test_a_trainer_without_a_folder_takes_the_next(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [Trainer(tiny_config(), progress=False).run_dir for _ in range(2)]
    assert folders == [Path("runs/00000"), Path("runs/00001")]
    assert (tmp_path / "runs" / "00001" / "config.json").is_file()


def test_write_text_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "erste Fassung: ü\n")
    assert path.read_bytes() == "erste Fassung: ü\n".encode()

    def half(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[:3])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "second version")
    assert path.read_bytes() == "erste Fassung: ü\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
