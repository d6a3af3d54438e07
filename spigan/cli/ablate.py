"""`spigan ablate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spigan.cli.errors import fail
from spigan.cli.options import NoProgress


def ablate(
    grid: Annotated[str, typer.Argument(help="A grid file (.toml or .json), or a bundled grid: table5, digits.")],
    out: Annotated[Path, typer.Option(help="Folder of the study. Each arm is a run folder inside it.")] = Path(
        "ablation"
    ),
    show: Annotated[
        bool, typer.Option("--show", help="Print the grid file and exit. Use it as a template for your own.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Report on the runs in the folder without training.")
    ] = False,
    cores: Annotated[
        str | None,
        typer.Option(help="CPU cores, for example 0,1: as many runs train at once, each with one thread on its core."),
    ] = None,
    quiet: NoProgress = False,
) -> None:
    """Train the arms of an ablation study and compare them (Table 5, Fig. 8).

    Trains the arms one after another, or several at once with --cores, and writes table.md, table.json and curve.png.
    After an interruption, run the same command again: finished runs are kept, and an interrupted run resumes exactly.
    The exit status is 0 if all runs finished, 1 if any failed, and 130 after Ctrl-C.

    \b
    Examples:
      spigan ablate digits
      spigan ablate table5 --show > my-grid.toml
      spigan ablate my-grid.toml --out study --cores 0,1
      spigan ablate my-grid.toml --out study --report-only
    """
    from spigan.ablation.grid import grid_path, read_grid
    from spigan.ablation.report import write_report
    from spigan.ablation.study import run
    from spigan.files import read_text

    path = grid_path(grid)
    if show:
        typer.echo(read_text(path), nl=False)
        return
    study = read_grid(path)
    failed: list[str] = []
    interrupted = False
    if not report_only:
        failed, interrupted = run(study, out, cores=_cores(cores), progress=not quiet, say=typer.echo)
    paths = write_report(study, out)
    if interrupted:
        on = "" if cores is None else f" --cores {cores}"
        typer.echo(f"Stopped. Resume with: spigan ablate {grid} --out {out}{on}")
        raise typer.Exit(130)
    typer.echo(f"Report: {', '.join(map(str, paths))}")
    if failed:
        fail(f"{len(failed)} of {len(study.runs)} runs failed: {', '.join(failed)}; run the command again to retry")


def _cores(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(f"expected numbers of CPU cores such as 0,1, got {text!r}", param_hint="--cores")
    return list(map(int, parts))
