"""Images between images: ends, middles, the forward path, grids and animations, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor
from typer.testing import CliRunner

from spigan import SPIGAN, VPSDE, ModelConfig, Sampler
from spigan.cli import app
from spigan.data import DataConfig, open_dataset
from spigan.images import save_animation
from spigan.ops import philox_normal
from spigan.sampling.interpolation import (
    forward_path,
    interpolate_h,
    interpolate_time,
    interpolate_z,
    linear,
    save_rows,
    spherical,
)

TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
SEEDS = [3, 0, 7]


def make(**changes: Any) -> SPIGAN:
    """A tiny model whose images are not clamped away."""
    torch.manual_seed(0)
    model = SPIGAN(ModelConfig.model_validate(TINY | changes)).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("torgb.weight"):
            parameter.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def model() -> SPIGAN:
    return make()


def pixels(model: SPIGAN, seeds: list[int] = SEEDS, **options: Any) -> Tensor:
    return Sampler(model, output="uint8", **options)(seeds, to="cpu")


def noise(model: SPIGAN, seeds: list[int] = SEEDS) -> Tensor:
    return philox_normal((len(seeds), *model.config.z_shape), seed=torch.tensor(seeds))


def close(actual: Tensor, expected: Tensor, levels: int = 1) -> bool:
    """Whether uint8 images are equal up to rounding."""
    assert actual.shape == expected.shape
    return actual.dtype == expected.dtype and int((actual.int() - expected.int()).abs().max()) <= levels


# ---- Rows ----


def test_time_goes_from_h0_to_h1(model: SPIGAN) -> None:
    rows = interpolate_time(SEEDS, 5, model=model)
    assert rows.shape == (3, 5, 3, 8, 8) and rows.dtype == torch.uint8
    # 4 steps over [0, 1]: the solver takes the very same ones whether it stops at the quarters or not.
    expected = pixels(model, t=[0.0, 0.25, 0.5, 0.75, 1.0])
    assert close(rows, expected.transpose(0, 1))
    assert close(rows[:, -1], pixels(model))
    assert not close(rows[:, 0], rows[:, -1], 20)


@pytest.mark.parametrize("mix", ["spherical", "linear"])
def test_z_meets_both_seeds(model: SPIGAN, mix: Any) -> None:
    rows = interpolate_z(SEEDS, 3, mix=mix, model=model)
    assert rows.shape == (2, 3, 3, 8, 8) and rows.dtype == torch.uint8
    images, z = pixels(model), noise(model)
    assert close(rows[:, 0], images[:2]) and close(rows[:, -1], images[1:])
    middle = (z[:-1] + z[1:]) * (math.sqrt(0.5) if mix == "spherical" else 0.5)
    assert close(rows[:, 1], Sampler(model, output="uint8").of_noise(middle))
    assert not close(rows[:, 1], rows[:, 0]) and not close(rows[:, 1], rows[:, -1])


def test_h_is_a_straight_line(model: SPIGAN) -> None:
    rows = interpolate_h(SEEDS, 3, model=model)
    images = pixels(model)
    assert close(rows[:, 0], images[:2]) and close(rows[:, -1], images[1:])
    h = model.mapping(noise(model))
    middle = model.generator((h[:-1] + h[1:]) / 2, "const")
    assert close(rows[:, 1], (middle * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))


@pytest.mark.parametrize("interpolate", [interpolate_time, interpolate_z, interpolate_h])
def test_batches_do_not_matter_and_bound_the_generator(model: SPIGAN, interpolate: Any) -> None:
    sizes: list[int] = []
    handle = model.generator.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    try:
        some = interpolate(SEEDS, 7, model=model, batch_size=3)
    finally:
        handle.remove()
    assert max(sizes) == 3 and sum(sizes) == some.shape[0] * 7
    assert close(some, interpolate(SEEDS, 7, model=model))


def test_rows_do_not_depend_on_their_neighbours(model: SPIGAN) -> None:
    assert close(interpolate_z([0, 7], 4, model=model)[0], interpolate_z(SEEDS, 4, model=model)[1])
    assert close(interpolate_time([7], 4, model=model)[0], interpolate_time(SEEDS, 4, model=model)[2])


@pytest.mark.parametrize("interpolate", [interpolate_time, interpolate_z, interpolate_h])
def test_chosen_places(model: SPIGAN, interpolate: Any) -> None:
    all_places = interpolate([3, 4], 5, model=model)
    chosen = interpolate([3, 4], [0.25, 1.0], model=model)
    assert (chosen.int() - all_places[:, [1, 4]].int()).abs().max() <= 1  # other times divide the ODE's steps otherwise
    for places in ([], [1.1], [float("nan")]):
        with pytest.raises(ValueError, match=r"steps must be a number, or a non-empty list of values in \[0, 1\]"):
            interpolate([3, 4], places, model=model)


def test_own_noise_is_that_of_a_seed() -> None:
    """The stored noise is one and the same at the start of all rows; a seed's own is not, and stays along its row."""
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 3.0)
        elif name.endswith("affine.weight"):
            torch.nn.init.zeros_(parameter)  # h no longer matters: all that is left is noise
    stored = interpolate_time(SEEDS, 3, model=model)
    assert (stored == stored[:1, :1]).all()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    own = interpolate_time(SEEDS, 3, noise="own", model=model)
    assert torch.equal(torch.get_rng_state(), before)
    assert (own == own[:, :1]).all() and not close(own[0], own[1], 20) and not close(own[0], stored[0], 20)
    assert close(own[2:], interpolate_time([7], 3, noise="own", model=model, batch_size=1))
    with pytest.raises(ValueError, match='noise must be "stored" or "own", got \'mine\''):
        interpolate_time(SEEDS, noise="mine", model=model)  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"path_latent": "t"}, {"mapping": "mlp"}])
