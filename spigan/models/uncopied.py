"""`Uncopied`, the base class of caches that belong to one object."""

from __future__ import annotations

from typing import Any


class Uncopied:
    """Base class of caches that belong to one object. A copied or unpickled object starts with an empty cache."""

    def __deepcopy__(self, memo: Any) -> Uncopied:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
