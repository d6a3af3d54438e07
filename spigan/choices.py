"""Names to choose from: how an error lists them, and which one a misspelled name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """Return "; did you mean NAME?" for the name most like `given`, or "" if none is close."""
    by_lower_case = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(given).lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[found[0]]}?" if found else ""


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence: "a, b or c"."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def check_choice(what: str, given: str, names: Sequence[str]) -> None:
    """Check that a value is one of those allowed.

    Args:
        what: name of the option or argument, for the error.
        given: the value.
        names: the values allowed.

    Raises:
        ValueError: if `given` is not one of `names`. The message lists them and suggests the nearest.
    """
    if given not in names:
        raise ValueError(f"{what} must be {listed(names)}, got {given}{did_you_mean(given, names)}")
