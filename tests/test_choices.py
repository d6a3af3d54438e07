"""spigan.choices: which name a misspelled one probably meant, and how an error lists the names."""

from __future__ import annotations

import pytest

from spigan.choices import check_choice, did_you_mean, listed

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("bfloat", "bfloat16"),
        ("bf16", "bfloat16"),
        ("half", ""),
        ("flaot32", "float32"),
        ("FLOAT16", "float16"),
        ("int8", ""),
        ("", ""),
    ],
)
def test_did_you_mean(given: str, nearest: str) -> None:
    assert did_you_mean(given, DTYPES) == (f"; did you mean {nearest}?" if nearest else "")


def test_the_suggestion_is_spelled_as_the_name_is() -> None:
    assert did_you_mean("pngg", ["PNG", "WebP"]) == "; did you mean PNG?"
    assert did_you_mean("a", []) == ""


def test_listed() -> None:
    assert listed([]) == "" and listed(["a"]) == "a" and listed(["a", "b"]) == "a or b"
    assert listed(["a", "b", "c"]) == "a, b or c"


def test_check_choice() -> None:
    check_choice("--dtype", "float16", DTYPES)
    with pytest.raises(ValueError, match=r"^--dtype must be float32, bfloat16 or float16, got int8$"):
        check_choice("--dtype", "int8", DTYPES)
    with pytest.raises(ValueError, match=r"got bfloat61; did you mean bfloat16\?$"):
        check_choice("--dtype", "bfloat61", DTYPES)
