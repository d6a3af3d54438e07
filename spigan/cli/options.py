"""Options shared by several commands, and checks of options that accept one of several names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from spigan.choices import check_choice, did_you_mean

if TYPE_CHECKING:
    import torch

HELP_NAMES = {"help_option_names": ["-h", "--help"]}
DTYPES = ("float32", "bfloat16", "float16")


def help_text(command: Callable[..., object]) -> str:
    """Return the docstring of a command with each paragraph on one line, so that the terminal can wrap it."""
    paragraphs = inspect.getdoc(command).split("\n\n")  # type: ignore[union-attr]  # every command has one
    return "\n\n".join(text if text.startswith("\b") else text.replace("\n", " ") for text in paragraphs)


def one_of(option: str, names: tuple[str, ...]) -> Callable[[str | None], str | None]:
    """Return a callback for an option that accepts one of `names`."""

    def check(value: str | None) -> str | None:
        if value is not None:
            check_choice(option, value, names)
        return value

    return check


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype for one of the names in `DTYPES`."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_device(value: str | None) -> str | None:
    """Catch misspelled device names without importing torch. `resolve_device` checks everything else."""
    kind = (value or "auto").partition(":")[0]
    if kind not in ("auto", "cpu", "cuda", "mps", "xpu"):
        likely = {"gpu": "cuda", "nvidia": "cuda"}.get(kind.lower())
        hint = f"; did you mean {likely}?" if likely else did_you_mean(kind, ("auto", "cpu", "cuda"))
        if hint:
            raise ValueError(f"--device must be auto, cpu, cuda, cuda:1, ..., got {value}{hint}")
    return value


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A run folder, a saved model, a hub id, or a bundled model: digits (default), cifar10-small.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="auto (default: cuda if available, else cpu), cpu, cuda, cuda:1, ...", callback=_check_device
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="float32, bfloat16 or float16.", callback=one_of("--dtype", DTYPES)),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="Implementation of the operations: auto, reference, cpp, triton or cuda."),
]
Batch = Annotated[
    int | None, typer.Option("--batch", help="Images per batch (default: depends on the resolution).", min=1)
]
FirstSeed = Annotated[int, typer.Option("--seed", help="Seed of the first image; image i uses seed + i.", min=0)]
NoProgress = Annotated[bool, typer.Option("--quiet", help="Hide the progress bar.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
