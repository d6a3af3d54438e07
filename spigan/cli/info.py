"""`spigan info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from spigan.cli.options import AsJson


def info(
    as_json: AsJson = False,
    plans: Annotated[
        bool, typer.Option("--plans", help="Show the fastest way of each layer, as measured here, and all times.")
    ] = False,
) -> None:
    """Show versions, devices and backends.

    Also shows which backend each operation would use, and why. Include the output in bug reports.
    """
    if plans:
        from spigan.ops.plans import describe, report

        typer.echo(json.dumps(describe(), indent=2) if as_json else report())
        return
    from spigan.info import main as print_info

    print_info(as_json)
