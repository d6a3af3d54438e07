"""Generator: latent vector h -> image. StyleGAN2's synthesis network, skip architecture (Karras et al. 2020b, Fig. 7),
with StyleGAN2-ADA's parameter names and layout; the time t is never an input (the paper's section 3.4.1)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from spigan.models.layers import LRELU_GAIN, Linear, channels_at, check_resolution, compute_dtype, frozen_state
from spigan.ops import backends, fir_bias_act, modulated_conv2d
from spigan.ops.demodulation import demodulation_of_sums, normalized_style, normalized_weight, squared_sums
from spigan.ops.fir_bias_act import upsample2d
from spigan.ops.frozen_layer import frozen_modulated_conv2d
from spigan.ops.layer_end import LayerEnd, wide
from spigan.ops.layer_weights import LayerWeight, prepare_weight, weight_form
from spigan.ops.library import why_transformed
from spigan.ops.limits import MAX_RGB_CHANNELS
from spigan.ops.noise import draw_noise
from spigan.ops.upfirdn2d import fir_filter

<<<<<<< HEAD
=======
MAX_RGB_CHANNELS = 4  # kMaxRgbChannels of csrc/operations.h
>>>>>>> wip/csrc2
NOISE_MODES = ("random", "const", "none")


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU.

    Args:
        in_channels: I.
        out_channels: O.
        dim_h: D.
        resolution: size of the output.
        up: 1 or 2.
        clamp: bound of the output's absolute value, or None.
    """

    resample_filter: Tensor
    noise_const: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, *, dim_h: int, resolution: int, up: int, clamp: float | None
    ) -> None:
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = Linear(dim_h, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.register_buffer("resample_filter", fir_filter(), persistent=False)

    def forward(self, x: Tensor, h: Tensor, noise: str, source: Tensor | None) -> Tensor:
        """x [N, I, H, W], h [N, D] -> [N, O, up H, up W]. source: int64 [] seed of "random" noise, or "given" noise."""
        return modulated_conv2d(
            x,
            self.weight,
            self.affine(h),
            up=self.up,
            resample_filter=self.resample_filter,
            noise=self.noise_const[None, None] if noise == "const" else source if noise == "given" else None,
            noise_strength=None if noise == "none" else self.noise_strength,
            noise_seed=source if noise == "random" else None,
            bias=self.bias,
            activation="lrelu",
            gain=LRELU_GAIN,
            clamp=self.clamp,
        )


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to the image's channels, without demodulation.

    Args:
        in_channels: I.
        img_channels: C.
        dim_h: D.
        clamp: bound of the output's absolute value, or None.
    """

    def __init__(self, in_channels: int, img_channels: int, *, dim_h: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(dim_h, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(img_channels, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(img_channels))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x [N, I, H, W], h [N, D] -> [N, C, H, W]."""
        style = self.affine(h) * self.weight_gain
        return modulated_conv2d(x, self.weight, style, demodulate=False, bias=self.bias, clamp=self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two layers (one at 4x4, which starts from a learned constant), ToRGB added to the image so far.

    Args:
        in_channels: I; 0 for the first block.
        out_channels: O.
        img_channels: C.
        dim_h: D.
        resolution: size of the output.
        clamp: bound of the layers' absolute values, or None.
    """

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        img_channels: int,
        *,
        dim_h: int,
        resolution: int,
        clamp: float | None,
    ) -> None:
        super().__init__()
        self.is_first = in_channels == 0
        layer = {"dim_h": dim_h, "resolution": resolution, "clamp": clamp}
        if self.is_first:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, up=2, **layer)  # type: ignore[arg-type]
        self.conv1 = SynthesisLayer(out_channels, out_channels, up=1, **layer)  # type: ignore[arg-type]
        self.torgb = ToRGB(out_channels, img_channels, dim_h=dim_h, clamp=clamp)
        self.register_buffer("resample_filter", fir_filter(), persistent=False)

    def forward(
        self,
        x: Tensor | None,
        img: Tensor | None,
        h: Iterator[Tensor],
        h_rgb: Tensor,
        noise: str,
        sources: Iterator[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """x [N, I, H/2, W/2] and img [N, C, H/2, W/2], None in the first block -> (x [N, O, H, W], img [N, C, H, W]).

        h yields the [N, D] latent of each layer, sources what its noise comes from; h_rgb [N, D] is ToRGB's.
        """
        if x is None:
            x = self.const.to(dtype).expand(h_rgb.shape[0], -1, -1, -1)
        else:
            x = self.conv0(x, next(h), noise, next(sources))
        x = self.conv1(x, next(h), noise, next(sources))
        rgb = self.torgb(x, h_rgb).to(h_rgb.dtype)
        return x, rgb if img is None else upsample2d(img, self.resample_filter, add=rgb)


@dataclass
class _Prepared:
    """What a generator's layers need without gradients, computed once for the values that its parameters have.

    Attributes:
        state: `frozen_state` of the generator that it belongs to.
        weights: of the convolutions, by (layer, form, dtype).
        constants: by name.
    """

    state: tuple[Any, ...] = ()
    weights: dict[tuple[int, str, torch.dtype], LayerWeight] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> _Prepared:
        return _Prepared()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Prepared, ()


class Generator(nn.Module):
    """StyleGAN2 synthesis network.

    Args:
        resolution: H = W of the image, a power of two from 8 to 1024.
        img_channels: C.
        dim_h: D, length of the latent vector.
        channel_base: width at resolution r is min(channel_base / r, channel_max).
        channel_max: largest width.
        conv_clamp: bound of each layer's absolute values (StyleGAN2-ADA uses 256 with float16); None for no bound.

    Attributes:
        num_ws: number of layers that take a latent of their own: 2 log2(resolution) - 2.
    """

    def __init__(
        self,
        resolution: int,
        img_channels: int = 3,
        *,
        dim_h: int = 512,
        channel_base: int = 32768,
        channel_max: int = 512,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.img_channels, self.dim_h = check_resolution(resolution), img_channels, dim_h
        self.block_resolutions = [2**i for i in range(2, resolution.bit_length())]
        self.num_ws = 2 * len(self.block_resolutions)
        in_channels = 0
        for res in self.block_resolutions:
            out_channels = channels_at(res, channel_base, channel_max)
            block = SynthesisBlock(
                in_channels, out_channels, img_channels, dim_h=dim_h, resolution=res, clamp=conv_clamp
            )
            self.add_module(f"b{res}", block)
            in_channels = out_channels
        self._prepared = _Prepared()

    def draw_noise(self, n: int, device: torch.device | str | None = None) -> list[Tensor]:
        """Random noise of n images: float32 [n, 1, H, W] for each layer, the numbers that `forward` would draw now."""
        seeds = zip(self._seeds(device), self._layer_sizes(), strict=True)
        return [draw_noise(seed.reshape(1), n, (size, size)) for seed, size in seeds]

    def _layer_sizes(self) -> list[int]:
        return [self.block_resolutions[(index + 1) // 2] for index in range(self.num_ws - 1)]

    def _seeds(self, device: torch.device | str | None) -> Tensor:
        # From 2**32 on: no stream of `sample`'s small seeds, nor of the trainer's.
        return torch.randint(2**33, 2**63 - 1, (self.num_ws - 1,), device=device)

    def forward(self, h: Tensor, noise: str | list[Tensor] | None = None) -> Tensor:
        """Image of a latent vector.

        Under `torch.autocast` the convolutions run in its dtype; the image is accumulated in the dtype of h.

        Args:
            h: [N, D], or [N, num_ws, D] with one latent for each layer (ToRGB shares that of the next layer).
            noise: per-pixel noise, "random" (drawn anew), "const" (the stored one: the same image every time) or
                "none"; or the noise itself, [N or 1, 1, H, W] for each layer, as of `draw_noise`; default: "random" in
                training mode, "const" in eval mode.

        Returns:
            [N, C, H, W], about [-1, 1].
        """
        sources: list[Tensor | None] = [None] * (self.num_ws - 1)
        if isinstance(noise, list):
            shapes, sides = [tuple(x.shape) for x in noise], self._layer_sizes()
            if len(shapes) != len(sides) or any(
                shape not in ((h.shape[0], 1, side, side), (1, 1, side, side))
                for shape, side in zip(shapes, sides, strict=True)
            ):
                raise ValueError(f"noise must be [N or 1, 1, H, W] for layers of the sizes {sides}, got {shapes}")
            noise, sources = "given", [*noise]
        else:
            noise = ("random" if self.training else "const") if noise is None else noise
            if noise not in NOISE_MODES:
                raise ValueError(f"noise must be one of {', '.join(NOISE_MODES)}, got {noise!r}")
        if h.ndim not in (2, 3) or h.shape[-1] != self.dim_h or (h.ndim == 3 and h.shape[1] != self.num_ws):
            raise ValueError(
                f"h must have shape [N, {self.dim_h}] or [N, {self.num_ws}, {self.dim_h}], got {list(h.shape)}"
            )
        dtype = compute_dtype(h)
        with torch.autocast(h.device.type, enabled=False):
            if noise == "random":
                sources = [*self._seeds(h.device)]
            # Compilers first: they would guard on the state, and compile anew whenever a parameter has changed.
            if not torch.compiler.is_compiling() and self._prepared.state and self._current() is None:
                self._prepared = _Prepared()
            if (backend := self._kernels(h, dtype)) is not None:
                return self._infer(h, noise, sources, dtype, backend)
            layers = [h] * self.num_ws if h.ndim == 2 else list(h.unbind(1))
            x: Tensor | None = None
            img: Tensor | None = None
            index, source = 0, iter(sources)
            for res in self.block_resolutions:
                count = 1 if res == 4 else 2
                convs, rgb = layers[index : index + count], layers[index + count]
                x, img = getattr(self, f"b{res}")(x, img, iter(convs), rgb, noise, source, dtype)
                index += count
        assert img is not None
        return img

    # ---- Without gradients: every layer's last pass scales its result by the next layer's style ----

    def _kernels(self, h: Tensor, dtype: torch.dtype) -> str | None:
        """Backend that runs `_infer`; None: the layers run one by one as they are."""
        if torch.compiler.is_compiling() or h.shape[0] == 0 or torch.float64 in (h.dtype, dtype):
            return None
        if self.img_channels > MAX_RGB_CHANNELS:
            return None
        tensors = [h, *self.parameters(), *self.buffers()]
        if why_transformed(*tensors) is not None or any(isinstance(t, FakeTensor) for t in tensors):
            return None
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules() if module is not self):
            return None  # they want to see the layers
        backend = backends.choose("modulated_conv2d", None, h.device)
        return backend if backend in backends.KERNELS else None

    def forget(self) -> None:
        """Drop what is kept for frozen parameters, after they were changed in a way that leaves no trace (`.data`)."""
        self._prepared = _Prepared()

    def _current(self) -> _Prepared | None:
        """`self._prepared`, emptied if a tensor has changed since; None: nothing may be kept until the next call."""
        state = None if self.training else frozen_state(self)
        if state is None:
            return None
        if state != self._prepared.state:
            self._prepared = _Prepared(state)
        return self._prepared

    def _infer(self, h: Tensor, noise: str, sources: list[Tensor | None], dtype: torch.dtype, backend: str) -> Tensor:
        kept = self._current()
        prepared = _Prepared() if kept is None else kept
        blocks: list[SynthesisBlock] = [getattr(self, f"b{res}") for res in self.block_resolutions]
        convs: list[SynthesisLayer] = [
            layer for block in blocks for layer in ([] if block.is_first else [block.conv0]) + [block.conv1]
        ]
        styles, rgb_styles = self._styles(prepared, convs, blocks, h)
        half = dtype == torch.float16
        if half:
            styles = [normalized_style(style) for style in styles]
        factors = self._factors(prepared, convs, styles, half)

        start = prepared.constants.get("start")
        if start is None:
            start = prepared.constants["start"] = blocks[0].const.float().permute(1, 2, 0).contiguous()
        x: Tensor | None = (start * styles[0][:, None, None]).to(dtype)
        img: Tensor | None = None
        for index, layer in enumerate(convs):
            block = blocks[(index + 1) // 2]
            ends_block = layer is block.conv1
            last = index == len(convs) - 1
            rgb_weight = None
            if ends_block:  # [N, C, O]
                rgb_weight = block.torgb.weight[:, :, 0, 0].float() * rgb_styles[(index + 1) // 2][:, None]
            assert x is not None
            shape, size = layer.weight.shape, layer.noise_const.shape[0]
            form = weight_form(
                backend, shape, (size, size), dtype, x.shape[0], layer.up, 1, layer.resample_filter, kept is not None
            )
            key = (index, form, dtype)
            if (weight := prepared.weights.get(key)) is None:
                weight = prepare_weight(normalized_weight(layer.weight) if half else layer.weight, form, dtype, backend)
                if kept is not None:
                    kept.weights[key] = weight
            source = sources[index]
            given = layer.noise_const[None, None] if noise == "const" else source if noise == "given" else None
            end = LayerEnd(
                factor=wide(factors[index], dtype),
                noise=wide(given, dtype),
                seed=source.reshape(1) if source is not None and noise == "random" else None,
                strength=None if noise == "none" else wide(layer.noise_strength, dtype),
                bias=wide(layer.bias, dtype),
                activation="lrelu",
                gain=LRELU_GAIN,
                clamp=layer.clamp,
                next_factor=None if last else styles[index + 1],
                rgb_weight=rgb_weight,
            )
            x, rgb = frozen_modulated_conv2d(
                backend,
                x,
                weight,
                end,
                style=None,
                up=layer.up,
                padding=1,
                filter=layer.resample_filter.float(),  # the module's dtype may be another
                keep=not last,
            )
            if rgb is not None:
                below = None if img is None else upsample2d(img, block.resample_filter)
                img = fir_bias_act(rgb.permute(0, 3, 1, 2), bias=block.torgb.bias, clamp=block.torgb.clamp, add=below)
        assert img is not None
        return img.to(h.dtype).contiguous()

    def _styles(
        self, prepared: _Prepared, convs: list[SynthesisLayer], blocks: list[SynthesisBlock], h: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Styles [N, I] of the convolutions and of the ToRGB layers, float32, from one matrix product."""
        affines = [*(layer.affine for layer in convs), *(block.torgb.affine for block in blocks)]
        widths = [affine.weight.shape[0] for affine in affines]
        if "affine" not in prepared.constants:
            gains = [1.0] * len(convs) + [block.torgb.weight_gain for block in blocks]
            scaled = list(zip(affines, gains, strict=True))
            prepared.constants["affine"] = (
                torch.cat([a.weight.float() * (a.weight_gain * gain) for a, gain in scaled]),
                torch.cat([a.bias.float() * (a.bias_gain * gain) for a, gain in scaled]),
            )
        weight, bias = prepared.constants["affine"]
        if h.ndim == 2:
            styles = list(F.linear(h.float(), weight, bias).split(widths, dim=1))
        else:
            # ToRGB of a block shares the latent of the layer that follows it, the last one has one of its own.
            indices = [*range(len(convs)), *range(1, 2 * len(blocks), 2)]
            parts = zip(indices, weight.split(widths), bias.split(widths), strict=True)
            styles = [F.linear(h[:, index].float(), w, b) for index, w, b in parts]
        styles = [style.contiguous() for style in styles]
        return styles[: len(convs)], styles[len(convs) :]

    def _factors(
        self, prepared: _Prepared, convs: list[SynthesisLayer], styles: list[Tensor], half: bool
    ) -> list[Tensor]:
        """Demodulation factors [N, O] of all layers: a matrix product for each shape of weights."""
        name = f"squared sums, {'normalized' if half else 'as they are'}"
        if name not in prepared.constants:
            groups: dict[torch.Size, list[int]] = {}
            for index, layer in enumerate(convs):
                groups.setdefault(layer.weight.shape, []).append(index)
            prepared.constants[name] = [
                (
                    indices,
                    torch.stack(
                        [squared_sums(normalized_weight(convs[i].weight) if half else convs[i].weight) for i in indices]
                    ),
                )
                for indices in groups.values()
            ]
        factors: dict[int, Tensor] = {}
        for indices, sums in prepared.constants[name]:
            group = demodulation_of_sums(sums, torch.stack([styles[i] for i in indices]))
            factors.update(zip(indices, group.unbind(), strict=True))
        return [factors[index] for index in range(len(convs))]
