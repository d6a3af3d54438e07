"""The precision of a run whose configuration leaves it to the device."""

from __future__ import annotations

import torch

from spigan.config import TrainConfig


def resolve_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Return the configuration with precision "auto" replaced: bf16 on a GPU that computes in bfloat16, else fp32."""
    if config.precision != "auto":
        return config
    has_bf16 = False
    if device.type == "cuda":
        with torch.cuda.device(device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return config.model_copy(update={"precision": "bf16" if has_bf16 else "fp32"})
