"""What `spigan data check` finds: sizes, modes, formats, duplicates and broken images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from typer.testing import CliRunner

from spigan.cli import app
from spigan.data import DataConfig
from spigan.data.check import check


def encoded(seed: int, size: tuple[int, int] = (20, 14), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """A picture of random pixels."""
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    root.mkdir(parents=True)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def cli(*args: Any) -> Any:
    return CliRunner().invoke(app, ["data", *map(str, args)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_check(tmp_path: Path) -> None:
    files = {
        "a.png": encoded(0, (20, 14)),
        "b.jpg": encoded(1, (20, 14), kind="JPEG"),
        "c.png": encoded(2, (9, 30), mode="L"),
        "d.png": encoded(0, (20, 14)) + b"\0",  # the same pixels in another file
        "e.bmp": encoded(0, (20, 14), kind="BMP"),  # and in another format
        "f.png": encoded(2, (9, 30), mode="L"),
        "g.png": encoded(5, (14, 20)),
    }
    good = write_folder(tmp_path / "good", files)
    for workers in (0, 2):
        report = check(DataConfig(source=str(good), channels=3), workers=workers, progress=False)
        assert json.loads(json.dumps(report)) == report
        assert (report["images"], report["broken"]) == (7, [])
        assert report["sizes"] == {"20 x 14": 4, "9 x 30": 2, "14 x 20": 1}
        assert (report["width"], report["height"]) == ([9, 20], [14, 30])
        assert report["modes"] == {"RGB": 5, "L": 2}
        assert report["formats"] == {"PNG": 5, "JPEG": 1, "BMP": 1}
        assert report["duplicates"] == {
            "groups": 2,
            "images": 3,
            "examples": [
                [str(good / f"{name}") for name in group] for group in (("a.png", "d.png", "e.bmp"), ("c.png", "f.png"))
            ],
        }
        assert report["workers"] == workers
        assert report["images_per_second"] > 0 and report["images_per_second_core"] > 0
    result = cli("check", good, "--quiet", "--channels", 3)
    assert result.exit_code == 0
    assert "7, 0 broken" in result.stdout and "20 x 14 (4)" in result.stdout and "3 in 2 groups" in result.stdout


def test_check_sees_the_colours_of_palettes(tmp_path: Path) -> None:
    """The same indices, of other colours; and a file without a palette that has the same pixels."""
    image = Image.open(io.BytesIO(encoded(0, (6, 6)))).quantize(8)
    other = image.copy()
    other.putpalette([255 - value for value in image.getpalette() or []])
    for name, picture in {"a.png": image, "b.png": other, "c.png": image.convert("RGB")}.items():
        picture.save(tmp_path / name)
    report = check(DataConfig(source=str(tmp_path), channels=3), workers=0, progress=False)
    assert report["duplicates"]["examples"] == [[str(tmp_path / "a.png"), str(tmp_path / "c.png")]]
    assert report["modes"] == {"P": 2, "RGB": 1}


def test_check_of_broken_images(tmp_path: Path) -> None:
    animated = io.BytesIO()
    frames = [Image.new("L", (8, 8), value) for value in (0, 99)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    files = {
        "a.png": encoded(0, (64, 64)),
        "b.png": encoded(0, (64, 64))[:-3000],  # its header is fine
        "c.gif": animated.getvalue(),
    }
    source = write_folder(tmp_path / "source", files)
    result = cli("check", source, "--quiet", "--workers", 1, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert [row["index"] for row in report["broken"]] == [1, 2]
    assert "b.png cannot be read as an image" in report["broken"][0]["error"]
    assert "c.gif holds several frames" in report["broken"][1]["error"]
    assert report["duplicates"]["groups"] == 0  # those that cannot be read are not all the same
    result = cli("check", source, "--quiet", "--workers", 0, "--crop", "none", "--resolution", 8)
    assert result.exit_code == 1
    assert result.stderr.count("broken: ") == 2 and "3, 2 broken" in result.stdout
    (source / "a.png").unlink()
    assert "2, 2 broken" in cli("check", source, "--quiet", "--workers", 0).stdout
    assert "does not exist" in cli("check", "./none").stderr


def test_check_says_what_training_would_refuse(tmp_path: Path) -> None:
    """By default the channels are as stored, as in training."""
    files = {"a.png": encoded(0), "b.png": encoded(1, mode="L"), "c.png": encoded(2, mode="RGBA"), "notes.txt": b""}
    source = write_folder(tmp_path / "source", files)
    result = cli("check", source, "--quiet", "--workers", 0)
    assert result.exit_code == 1 and "3, 2 broken" in result.stdout
    assert "b.png is grey" in result.stderr and "(--channels 3; spigan train: --set data.channels=3)" in result.stderr
    assert "c.png has an alpha channel" in result.stderr
    assert "left out:   .txt (1)" in result.stdout
    assert cli("check", source, "--quiet", "--workers", 0, "--channels", 3).exit_code == 0


def test_check_counts_colours_that_are_taken_as_they_are(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.open(io.BytesIO(encoded(0)))
    image.save(tmp_path / "a.png", icc_profile=profile)
    image.save(tmp_path / "b.png", icc_profile=profile.replace(b"s\0R\0G\0B", b"A\0B\0C\0D").replace(b"sRGB", b"ABCD"))
    image.convert("CMYK").save(tmp_path / "c.jpg")
    exchanged = profile.replace(b"rXYZ", b"tXYZ", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"tXYZ", b"bXYZ", 1)
    image.save(tmp_path / "d.png", icc_profile=exchanged)  # red and blue, under the name of sRGB
    result = cli("check", tmp_path, "--quiet", "--workers", 0, "--json")
    report = json.loads(result.stdout)
    assert report["profiles"] == {"other": 2, "sRGB": 1} and report["modes"] == {"RGB": 3, "CMYK": 1}
    result = cli("check", tmp_path, "--quiet", "--workers", 0, "--resolution", 64)
    assert "warning: 3 images are CMYK or have a colour profile other than sRGB" in result.stderr
    assert "warning: 4 images are smaller than the resolution" in result.stderr


def test_names_reach_the_terminal_escaped(tmp_path: Path) -> None:
    name = "\x1b]0;title\x07.png"
    write_folder(tmp_path / "set", {name: encoded(0), f"b{name}": encoded(0), f"c{name}": b"", f"d{name}": b""})
    for arguments in (("check", tmp_path / "set"), ("convert", tmp_path / "set", "--out", tmp_path / "o\x1b")):
        options = ("--resolution", 8, "--workers", 0)
        result = cli(*arguments, *options)
        assert "\x1b" not in result.output and "\x07" not in result.output
        assert "\\x1b]0;title" in result.output
