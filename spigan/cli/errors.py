"""Errors of the command line: every mistake of a user ends in one line on standard error and exit status 1."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from spigan.training.launcher import process_count

_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)


def printable(text: str) -> str:
    """Escape control characters: names from untrusted files may contain commands to the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def fail(error: Exception | str) -> NoReturn:
    """Print an error and exit with status 1."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from spigan.config import describe_problems

        error = describe_problems(error)
    where = f" in process {os.environ.get('RANK')} of {process_count()}" if process_count() > 1 else ""
    typer.secho(f"error{where}: {printable(str(error))}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    typer.secho(f"warning: {printable(text)}", fg=typer.colors.YELLOW, err=True)


class Program(TyperGroup):
    """A group of commands whose expected errors are printed in one line; any other error is a bug and raises."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `spigan info | head`: typer exits silently
            raise
        except Exception as error:
            if not _is_expected(error):
                raise
            fail(error)


def _is_expected(error: Exception) -> bool:
    # The module of BackendUnavailable loads torch. Unless it is loaded, nothing can have raised one.
    backends = sys.modules.get("spigan.ops.backends")
    return isinstance(error, _EXPECTED) or (backends is not None and isinstance(error, backends.BackendUnavailable))
