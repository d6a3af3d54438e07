"""Load weights from other packages."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from spigan.models.generator import Generator
from spigan.ops.upfirdn2d import fir_filter

_PREFIX = "synthesis."


def stylegan2_synthesis(state_dict: Mapping[str, Tensor], *, conv_clamp: float | None = None) -> Generator:
    """Load a synthesis network of StyleGAN2-ADA PyTorch (skip architecture). It makes the same images as the original.

    Args:
        state_dict: tensors by their official names, `synthesis.b4.const`, `synthesis.b8.conv0.weight`, ..., with or
            without the prefix `synthesis.`. The state dict of a whole generator also works; its `mapping.*` is ignored.
            float16 weights are cast to float32.
        conv_clamp: the network's clamp, which is not part of a state dict. StyleGAN2-ADA uses 256 with float16.

    Returns:
        A `Generator` in eval mode. Call it with the official per-layer styles ws [N, num_ws, D].

    Raises:
        TypeError: if a value is not a floating-point tensor.
        ValueError: if a name is missing or unknown, a shape does not fit, or a FIR filter is not [1, 3, 3, 1].
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    if conv_clamp is not None and not conv_clamp > 0:
        raise ValueError(f"conv_clamp must be positive or None, got {conv_clamp}")
    for name, value in state_dict.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
        if not value.numel():
            raise ValueError(f"{name} has no values: its shape is {list(value.shape)}")
    tensors = {
        name.removeprefix(_PREFIX): value for name, value in state_dict.items() if not name.startswith("mapping.")
    }
    standard = fir_filter()
    for name in [name for name in tensors if name.endswith("resample_filter")]:
        taps = tensors.pop(name)
        if taps.shape != standard.shape or not torch.allclose(taps.float().cpu(), standard, atol=1e-6):
            raise ValueError(f"{name} must be StyleGAN2's filter [1, 3, 3, 1], the only one that Generator supports")
    with torch.device("meta"):  # shapes only: an untrusted state dict may name sizes that do not fit into memory
        expected = _generator_for(tensors, conv_clamp).state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    if problems:
        raise ValueError(f"not a StyleGAN2-ADA synthesis network (skip architecture): {'; '.join(problems[:5])}")
    generator = _generator_for(tensors, conv_clamp)
    generator.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return generator.eval()


def _generator_for(tensors: Mapping[str, Tensor], conv_clamp: float | None) -> Generator:
    """Return a generator whose sizes fit the tensors."""
    widths = {
        int(name.split(".")[0][1:]): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.startswith("b")
        and re.fullmatch(r"[0-9]{1,4}", name.split(".")[0][1:])
        and name.endswith("conv1.bias")
        and tensor.ndim == 1
    }
    for name, ndim in (("b4.conv1.affine.weight", 2), ("b4.torgb.bias", 1)):
        if name not in tensors:
            raise ValueError(f"not a StyleGAN2-ADA synthesis network: missing {name}")
        if tensors[name].ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimension(s), got shape {list(tensors[name].shape)}")
    # Any base that gives the widths min(base / r, max) works. The caller compares every shape.
    resolution, channel_max = max(widths, default=0), widths.get(4, 1)
    channel_base = max((res * width for res, width in widths.items()), default=1)
    return Generator(
        resolution,
        tensors["b4.torgb.bias"].shape[0],
        dim_h=tensors["b4.conv1.affine.weight"].shape[1],
        channel_base=channel_base,
        channel_max=channel_max,
        conv_clamp=conv_clamp,
    )