def test_analytic_path_goes_from_z_to_the_image(changes: dict[str, Any]) -> None:
    model = make(path="analytic", **changes)
    rows = interpolate_time(SEEDS, 5, model=model)
    z, times = noise(model), torch.linspace(0, 1, 5)[:, None, None, None, None]
    h = model.mapping(z, times.flatten().tolist() if "path_latent" in changes else [1.0])
    clean = model.generator(h.flatten(0, 1), "const").unflatten(0, h.shape[:2])
    expected = ((times * clean + (1 - times) * z) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    assert close(rows, expected.transpose(0, 1))
    assert close(rows[:, -1], pixels(model)) and close(rows, interpolate_time(SEEDS, 5, model=model, batch_size=2))
    with pytest.raises(ValueError, match='path="analytic" takes the noise of a row from its z'):
        interpolate_time(SEEDS, noise="own", model=model)


def test_stylegan2_has_no_time_but_z_and_h() -> None:
    model = make(mapping="mlp")
    with pytest.raises(ValueError, match='mapping="mlp" has no time, so there is no h'):
        interpolate_time(SEEDS, model=model)
    for interpolate in (interpolate_z, interpolate_h):
        rows = interpolate(SEEDS, 3, model=model)
        assert close(rows[:, 0], pixels(model)[:2]) and close(rows[:, -1], pixels(model)[1:])


def test_options_of_the_sampler(model: SPIGAN) -> None:
    low = interpolate_h(SEEDS, 3, model=model, dtype=torch.bfloat16, backend="reference", device="cpu")
    assert close(low[:, 0], pixels(model, dtype=torch.bfloat16)[:2], 2)
    with pytest.raises(ValueError, match="batch_size must be positive"):
        interpolate_h(SEEDS, model=model, batch_size=0)


@pytest.mark.parametrize(
    ("function", "seeds", "options", "message"),
    [
        (interpolate_time, [], {}, "at least one seed"),
        (interpolate_time, [1], {"steps": 1}, "steps must be at least 2, for the two ends, got 1"),
        (interpolate_time, [-1], {}, r"seeds must be in \[0, 2\*\*63\), got -1"),
        (interpolate_z, [1], {}, r"at least two seeds are needed, each different from the one before it, got \[1\]"),
        (interpolate_h, [1, 2, 2], {}, r"each different from the one before it, got \[1, 2, 2\]"),
        (interpolate_z, [1, 2], {"mix": "cubic"}, 'mix must be "spherical" or "linear", got \'cubic\''),
    ],
)
def test_refused(model: SPIGAN, function: Any, seeds: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(seeds, model=model, **options)


# ---- Between z ----


def test_spherical_keeps_a_standard_normal() -> None:
    first, second = (philox_normal((200_000,), seed=seed) for seed in (0, 1))
    weights = torch.tensor([0.0, 0.25, 0.5, 1.0])
    # Standard deviations of the mean and the variance of 200,000 numbers: 0.0022 and 0.0032.
    assert torch.allclose(spherical(first, second, weights).var(1), torch.ones(4), atol=0.02)
    assert torch.allclose(spherical(first, second, weights).mean(1), torch.zeros(4), atol=0.01)
    assert torch.allclose(linear(first, second, weights).var(1), torch.tensor([1, 0.625, 0.5, 1]), atol=0.02)
    for mix in (spherical, linear):
        ends = mix(first, second, weights)[[0, -1]]
        assert torch.allclose(ends, torch.stack([first, second]), atol=1e-6)


# ---- The forward path ----


@pytest.mark.parametrize("steps", [2, 5, 12])  # 12: more times than the kernels take
def test_forward_path(steps: int) -> None:
    sde = VPSDE()
    images = torch.randint(0, 256, (2, 3, 4, 6), dtype=torch.uint8)
    rows = forward_path(images, [5, 9], steps, sde=sde)
    assert rows.shape == (4, steps, 3, 4, 6) and rows.dtype == torch.uint8
    diffused, straight = rows[::2], rows[1::2]
    assert torch.equal(diffused[:, 0], images) and torch.equal(straight[:, 0], images)
    assert close(diffused[:, -1], straight[:, -1])
    clean = images.double() / 127.5 - 1
    e = torch.stack([philox_normal((3, 4, 6), seed=seed) for seed in (5, 9)]).double()
    mean, std = sde.marginal(1.0)
    for j in range(steps):
        t = j / (steps - 1)
        a, s = sde.marginal(t)
        for row, x in ((diffused, a * clean + s * e), (straight, (1 - t) * clean + t * (mean * clean + std * e))):
            expected = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
            assert close(row[:, j], expected)


def test_forward_path_refuses() -> None:
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="n is 2, but 1 seeds were given"):
        forward_path(images, [1])
    with pytest.raises(ValueError, match="steps must be at least 2"):
        forward_path(images, [1, 2], 1)


# ---- Files ----


def random_rows(r: int, s: int, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (r, s, channels, size, size), dtype=torch.uint8)


def frames_of(path: Path) -> tuple[np.ndarray, list[int], int]:
    """RGB frames, their milliseconds, and how often the animation repeats (0: for ever)."""
    with Image.open(path) as file:
        frames, times = [], []
        for frame in ImageSequence.Iterator(file):
            frame.load()
            frames.append(np.asarray(frame.convert("RGB")))
            times.append(int(file.info["duration"]))
        return np.stack(frames), times, int(file.info["loop"])


def test_a_grid_has_a_row_for_each_row(tmp_path: Path) -> None:
    rows = random_rows(2, 3)
    assert save_rows(rows, tmp_path / "a.png") == tmp_path / "a.png"
    with Image.open(tmp_path / "a.png") as file:
        grid = np.asarray(file)[::2, ::2]
    assert grid.shape == (2 * 33 - 1, 3 * 33 - 1, 3)
    for r in range(2):
        for s in range(3):
            cell = grid[33 * r : 33 * r + 32, 33 * s : 33 * s + 32]
            assert np.array_equal(cell, rows[r, s].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
def test_webp_goes_there_and_back_without_loss(tmp_path: Path, channels: int) -> None:
    rows = random_rows(1, 4, channels, 64)
    frames, times, loop = frames_of(save_rows(rows, tmp_path / "new" / "a.webp", frame_time=70))
    assert len(frames) == 6 and times == [70] * 6 and loop == 0
    for frame, j in zip(frames, [0, 1, 2, 3, 2, 1], strict=True):
        assert np.array_equal(frame, rows[0, j].expand(3, -1, -1).permute(1, 2, 0).numpy())


def test_gif(tmp_path: Path) -> None:
    rows = random_rows(4, 3, 1)
    frames, times, loop = frames_of(save_rows(rows, tmp_path / "a.gif", columns=4, frame_time=120))
    assert frames.shape == (4, 64, 4 * 66 - 2, 3) and times == [120] * 4 and loop == 0
    assert np.array_equal(frames[1, ::2, 2 * 33 : 2 * 33 + 64 : 2, 0], rows[1, 1, 0].numpy())  # grey needs no palette


def test_two_frames_are_there_and_back_already(tmp_path: Path) -> None:
    frames, _, _ = frames_of(save_rows(random_rows(1, 2), tmp_path / "a.webp"))
    assert len(frames) == 2


def test_files_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jpg: expected a \.png \(a grid\), or a \.gif or \.webp"):
        save_rows(random_rows(1, 2), tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.mp4: an animation must be a \.gif or \.webp file"):
        save_animation(random_rows(1, 2)[0], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="got 0 and 80 ms"):
        save_animation(random_rows(1, 2)[0, :0], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="got 2 and 0 ms"):
        save_animation(random_rows(1, 2)[0], tmp_path / "a.gif", frame_time=0)
    assert not list(tmp_path.iterdir())


# ---- The command ----


def spigan_cli(*args: Any) -> Any:
    return CliRunner().invoke(app, ["interpolate", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


@pytest.fixture(scope="module")
def saved(model: SPIGAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["time", "z", "h"])
def test_command(model: SPIGAN, saved: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "a.png"
    options = ["--model", saved, "--device", "cpu", "--kind", kind, "--out", out]
    result = spigan_cli(*options, "--seeds", 3, 0, 7, "--steps", 4)
    assert result.exit_code == 0, result.output
    function = {"time": interpolate_time, "z": interpolate_z, "h": interpolate_h}[kind]
    rows = function(SEEDS, 4, model=model)
    assert result.stdout == f"{len(rows)} rows of 4 images: {out}\n"
    expected = save_rows(rows, tmp_path / "b.png")
    with Image.open(out) as a, Image.open(expected) as b:
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_command_mixes_linearly(model: SPIGAN, saved: Path, tmp_path: Path) -> None:
    result = spigan_cli(
        "--model", saved, "--kind", "z", "--mix", "linear", "--seeds", 3, 0, "--steps", 3, "--out", tmp_path / "a.webp"
    )
    assert result.exit_code == 0, result.output
    frames, times, _ = frames_of(tmp_path / "a.webp")
    assert times == [80] * 4
    rows = interpolate_z([3, 0], 3, mix="linear", model=model)
    expected = rows[0, 1].repeat_interleave(8, 1).repeat_interleave(8, 2).permute(1, 2, 0).numpy()
    assert np.abs(frames[1].astype(int) - expected).max() <= 1


def test_command_without_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = spigan_cli()
    assert result.exit_code == 0 and result.stdout == "4 rows of 9 images: interpolation.png\n", result.output
    with Image.open("interpolation.png") as image:
        assert image.size == ((9 * 17 - 1) * 4, (4 * 17 - 1) * 4)


def test_command_draws_the_forward_path(tmp_path: Path) -> None:
    out = tmp_path / "path.png"
    result = spigan_cli("--kind", "path", "--seeds", 4, 2, "--steps", 3, "--resolution", 16, "--out", out)
    assert result.exit_code == 0 and result.stdout == f"4 rows of 3 images: {out}\n", result.output
    digits = open_dataset(DataConfig(source="digits", resolution=16), progress=False).images([4, 2])
    expected = save_rows(forward_path(digits, [4, 2], 3), tmp_path / "b.png")
    with Image.open(out) as a, Image.open(expected) as b:
        assert np.array_equal(np.asarray(a), np.asarray(b))
    spigan_cli("--kind", "path", "--seeds", 4, 2, "--steps", 3, "--out", tmp_path / "path.gif")
    frames, _, _ = frames_of(tmp_path / "path.gif")
    assert frames.shape[1:3] == ((2 * 9 - 1) * 8, (2 * 9 - 1) * 8)  # SDE and straight side by side, two images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "t"], "--kind must be time, z, h or path, got t"),
        (["3", "4"], "unexpected argument 3; did you mean --seeds 3 4?"),
        (["--out", "a.jpg"], "a.jpg: expected a .png (a grid), or a .gif or .webp (an animation)"),
        (["--kind", "z", "--seeds", "3"], "at least two seeds are needed"),
        (["--kind", "z", "--mix", "cubic"], 'mix must be "spherical" or "linear"'),
        (["--kind", "path", "--seeds", "1797"], "digits has images 0 to 1796, got --seeds 1797"),
        (["--kind", "path", "--data", "./none"], "none"),
        (["--model", "missing"], "model 'missing' is neither an existing folder nor a hub id"),
        (["--device", "nonsense"], "device must be auto, cpu, cuda, cuda:1, ..., got 'nonsense'"),
    ],
)
def test_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = spigan_cli(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir())
