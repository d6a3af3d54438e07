"""Names to choose from: list them in an error message, and guess which one a misspelled name means."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(given: object, names: Iterable[str]) -> str:
    """Return "; did you mean NAME?" for the name most similar to `given`, or "" if no name is similar."""
    by_lower_case = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(given).lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[found[0]]}?" if found else ""


def listed(names: Sequence[str]) -> str:
    """Join names for use in a sentence, as in "a, b or c"."""
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else "".join(names)


def check_choice(what: str, given: str, names: Sequence[str]) -> None:
    """Check that a value is one of the allowed names.

    Args:
        what: name of the option or argument, for the error message.
        given: the value.
        names: the allowed values.

    Raises:
        ValueError: if `given` is not one of `names`. The message lists the names and suggests the most similar one.
    """
    if given not in names:
        raise ValueError(f"{what} must be {listed(names)}, got {given}{did_you_mean(given, names)}")
