"""docs/tutorials: every Python and bash block of a page runs, in order, in an empty folder. docs/reference is whole.
What pages name exists: the fields that `--set` changes, spigan's commands and their options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import spigan
from spigan.cli import app

DOCS = Path(__file__).resolve().parent.parent / "docs"
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run_page(page: Path) -> tuple[dict[str, Any], list[str]]:
    """Run the blocks of a page: what its Python left behind, and what each command printed."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for block in FENCE.finditer(text):
        language, code = block.groups()
        if language == "python":
            lines = text.count("\n", 0, block.start(2))  # so that a traceback names the page's own line
            exec(compile("\n" * lines + code, str(page), "exec"), namespace)
            continue
        for line in code.replace("\\\n", " ").splitlines():
            program, *args = shlex.split(line, comments=True)
            assert program == "spigan", f"{page.name}: only commands of spigan can be run, not {line}"
            result = CliRunner().invoke(app, args)
            assert result.exit_code == 0, f"{line}\n{result.output}"
            printed.append(result.output)
    return namespace, printed


def check_own_images(namespace: dict[str, Any], printed: list[str]) -> None:
    assert len(namespace["images"]) == 200
    assert namespace["images"][0].shape == (3, 16, 16) and namespace["images"][0].dtype == torch.uint8
    assert namespace["samples"].shape == (8, 3, 16, 16)
    seen = [spigan.TrainConfig.model_validate_json(Path("runs/discs/config.json").read_text())]
    assert seen[0].model.img_channels == 3 and seen[0].xflip and seen[0].total_kimg == 0.6
    trained, kept = (load_file(Path(folder) / "model.safetensors") for folder in ("runs/discs/model", "my-discs"))
    assert trained.keys() == kept.keys() and all(torch.equal(trained[name], kept[name]) for name in kept)
    with Image.open("discs.png") as grid, Image.open("noise-to-image.png") as strip:
        assert grid.mode == strip.mode == "RGB" and strip.width > 2 * strip.height


def check_own_stylegan(namespace: dict[str, Any], printed: list[str]) -> None:
    for name in ("synthesis", "discriminator"):
        network = namespace[name]
        # Bias and noise strength start at 0, but all of them learn.
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters()), name
    assert namespace["images"].shape == (4, 3, 16, 16)
    assert re.search(r"modulated_conv2d +cpp ", printed[-1])


def check_own_backend(namespace: dict[str, Any], printed: list[str]) -> None:
    assert re.search(r"rk4_mlp +numpy +\(auto: first that runs on cpu\)", printed[-1])
    assert not torch.equal(namespace["images"], namespace["expected"]), "other arithmetic, other rounding"


CHECKS: dict[str, Callable[[dict[str, Any], list[str]], None]] = {
    "own-backend": check_own_backend,
    "own-images": check_own_images,
    "own-stylegan": check_own_stylegan,
}


def test_every_tutorial_has_a_check() -> None:
    assert sorted(CHECKS) == sorted(page.stem for page in (DOCS / "tutorials").glob("*.md"))


@pytest.mark.parametrize("name", CHECKS)
def test_tutorial(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, added_backends: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)
    CHECKS[name](*run_page(DOCS / "tutorials" / f"{name}.md"))


def test_the_reference_has_every_public_name() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    names = {f"spigan.{name}" for name in spigan.__all__} - {"spigan.__version__", "spigan.interop", "spigan.ops"}
    # An operation is named like its module, and is shown as the module's.
    operations = {f"spigan.ops.{name}.{name}" for name in spigan.ops.backends.operations()}
    names |= {f"spigan.ops.{name}" for name in spigan.ops.__all__ if name not in spigan.ops.backends.operations()}
    assert names | operations <= shown


PAGES = [DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_commands_and_options_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    configs = {"": spigan.TrainConfig, "model.": spigan.ModelConfig, "data.": spigan.DataConfig}
    fields = {prefix + field for prefix, config in configs.items() for field in config.model_fields}
    assert set(re.findall(r"--set ([a-z0-9_.]+)=", text)) <= fields
    root = typer.main.get_command(app)
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^ {4,}(.+)$", text, re.MULTILINE)
    for block in re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        code += block.splitlines()
    for line in code:
        program, *words = line.partition("  #")[0].split() or [""]
        if program != "spigan" or not words:
            continue
        known = root
        while words and words[0] in getattr(known, "commands", {}):
            known = known.commands[words.pop(0)]  # type: ignore[attr-defined]
        assert known is not root or words[0].startswith("-"), f"there is no such command: {line}"
        options = {option for parameter in known.params for option in parameter.opts} | {"--help"}
        given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert given <= options, f"{sorted(given - options)}: {line}"
