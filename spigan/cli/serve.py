"""`spigan app`. Not app.py: `spigan.cli.app` is the program."""

from __future__ import annotations

from typing import Annotated

import typer

from spigan.cli.errors import warn
from spigan.cli.options import Device


def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A run folder, a saved model or a hub id to offer beside the bundled models; repeat for several.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. With 0.0.0.0, other machines can reach the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Port (default: the first free one from 7860).", min=1, max=65535, show_default=False),
    ] = None,
    device: Device = None,
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in the browser.")] = False,
) -> None:
    """Explore a model in the browser (needs the extra `app`).

    The page shows batches, noise turning into images, and interpolations. Only this machine can reach it unless --host
    allows others. It works offline and sends no data anywhere.

    \b
    Examples:
      spigan app --open
      spigan app --model runs/00000 --model user/name
    """
    from spigan.app import Page, is_loopback, launch

    if not is_loopback(host):
        warn(f"anyone who can reach this machine at {host} can use the page; it has no password")
    launch(Page(models or [], device), host=host, port=port, browser=browser)
