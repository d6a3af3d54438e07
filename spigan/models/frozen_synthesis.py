"""The synthesis network without gradients: the same images in less time and with less memory.

If the layers of `spigan.models.synthesis` run one by one, each of them needs an extra pass over its input, to scale it
by the style. Here the last pass of every layer scales its result by the style of the next layer, and also computes
ToRGB. All styles come from one matrix product, and the demodulation factors from one product for each shape of weights.
Everything that depends only on the parameters, such as weights packed for a backend, is kept in a `PreparedSynthesis`
until a parameter changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

from spigan.models.layers import LRELU_GAIN
from spigan.models.synthesis import SynthesisBlock, SynthesisLayer
from spigan.models.uncopied import Uncopied
from spigan.ops import backends, fir_bias_act
from spigan.ops.demodulation import demodulation_of_sums, normalized_style, normalized_weight, squared_sums
from spigan.ops.fir_bias_act import upsample2d
from spigan.ops.layer_end import LayerEnd, wide
from spigan.ops.layer_plans import LayerCall, LayerPlan, layer_plan
from spigan.ops.layer_weights import LayerWeight, prepare_weight
from spigan.ops.library import why_transformed
from spigan.ops.limits import MAX_RGB_CHANNELS

_optimizer_steps = [0]


def _count_step(*_: object) -> None:
    _optimizer_steps[0] += 1


# Fused optimisers change parameters without increasing the versions of the tensors.
register_optimizer_step_post_hook(_count_step)


def frozen_state(module: nn.Module) -> tuple[Any, ...] | None:
    """Return a value that changes whenever a tensor of `module` may have changed.

    Returns:
        The address and version of each parameter and buffer, and the number of optimiser steps so far. None if these do
        not reveal every change: for parameters that require gradients, for inference tensors and fake tensors, and
        under the transforms of torch.func.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if any(t.requires_grad or t.is_inference() or isinstance(t, FakeTensor) for t in tensors):
        return None
    if why_transformed(*tensors) is not None:
        return None
    return _optimizer_steps[0], tuple((t.data_ptr(), t._version) for t in tensors)


def has_forward_hooks(modules: Iterable[nn.Module]) -> bool:
    """Return whether any of `modules` has a forward hook, which runs only if that module is called."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@dataclass
class PreparedSynthesis(Uncopied):
    """Everything that inference computes from a generator's parameters alone, kept until the parameters change.

    Attributes:
        state: `frozen_state` of the generator for which the rest was computed; empty before the first call.
        weights: weights of the layers, by (layer, form, dtype).
        start: float32 [4, 4, O], the constant of the first block, channels last.
        affine: weights and biases of all affine layers, float32, multiplied by their gains.
        squared_sums: by whether the weights are normalised for float16 (True) or as stored (False): for each shape of
            weights, the indices of the layers and their squared sums [L, O, I].
    """

    state: tuple[Any, ...] = ()
    weights: dict[tuple[int, str, torch.dtype], LayerWeight] = field(default_factory=dict)
    start: Tensor | None = None
    affine: tuple[Tensor, Tensor] | None = None
    squared_sums: dict[bool, list[tuple[list[int], Tensor]]] = field(default_factory=dict)


def inference_backend(generator: nn.Module, h: Tensor, dtype: torch.dtype, img_channels: int) -> str | None:
    """Return the backend with which `synthesize` can make the images of `generator`.

    Args:
        generator: the module whose parameters `synthesize` would read.
        h: latent vectors.
        dtype: dtype of the convolutions.
        img_channels: C, number of image channels.

    Returns:
        A kernel backend, or None if the layers must run one by one.
    """
    if torch.compiler.is_compiling() or h.shape[0] == 0 or torch.float64 in (h.dtype, dtype):
        return None
    if img_channels > MAX_RGB_CHANNELS:
        return None
    tensors = [h, *generator.parameters(), *generator.buffers()]
    if why_transformed(*tensors) is not None or any(isinstance(t, FakeTensor) for t in tensors):
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return None
    if has_forward_hooks(module for module in generator.modules() if module is not generator):
        return None
    backend = backends.choose("modulated_conv2d", None, h.device)
    return backend if backend in backends.KERNELS else None


def synthesize(
    blocks: Sequence[SynthesisBlock],
    h: Tensor,
    mode: str,
    sources: Sequence[Tensor | None],
    dtype: torch.dtype,
    backend: str,
    prepared: PreparedSynthesis,
    kept: bool,
) -> Tensor:
    """Make the images of latent vectors.

    Args:
        blocks: blocks of the generator.
        h: [N, D], or [N, num_ws, D].
        mode: noise mode; see `SynthesisLayer.noise_inputs`.
        sources: noise source of each layer.
        dtype: dtype of the convolutions.
        backend: the result of `inference_backend`.
        prepared: what earlier calls have computed from these parameters. This call adds to it.
        kept: whether a later call will use `prepared` again, which makes costlier packings of the weights worthwhile.

    Returns:
        [N, C, H, W] in the dtype of h.
    """
    layers = [layer for block in blocks for layer in block.layers]
    styles, rgb_styles = _styles(prepared, layers, blocks, h)
    half = dtype == torch.float16
    if half:
        styles = [normalized_style(style) for style in styles]
    factors = _demodulation(prepared, layers, styles, half)
    if prepared.start is None:
        prepared.start = blocks[0].const.float().permute(1, 2, 0).contiguous()
    x: Tensor | None = (prepared.start * styles[0][:, None, None]).to(dtype)
    img: Tensor | None = None
    for index, layer in enumerate(layers):
        assert x is not None
        block, last = blocks[(index + 1) // 2], index == len(layers) - 1
        end = replace(
            _layer_end(layer, mode, sources[index], dtype),
            factor=wide(factors[index], dtype),
            next_factor=None if last else styles[index + 1],
            rgb_weight=_rgb_weight(block, rgb_styles[(index + 1) // 2]) if layer is block.conv1 else None,
        )
        call = LayerCall(
            x=x,
            end=end,
            style=None,  # the previous layer has already scaled x
            up=layer.up,
            padding=1,
            filter=layer.resample_filter.float(),  # the module may have a different dtype
            shape=layer.weight.shape,
            keep=not last,
            kept=kept,
        )
        x, rgb = _run_layer(prepared, index, layer, call, backend)
        if rgb is not None:
            below = None if img is None else upsample2d(img, block.resample_filter)
            img = fir_bias_act(rgb.permute(0, 3, 1, 2), bias=block.torgb.bias, clamp=block.torgb.clamp, add=below)
    assert img is not None
    return img.to(h.dtype).contiguous()


def _layer_end(layer: SynthesisLayer, mode: str, source: Tensor | None, dtype: torch.dtype) -> LayerEnd:
    """Return the operations after the convolution, without those that depend on the styles."""
    noise, strength, seed = layer.noise_inputs(mode, source)
    return LayerEnd(
        noise=wide(noise, dtype),
        seed=None if seed is None else seed.reshape(1),
        strength=wide(strength, dtype),
        bias=wide(layer.bias, dtype),
        activation="lrelu",
        gain=LRELU_GAIN,
        clamp=layer.clamp,
    )


def _rgb_weight(block: SynthesisBlock, style: Tensor) -> Tensor:
    """Return the modulated weights [N, C, O] of a block's ToRGB layer, whose style is [N, O]."""
    return block.torgb.weight[:, :, 0, 0].float() * style[:, None]


