"""The command line, `spigan`."""

from spigan.cli.main import app, main

__all__ = ["app", "main"]
