"""Named training configurations, for `preset(name, **changes)` and `spigan train --preset NAME`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from spigan.choices import did_you_mean
from spigan.config import ModelConfig, TrainConfig
from spigan.data import DataConfig

_PAPER256: dict[str, Any] = {
    # StyleGAN2-ADA's "paper256": half the widths of config F, R1 gamma 1, path length 2.
    "model": ModelConfig(resolution=256, channel_base=16384, embed_channels=32),
    "xflip": True,
    "r1_gamma": 1.0,
    "pl_weight": 2.0,
    "ema_kimg": 20,
    "ema_rampup": None,
    "mbstd_group": 8,
    "precision": "auto",
}

_PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "data": DataConfig(source="digits"),
        "model": ModelConfig(
            resolution=16, img_channels=1, dim_h=128, embed_channels=32, channel_base=384, channel_max=48
        ),
        "total_kimg": 32,
        "batch": 32,
        "r1_gamma": 1.0,
        "ema_kimg": 1,
        "ema_rampup": None,
        "tick_kimg": 1,
        "snapshot_ticks": 10,
    },
    "cifar10": {
        # StyleGAN2-ADA's "cifar": no path length, gamma 0.01, EMA half-life of 500 kimg, 512 channels everywhere.
        # Unlike StyleGAN2-ADA's, D has residual blocks.
        "data": DataConfig(source="cifar10"),
        "model": ModelConfig(resolution=32),
        "xflip": True,
        "total_kimg": 100000,
        "batch": 64,
        "mbstd_group": 32,
        "augment": "ada",
        "precision": "auto",
    },
    "cifar10-small": {
        "data": DataConfig(source="cifar10"),
        "model": ModelConfig(resolution=32, dim_h=256, embed_channels=32, channel_base=1024, channel_max=96),
        "xflip": True,
        "total_kimg": 1000,
        "batch": 32,
        "ema_kimg": 10,
        "r1_gamma": 0.1,
        "precision": "bf16",
        "tick_kimg": 1,
        "snapshot_ticks": 10,
    },
    "celebahq256": {"batch": 64, "total_kimg": 25000} | _PAPER256,
    "church256": {"batch": 64, "total_kimg": 50000} | _PAPER256,
}


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(_PRESETS)


def preset_fields(name: str) -> dict[str, Any]:
    """Return the fields that a preset sets, as plain nested values as in a config.json.

    Raises:
        ValueError: if there is no preset with that name.
    """
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}; available: {', '.join(_PRESETS)}{did_you_mean(name, _PRESETS)}")
    return {
        key: value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        for key, value in _PRESETS[name].items()
    }


def preset(name: str, /, **changes: Any) -> TrainConfig:
    """Return the training configuration with a name.

    Args:
        name: "digits", "cifar10", "cifar10-small", "celebahq256" or "church256".
        **changes: fields of `TrainConfig` to replace. A dict for `model` or `data` changes only the fields it names.
            The 256-pixel presets do not include images, so they need `data`.

    Raises:
        ValueError: if the name is unknown, a field is invalid, or the preset needs `data`, which is missing.
    """
    fields = preset_fields(name)
    for key, value in changes.items():
        old = fields.get(key)
        fields[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    if "data" not in fields:
        raise ValueError(
            f'the preset {name!r} needs images: pass data={{"source": "folder, zip, parquet file or hub id"}}'
        )
    return TrainConfig.model_validate(fields)
