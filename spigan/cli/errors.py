"""Error handling: a user's mistake prints one line to standard error and ends with exit status 1."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from spigan.files import printable
from spigan.training.launcher import process_count

_EXPECTED = (ValueError, OSError, ImportError, FloatingPointError)
LINES = "\n\t"  # a message may have several lines


def fail(error: Exception | str) -> NoReturn:
    """Print an error and exit with status 1."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from spigan.config import describe_problems

        error = describe_problems(error)
    where = f" in process {os.environ.get('RANK')} of {process_count()}" if process_count() > 1 else ""
    typer.secho(f"error{where}: {printable(error, keep=LINES)}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def warn(text: str) -> None:
    """Print a warning to standard error."""
    typer.secho(f"warning: {printable(text, keep=LINES)}", fg=typer.colors.YELLOW, err=True)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Print a warning for users in one line. Others are for developers, who need to know where they come from."""
    if issubclass(category, UserWarning):
        warn(str(message))
    else:
        sys.stderr.write(warnings.formatwarning(message, category, *where[:2]))


class Program(TyperGroup):
    """A command group that prints an expected error in one line. Any other error is a bug, and is raised."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
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
