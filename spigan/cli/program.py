"""The `spigan` program: its commands, in the order in which the help lists them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from spigan.cli import ablate, bench, data, demo, doctor, evaluate, info, sample, serve, share, train
from spigan.cli.errors import Program, fail
from spigan.cli.options import HELP_NAMES, help_text
from spigan.training.launcher import process_count

app = typer.Typer(
    cls=Program,
    help="Generate images with SPI-GAN: from noise to image in one evaluation of the generator.",
    epilog="Run `spigan COMMAND --help` for the options of a command.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
)

_MAKE, _TRAIN, _MEASURE, _SHARE = "Make images", "Train", "Measure", "Share"

for _name, _panel, _command in (
    ("demo", _MAKE, demo.demo),
    ("sample", _MAKE, sample.sample),
    ("interpolate", _MAKE, sample.interpolate),
    ("app", _MAKE, serve.serve),
    ("train", _TRAIN, train.train),
    ("ablate", _TRAIN, ablate.ablate),
    ("evaluate", _MEASURE, evaluate.evaluate),
    ("doctor", _MEASURE, doctor.doctor),
    ("info", _MEASURE, info.info),
    ("export", _SHARE, share.export),
    ("push", _SHARE, share.push),
):
    app.command(_name, rich_help_panel=_panel, help=help_text(_command))(_command)
app.add_typer(data.app, name="data", rich_help_panel=_TRAIN)
app.add_typer(bench.app, name="bench", rich_help_panel=_MEASURE)


def _show_version(value: bool) -> None:
    if value:
        from spigan._version import __version__

        typer.echo(f"spigan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand in ("ablate", "demo") and process_count() > 1:
        fail(f"{context.invoked_subcommand} runs in one process; only `spigan train` can use several")


def main() -> None:
    """Run the `spigan` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
