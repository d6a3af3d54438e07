"""`spigan sample`: files of every format, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

import spigan


def test_sample_to_a_folder_names_files_by_seed(model: Path, tmp_path: Path, run: Any, pixels: Any, close: Any) -> None:
    out = tmp_path / "new" / "images"
    output = run("sample", "--model", model, "-n", 3, "--seed", 41, "--batch", 2, "--out", out, "--device", "cpu")
    assert "3 images in " in output and "NFE = 1:" in output
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["seed000041.png", "seed000042.png", "seed000043.png"]
    for file, expected in zip(files, pixels(model, 3, 41), strict=True):
        with Image.open(file) as image:
            assert image.mode == "RGB" and close(np.asarray(image), expected)


def test_sample_to_a_grid(model: Path, tmp_path: Path, run: Any, pixels: Any, close: Any) -> None:
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
def test_sample_to_npz(model: Path, tmp_path: Path, t: float, run: Any, pixels: Any, close: Any) -> None:
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


def test_sample_to_parquet(model: Path, tmp_path: Path, run: Any, pixels: Any, close: Any) -> None:
    output = run("sample", "--model", model, "-n", 5, "--seed", 7, "--out", tmp_path / "a.parquet", "--batch", 2)
    assert "5 images in " in output and "NFE = 1:" in output
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=tmp_path, split="train")
    assert rows["seed"][:] == [7, 8, 9, 10, 11] and rows["t"][:] == [1.0] * 5
    assert close(np.stack([np.asarray(image) for image in rows["image"]]), pixels(model, 5, 7))


def test_format_wins_over_the_files_name(model: Path, tmp_path: Path, run: Any) -> None:
    run("sample", "--model", model, "-n", 2, "--format", "npz", "--out", tmp_path / "images.dat")
    with np.load(tmp_path / "images.dat") as file:
        assert file["images"].shape == (2, 8, 8, 3)
    run("sample", "--model", model, "-n", 2, "--format", "png", "--out", tmp_path / "folder.npz")
    assert len(list((tmp_path / "folder.npz").iterdir())) == 2


def test_sample_in_bfloat16(model: Path, tmp_path: Path, run: Any, pixels: Any) -> None:
    run("sample", "--model", model, "-n", 4, "--dtype", "bfloat16", "--out", tmp_path / "a.npz", "--device", "cpu")
    with np.load(tmp_path / "a.npz") as file:
        difference = np.abs(file["images"].astype(int) - pixels(model, 4)).max()
    assert 0 < difference < 20


def test_sample_bundled_model_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.chdir(tmp_path)
    run("sample", "--device", "cpu")
    with Image.open("samples.png") as image:
        assert image.mode == "L" and image.size == ((4 * 17 - 1) * 4, (4 * 17 - 1) * 4)


def test_sample_another_bundled_model(tmp_path: Path, run: Any) -> None:
    run("sample", "--model", "cifar10-small", "-n", "1", "--seed", "3", "--device", "cpu", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (1, 32, 32, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "ciphar10"], "nor a bundled model (digits, cifar10-small)"),
        (["--model", "nothing/at/all"], "model 'nothing/at/all' is neither an existing folder nor a hub id"),
        (["--model", "{tmp}"], "{tmp} is not a saved spigan model: it lacks config.json and model.safetensors"),
        (["--dtype", "float64"], "--dtype must be float32, bfloat16 or float16, got float64"),
        (["--device", "nonsense"], "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
        (["--device", "cuda:99"], "device 'cuda:99' was requested, but torch "),
        (["--backend", "tpu"], "backend= names the backend 'tpu'"),
        (["--backend", "cuda", "--device", "cpu"], "cannot run on cpu"),
        (["--format", "jpg"], "--format must be png, grid, npz or parquet, got jpg"),
        (["--out", "{tmp}/a.jpg"], "{tmp}/a.jpg: expected a .png, .npz or .parquet file, or a folder"),
        (["--out", "{tmp}", "--format", "npz"], "{tmp} is a folder; --format npz needs a file name"),
        (["--out", "{tmp}/file", "--format", "png"], "{tmp}/file is a file; --format png needs a folder"),
        (["--out", "{tmp}/file/inside.npz"], "{tmp}/file"),
        (["--seed", str(2**63)], "seeds must be in [0, 2**63), got "),
    ],
)
def test_sample_refuses(model: Path, tmp_path: Path, arguments: list[str], message: str, refused: Any) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    defaults = ["--model", model, "--out", tmp_path / "a.npz", "-n", 2]
    assert message.replace("{tmp}", str(tmp_path)) in refused("sample", *defaults, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_sample_of_a_run(trained: Path, tmp_path: Path, run: Any) -> None:
    run("sample", "--model", trained, "-n", 2, "--out", tmp_path / "a.npz", "--device", "cpu")
    with np.load(tmp_path / "a.npz") as file:
        assert file["images"].shape == (2, 16, 16, 1)


def test_sample_several_times_and_seeds(model: Path, tmp_path: Path, run: Any) -> None:
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
