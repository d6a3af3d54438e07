"""Error handling: a user's mistake prints one line to standard error and ends with exit status 1."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)


def process_count() -> int:
    """Return the number of processes that a launcher (torchrun, accelerate launch) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def printable(text: str) -> str:
    """Escape control characters, because names from untrusted files may contain terminal commands."""
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
    """A command group that prints an expected error in one line. Any other error is a bug, and is raised."""

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
    # The module that defines BackendUnavailable imports torch. If it is not loaded, nothing can have raised the error.
    backends = sys.modules.get("spigan.ops.backends")
    return isinstance(error, _EXPECTED) or (backends is not None and isinstance(error, backends.BackendUnavailable))
