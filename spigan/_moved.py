"""Old module paths. Importing one warns, and gives access to the names in the modules that replace it."""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "spigan.ablate": ("spigan.ablation.grid", "spigan.ablation.study", "spigan.ablation.report"),
    "spigan.convert": ("spigan.data.convert",),
    "spigan.export": ("spigan.sampling.export",),
    "spigan.hub": ("spigan.models.hub",),
    "spigan.interpolation": ("spigan.sampling.interpolation",),
    "spigan.writers": ("spigan.sampling.writers",),
    "spigan.training.loss": ("spigan.training.losses",),
}


class _OldPaths(MetaPathFinder, Loader):
    """Finds the modules in `MOVED` once all other finders have failed."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        targets = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} has moved to {' and '.join(targets)}", DeprecationWarning, stacklevel=2)

        def get(name: str) -> Any:
            if not name.startswith("__"):
                for target in map(importlib.import_module, targets):
                    if hasattr(target, name):
                        return getattr(target, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = get  # type: ignore[method-assign]


def install() -> None:
    """Make the old paths importable."""
    sys.meta_path.append(_OldPaths())
