"""The command line: what each command writes, and that a mistake costs one line, not a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import onnxruntime
import pytest
import torch
import typer.main
from PIL import Image
from typer.testing import CliRunner

import spigan
from spigan import SPIGAN, ModelConfig
from spigan.cli import app
from spigan.sampling import Sampler

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
COMMANDS |= {f"data {name}": command for name, command in COMMANDS.pop("data").commands.items()}
TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
# The digits preset with a network that trains in a moment.
TINY_RUN = ["--preset", "digits", "--batch", "8", "--device", "cpu", "--quiet"] + [
    f"--set={field}"
    for field in (
        "model.dim_h=8",
        "model.embed_channels=2",
        "model.channel_base=32",
        "model.channel_max=4",
        "tick_kimg=0.05",
    )
]


def spigan_cli(*args: Any) -> Any:
    """Run `spigan ARGS` in this process."""
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "200", "TERM": "dumb"})


def run(*args: Any) -> str:
    """What `spigan ARGS` prints; it must succeed."""
    result = spigan_cli(*args)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def refused(*args: Any) -> str:
    """The one line with which `spigan ARGS` ends."""
    result = spigan_cli(*args)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)  # anything else would be a traceback
    lines = [line for line in re.split(r"[\r\n]", result.stderr) if line.strip() and "img/s" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model of 8x8 RGB images."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    SPIGAN(ModelConfig.model_validate(TINY)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 0.1 kimg."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    output = run("train", "--out", folder, "--kimg", 0.1, *TINY_RUN)
    assert f"{folder}: 0.1 kimg on cpu, K = 2" in output
    return folder


def pixels(model: Path, n: int, seed: int = 0, **options: Any) -> np.ndarray:
    """uint8 [N, H, W, C] that the saved model makes on the CPU."""
    sampler = Sampler(model, device="cpu", output="uint8", **options)
    return sampler(range(seed, seed + n)).movedim(-3, -1).numpy()


def close(a: np.ndarray, b: np.ndarray, levels: int = 1) -> bool:
    """Whether uint8 images are equal up to rounding."""
    return a.shape == b.shape and int(np.abs(a.astype(int) - b.astype(int)).max()) <= levels


def test_version() -> None:
    assert run("--version") == f"spigan {spigan.__version__}\n"


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_option(name: str, flag: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(*name.split(), flag))
    options = [option for parameter in COMMANDS[name].params for option in parameter.opts if option.startswith("--")]
    assert options
    assert not [option for option in options if option not in text]
    assert COMMANDS[name].help.split(".")[0].split("\n")[0] in text


def test_help_of_the_program_lists_every_command() -> None:
    text = run("--help")
    assert {"demo", "train", "sample", "evaluate", "interpolate", "ablate", "export", "bench", "info"} <= set(COMMANDS)
    assert not [name for name in COMMANDS if name.split()[0] not in text]


def test_help_is_fast_since_it_loads_no_torch() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from spigan.cli import app\n"
        "for command in ('', 'train', 'sample', 'evaluate', 'interpolate', 'ablate', 'export', 'data'):\n"
        "    assert CliRunner().invoke(app, [*filter(None, [command]), '--help']).exit_code == 0\n"
        "print({'torch', 'numpy', 'sklearn', 'datasets'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "set()\n"


def test_installed_command() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "from spigan.cli import main; main()", "train", "--batch", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and result.stderr.startswith("error: batch: ")
    assert result.stdout == ""


def test_unknown_command_and_option() -> None:
    for arguments, wrong in (
        (["sampel"], "sampel"),
        (["sample", "--nmu", "3"], "--nmu"),
        (["sample", "-n", "0"], "-n"),
    ):
        result = spigan_cli(*arguments)
        assert result.exit_code == 2
        assert wrong in result.stderr and "Traceback" not in result.stderr


# ---- sample ----


def test_sample_to_a_folder_names_files_by_seed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "images"
    output = run("sample", "--model", model, "-n", 3, "--seed", 41, "--batch", 2, "--out", out, "--device", "cpu")
    assert "3 images in " in output and "NFE = 1:" in output
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["seed000041.png", "seed000042.png", "seed000043.png"]
    for file, expected in zip(files, pixels(model, 3, 41), strict=True):
        with Image.open(file) as image:
            assert image.mode == "RGB" and close(np.asarray(image), expected)


def test_sample_to_a_grid(model: Path, tmp_path: Path) -> None:
    run("sample", "--model", model, "-n", 5, "--out", tmp_path / "grid.png", "--device", "cpu")
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)
    # 3 rows of 2 columns of 8 pixels with a gap of 1, enlarged 8 times.
    assert grid.shape == (26 * 8, 17 * 8, 3)
    small = grid[::8, ::8]
    expected = pixels(model, 5)
    for i in range(5):
        top, left = i // 2 * 9, i % 2 * 9
        assert close(small[top : top + 8, left : left + 8], expected[i])
    assert not small[8].any() and not small[:, 8].any() and not small[18:, 9:].any()


@pytest.mark.parametrize("t", [0.5, 1.0])
def test_sample_to_npz(model: Path, tmp_path: Path, t: float) -> None:
    run(
        "sample",
        "--model",
        model,
        "-n",
        5,
        "--seed",
        7,
        "--t",
        t,
        "--out",
        tmp_path / "a.npz",
        "--batch",
        3,
        "--device",
        "cpu",
    )
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert sorted(file) == ["images", "seeds", "t"]
        assert file["seeds"].tolist() == [7, 8, 9, 10, 11]
        assert file["images"].dtype == np.uint8
        assert close(file["images"], pixels(model, 5, 7, t=t))


def test_sample_to_parquet(model: Path, tmp_path: Path) -> None:
    output = run("sample", "--model", model, "-n", 5, "--seed", 7, "--out", tmp_path / "a.parquet", "--batch", 2)
    assert "5 images in " in output and "NFE = 1:" in output
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=tmp_path, split="train")
    assert rows["seed"][:] == [7, 8, 9, 10, 11] and rows["t"][:] == [1.0] * 5
    assert close(np.stack([np.asarray(image) for image in rows["image"]]), pixels(model, 5, 7))


def test_format_wins_over_the_files_name(model: Path, tmp_path: Path) -> None:
    run("sample", "--model", model, "-n", 2, "--format", "npz", "--out", tmp_path / "images.dat")
    with np.load(tmp_path / "images.dat") as file:
        assert file["images"].shape == (2, 8, 8, 3)
    run("sample", "--model", model, "-n", 2, "--format", "png", "--out", tmp_path / "folder.npz")
    assert len(list((tmp_path / "folder.npz").iterdir())) == 2


def test_sample_in_bfloat16(model: Path, tmp_path: Path) -> None:
    run("sample", "--model", model, "-n", 4, "--dtype", "bfloat16", "--out", tmp_path / "a.npz", "--device", "cpu")
    with np.load(tmp_path / "a.npz") as file:
        difference = np.abs(file["images"].astype(int) - pixels(model, 4)).max()
    assert 0 < difference < 20


def test_sample_bundled_model_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("sample", "--device", "cpu")
    with Image.open("samples.png") as image:
        assert image.mode == "L" and image.size == ((4 * 17 - 1) * 4, (4 * 17 - 1) * 4)


def test_sample_another_bundled_model(tmp_path: Path) -> None:
    run("sample", "--model", "cifar10-small", "-n", "1", "--seed", "3", "--device", "cpu", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ciphar10"], "nor a bundled model (digits, cifar10-small)"),
        (["--model", "nothing/at/all"], "model 'nothing/at/all' is neither an existing folder nor a hub id"),
        (["--model", "{tmp}"], "{tmp} is no saved spigan model: it lacks config.json and model.safetensors"),
        (["--dtype", "float64"], "--dtype must be float32, bfloat16 or float16, got float64"),
        (["--device", "nonsense"], "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
        (["--device", "cuda:99"], "device 'cuda:99' was asked for, but torch "),
        (["--backend", "tpu"], "backend= names the backend 'tpu'"),
        (["--backend", "cuda", "--device", "cpu"], "cannot run on cpu"),
        (["--format", "jpg"], "--format must be one of png, grid, npz, parquet, got jpg"),
        (["--out", "{tmp}/a.jpg"], "{tmp}/a.jpg: expected a .png, .npz or .parquet file, or a folder"),
        (["--out", "{tmp}", "--format", "npz"], "{tmp} is a folder; --format npz needs a file name"),
        (["--out", "{tmp}/file", "--format", "png"], "{tmp}/file is a file; --format png needs a folder"),
        (["--out", "{tmp}/file/inside.npz"], "{tmp}/file"),
        (["--seed", str(2**63)], "seeds must be in [0, 2**63), got "),
    ],
)
def test_sample_refuses(model: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    defaults = ["--model", model, "--out", tmp_path / "a.npz", "-n", 2]
    assert message.replace("{tmp}", str(tmp_path)) in refused("sample", *defaults, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


# ---- bench ----


def test_bench(model: Path, tmp_path: Path) -> None:
    output = run("bench", "--model", model, "-n", 5, "--batch", 2, "--profile", tmp_path / "trace.json")
    assert re.search(r"5 images of 8 x 8, bfloat16, 2 at a time, NFE = 1, on .*: [\d.]+ ms, [\d.]+ images/s", output)
    assert all(f"  {stage} of a batch:" in output for stage in ("noise", "mapping", "synthesis", "convert"))
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnist"], "there is no preset 'mnist'"),
        (["--model", "{tmp}"], "{tmp} is no saved spigan model"),
        (["--dtype", "float64"], "--dtype must be float32, bfloat16 or float16, got float64"),
        (["--device", "nonsense"], "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
        (["report", "{tmp}/none.json"], "none.json"),
    ],
)
def test_bench_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    assert message.replace("{tmp}", str(tmp_path)) in refused("bench", *arguments)
    assert not list(tmp_path.iterdir())


# ---- train ----


def test_show_config_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "cifar10", "--show-config", "--kimg", 5, "-k", 3, "--batch", 48, "--seed", 2]
    changes = ["augment=none", "model.ode_steps=8", "model.conv_clamp=256", "ema_rampup=null", "xflip=false"]
    changes += ["data.source=elsewhere", "data.column=img", "device=cpu"]
    shown = json.loads(run("train", *arguments, *(f"--set={change}" for change in changes)))
    config = spigan.TrainConfig.model_validate(shown)
    assert (config.total_kimg, config.intervals, config.batch, config.seed) == (5, 3, 48, 2)
    assert (config.augment, config.model.ode_steps, config.model.conv_clamp) == ("none", 8, 256)
    assert (config.ema_rampup, config.xflip, config.device) == (None, False, "cpu")
    assert (config.data.source, config.data.column) == ("elsewhere", "img")
    expected = spigan.preset("cifar10")
    assert (config.model.dim_h, config.lr_g, config.mbstd_group) == (
        expected.model.dim_h,
        expected.lr_g,
        expected.mbstd_group,
    )
    assert not list(tmp_path.iterdir())


def test_show_config_of_a_file(tmp_path: Path) -> None:
    before = json.loads(run("train", "--preset", "cifar10-small", "--show-config"))
    (tmp_path / "config.json").write_text(json.dumps(before))
    after = json.loads(run("train", "--config", tmp_path / "config.json", "--show-config", "--set", "batch=8"))
    assert after == before | {"batch": 8}


def test_data_is_for_presets_without(tmp_path: Path) -> None:
    shown = json.loads(run("train", "--preset", "celebahq256", "--data", tmp_path, "--show-config"))
    assert shown["data"]["source"] == str(tmp_path)
    assert shown["model"]["resolution"] == 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "mnist"], "there is no preset 'mnist'"),
        (["--preset", "celebahq256"], "the preset 'celebahq256' needs images"),
        (["--batch", "0"], "batch: Input should be greater than or equal to 1, got 0"),
        (["--kimg", "-1"], "total_kimg: Input should be greater than 0, got -1"),
        (["--set", "colour=red"], "colour: Extra inputs are not permitted, got 'red'"),
        (["--set", "model.colour=red"], "model.colour: Extra inputs are not permitted, got 'red'"),
        (["--set", "model=5"], "model: Input should be a valid dictionary or instance of ModelConfig, got 5"),
        (["--set", "batch.size=5"], "'batch' has no fields of its own"),
        (["--set", "batch"], "--set takes FIELD=VALUE, got 'batch'"),
        (["--set", "model.mapping=mlp"], 'mapping="mlp" has no time and needs intervals=1'),
        (["--config", "{tmp}/none.json"], "none.json"),
        (["--config", "{tmp}/half.json"], "half.json"),
        (["--config", "{tmp}/list.json"], "list.json"),
        (["--data", "{tmp}/images"], "images"),
        (["--device", "nonsense"], "nonsense"),
        (["--device", "cuda:99"], "cuda"),
        (["--out", "{tmp}"], "exists and is not empty"),
        (["--resume", "{tmp}"], "{tmp} is no run folder: it has no config.json"),
        (["--resume", "{tmp}", "--batch", "8"], "--resume goes on with the run's own configuration: leave out --batch"),
    ],
)
def test_train_refuses(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "half.json").write_text("{")
    (tmp_path / "list.json").write_text("[1, 2]")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    defaults = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    assert message.replace("{tmp}", str(tmp_path)) in refused("train", *defaults, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.json", "list.json"]


def test_train(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"config.json", "data.json", "stats.jsonl", "reals.png", "checkpoints", "model"}
    assert any(name.startswith("samples-") for name in names)
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = spigan.TrainConfig.model_validate_json((trained / "config.json").read_text())
    assert (config.total_kimg, config.batch, config.model.dim_h) == (0.1, 8, 8)
    images = spigan.sample(2, model=trained, device="cpu")
    assert isinstance(images, torch.Tensor) and images.shape == (2, 1, 16, 16)


def test_train_then_resume_with_more_images(trained: Path) -> None:
    rows = (trained / "stats.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["kimg"] == pytest.approx(0.104)
    output = run("train", "--resume", trained, "--kimg", 0.2, "--quiet")
    assert f"{trained}: 0.2 kimg on cpu, K = 2" in output
    assert f"Done: {trained / 'model'} holds the model" in output
    after = (trained / "stats.jsonl").read_text().splitlines()
    assert after[: len(rows)] == rows and len(after) > len(rows)
    assert json.loads(after[-1])["kimg"] == pytest.approx(0.2)
    assert json.loads((trained / "config.json").read_text())["total_kimg"] == 0.2


def test_sample_of_a_run(trained: Path, tmp_path: Path) -> None:
    run("sample", "--model", trained, "-n", 2, "--out", tmp_path / "a.npz", "--device", "cpu")
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (2, 16, 16, 1)


# ---- demo ----


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    output = run("demo", "--kimg", 0.1, "--out", tmp_path / "demo", "--seed", 3)
    folder = tmp_path / "demo" / "00000"
    for name in ("samples.png", "strip.png"):
        assert str(folder / name) in output
    assert re.search(r"100 images: NFE = 1, [0-9.]+ ms on ", output)
    with Image.open(folder / "samples.png") as image:
        assert image.mode == "L" and image.size == ((8 * 17 - 1) * 4, (8 * 17 - 1) * 4)
    with Image.open(folder / "strip.png") as image:  # 4 images at 9 times
        assert image.size == ((9 * 17 - 1) * 4, (4 * 17 - 1) * 4)
        strip = np.asarray(image)[::4, ::4]
    first, last = strip[:16, :16], strip[:16, 8 * 17 : 8 * 17 + 16]
    expected = pixels(folder / "model", 1, t=[0.0, 1.0])[:, 0, :, :, 0]
    assert close(first, expected[0], 3) and close(last, expected[1], 3)  # 3: a GPU may have drawn them
    assert not close(expected[0], expected[1])
    assert json.loads((folder / "config.json").read_text())["seed"] == 3
    assert {path.name for path in (folder / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_demo_refuses(tmp_path: Path) -> None:
    message = refused("demo", "--kimg", -1, "--out", tmp_path / "demo")
    assert message.startswith("total_kimg: Input should be greater than 0, got -1")
    assert not (tmp_path / "demo").exists()


# ---- export ----


def test_export_to_onnx(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.onnx"
    result = spigan_cli("export", "--model", model, "--out", out)
    assert result.exit_code == 0 and result.stderr == ""
    first, second = result.stdout.splitlines()
    size = f"{out.stat().st_size / 1e6:.1f} MB"
    assert first == f"{out}: {size}, z [N, 3, 8, 8] to images [N, 3, 8, 8] in [0, 1], t = 1"
    assert second == f'Run it: onnxruntime.InferenceSession("{out}").run(None, {{"z": z}})[0], z a NumPy array'
    z = np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32)
    images = onnxruntime.InferenceSession(out).run(None, {"z": z})[0]
    expected = spigan.sample(z=torch.from_numpy(z), model=model, device="cpu")
    assert isinstance(expected, torch.Tensor)
    assert np.abs(images - expected.numpy()).max() < 1e-5  # tests/test_export.py says why


def test_export_to_pt2(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.onnx"  # --format wins
    printed = run("export", "--model", trained, "--out", out, "--format", "pt2", "--t", 0.5, "--batch", 2)
    assert "z [2, 1, 16, 16] to images [2, 1, 16, 16] in [0, 1], t = 0.5" in printed
    assert printed.endswith(f'Run it: torch.export.load("{out}").module()(z)\n')
    z = torch.randn(2, 1, 16, 16)
    expected = spigan.sample(z=z, model=trained, t=0.5, device="cpu")
    torch.testing.assert_close(torch.export.load(out).module()(z), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "a.onnx", "--format", "tflite"], 'format must be "onnx" or "pt2", got \'tflite\''),
        (["--out", "a.bin"], "a.bin tells no format: name the file .onnx or .pt2, or say which format it shall have"),
        (["--out", ".", "--format", "onnx"], ". is a folder; an exported model needs a file name"),
        (["--out", "a.pt2", "--t", "2"], "t must be a time in [0, 1]"),
        (["--out", "a.pt2", "--model", "missing"], "model 'missing' is neither an existing folder nor a hub id"),
    ],
)
def test_export_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused("export", *arguments).startswith(message)
    assert not [*tmp_path.iterdir()]


def test_export_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert 'pip install "spigan[export]"' in refused("export", "--out", tmp_path / "a.onnx")


# ---- info ----


def test_info() -> None:
    text = run("info")
    assert f"spigan: {spigan.__version__}" in text and "backends on cpu" in text
    report = json.loads(run("info", "--json"))
    assert report["versions"]["spigan"] == spigan.__version__


def test_sample_several_times_and_seeds(model: Path, tmp_path: Path) -> None:
    times = [text for t in (1, 0, 0.5) for text in ("--t", t)]
    for name in ("grid.png", "images.npz", "folder"):
        out = tmp_path / name
        printed = run("sample", "--model", model, "--device", "cpu", "--seed", 7, "--seed", 3, *times, "--out", out)
        assert printed.startswith("6 images in ") and ", NFE = 1: " in printed
    with np.load(tmp_path / "images.npz", allow_pickle=False) as file:
        images, seeds, t = file["images"], file["seeds"], file["t"]
    assert seeds.tolist() == [7, 3] and t.tolist() == [1.0, 0.0, 0.5] and images.shape == (3, 2, 8, 8, 3)
    names = {f"seed{seed:06d}-t{moment:.2f}.png" for seed in (7, 3) for moment in (1, 0, 0.5)}
    assert {path.name for path in (tmp_path / "folder").iterdir()} == names
    alone = spigan.sample(model=model, seed=[3], t=0.5, output_type="pil", device="cpu")
    assert np.abs(np.asarray(alone[0], dtype=int) - images[2, 1].astype(int)).max() <= 1
    with Image.open(tmp_path / "grid.png") as grid:  # a row for each image, enlarged eight times
        assert grid.size == ((3 * 9 - 1) * 8, (2 * 9 - 1) * 8)


def test_resume_names_the_options_it_cannot_take(tmp_path: Path) -> None:
    message = refused("train", "--resume", tmp_path, "--preset", "digits", "--batch", 4)
    assert message.endswith("leave out --preset, --batch")
