"""SPI-GAN: images from noise in one evaluation of the generator. `spigan.sample()` draws images; see README.md.

Names are imported when they are first used, so that `import spigan` and `spigan --help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from spigan import _moved
from spigan._version import __version__

if TYPE_CHECKING:
    from spigan import interop, ops
    from spigan.config import ModelConfig, TrainConfig
    from spigan.data import DataConfig
    from spigan.evaluation.evaluate import evaluate
    from spigan.models import SPIGAN, Discriminator, Generator
    from spigan.presets import preset
    from spigan.sampling import Sampler, sample
    from spigan.sde import VPSDE
    from spigan.training.trainer import Trainer

_HOMES = {
    "DataConfig": "spigan.data",
    "Discriminator": "spigan.models",
    "Generator": "spigan.models",
    "ModelConfig": "spigan.config",
    "SPIGAN": "spigan.models",
    "Sampler": "spigan.sampling",
    "TrainConfig": "spigan.config",
    "Trainer": "spigan.training.trainer",
    "VPSDE": "spigan.sde",
    "evaluate": "spigan.evaluation.evaluate",
    "preset": "spigan.presets",
    "sample": "spigan.sampling",
}
_MODULES = ("interop", "ops")

__all__ = [
    "SPIGAN",
    "VPSDE",
    "DataConfig",
    "Discriminator",
    "Generator",
    "ModelConfig",
    "Sampler",
    "TrainConfig",
    "Trainer",
    "__version__",
    "evaluate",
    "interop",
    "ops",
    "preset",
    "sample",
]

_moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"spigan.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'spigan' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