def _run_layer(
    prepared: PreparedSynthesis, index: int, layer: SynthesisLayer, call: LayerCall, backend: str
) -> tuple[Tensor | None, Tensor | None]:
    """Run a layer in the way that is fastest for its input, and keep its weights in the form that this takes."""
    dtype = call.x.dtype

    def pack(plan: LayerPlan) -> LayerWeight:
        weight = normalized_weight(layer.weight) if dtype == torch.float16 else layer.weight
        return prepare_weight(weight, plan.form, dtype, plan.backend)

    others = call.x.device.type == "cuda" and backends.requested()[0] == "auto"
    plan = layer_plan(backend, call, pack, others=others)
    key = (index, plan.form, dtype)
    if (packed := prepared.weights.get(key)) is None:
        packed = pack(plan)
        if call.kept:  # if not, one layer's packed weight is freed before the next one is made
            prepared.weights[key] = packed
    return call.run(plan, packed)


def _styles(
    prepared: PreparedSynthesis, layers: list[SynthesisLayer], blocks: Sequence[SynthesisBlock], h: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the float32 styles [N, I] of the layers and of the ToRGB layers, computed in one matrix product."""
    affines = [*(layer.affine for layer in layers), *(block.torgb.affine for block in blocks)]
    widths = [affine.weight.shape[0] for affine in affines]
    if prepared.affine is None:
        gains = [1.0] * len(layers) + [block.torgb.weight_gain for block in blocks]
        scaled = list(zip(affines, gains, strict=True))
        prepared.affine = (
            torch.cat([a.weight.float() * (a.weight_gain * gain) for a, gain in scaled]),
            torch.cat([a.bias.float() * (a.bias_gain * gain) for a, gain in scaled]),
        )
    weight, bias = prepared.affine
    if h.ndim == 2:
        styles = list(F.linear(h.float(), weight, bias).split(widths, dim=1))
    else:
        # ToRGB shares the latent vector of the layer after it. The last ToRGB has its own.
        indices = [*range(len(layers)), *range(1, 2 * len(blocks), 2)]
        parts = zip(indices, weight.split(widths), bias.split(widths), strict=True)
        styles = [F.linear(h[:, index].float(), w, b) for index, w, b in parts]
    styles = [style.contiguous() for style in styles]
    return styles[: len(layers)], styles[len(layers) :]


def _demodulation(
    prepared: PreparedSynthesis, layers: list[SynthesisLayer], styles: list[Tensor], half: bool
) -> list[Tensor]:
    """Return the demodulation factors [N, O] of all layers, with one matrix product for each shape of weights."""
    if half not in prepared.squared_sums:
        groups: dict[torch.Size, list[int]] = {}
        for index, layer in enumerate(layers):
            groups.setdefault(layer.weight.shape, []).append(index)
        prepared.squared_sums[half] = [
            (indices, torch.stack([_squared_sums(layers[i], half) for i in indices])) for indices in groups.values()
        ]
    factors: dict[int, Tensor] = {}
    for indices, sums in prepared.squared_sums[half]:
        group = demodulation_of_sums(sums, torch.stack([styles[i] for i in indices]))
        factors.update(zip(indices, group.unbind(), strict=True))
    return [factors[index] for index in range(len(layers))]


def _squared_sums(layer: SynthesisLayer, half: bool) -> Tensor:
    return squared_sums(normalized_weight(layer.weight) if half else layer.weight)
