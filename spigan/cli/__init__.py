"""The command line, `spigan`. One module per group of commands; heavy packages are imported inside the commands."""

from spigan.cli.program import app, main

__all__ = ["app", "main"]
