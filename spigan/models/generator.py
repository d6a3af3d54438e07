"""Generator: latent vector h -> image.

This is StyleGAN2's synthesis network with the skip architecture (Karras et al. 2020b, Fig. 7). The time t is not an
input (section 3.4.1 of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spigan.models.frozen_synthesis import PreparedSynthesis, frozen_state, inference_backend, synthesize
from spigan.models.layers import channels_at, check_resolution, network_dtype
from spigan.models.synthesis import SynthesisBlock
from spigan.ops.noise import draw_noise

NOISE_MODES = ("random", "const", "none")


class Generator(nn.Module):
    """StyleGAN2 synthesis network.

    Args:
        resolution: H = W of the image, a power of two from 8 to 1024.
        img_channels: C, number of image channels.
        dim_h: D, length of the latent vector.
        channel_base: the width at resolution r is min(channel_base / r, channel_max).
        channel_max: largest width.
        conv_clamp: bound on the absolute values of each layer (StyleGAN2-ADA uses 256 with float16). None for no bound.

    Attributes:
        num_ws: number of layers that can have their own latent vector: 2 log2(resolution) - 2.
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
        self._prepared = PreparedSynthesis()

    @property
    def blocks(self) -> list[SynthesisBlock]:
        """The blocks `b4`, `b8`, ..., in the order in which they run."""
        return [getattr(self, f"b{res}") for res in self.block_resolutions]

    def draw_noise(self, n: int, device: torch.device | str | None = None) -> list[Tensor]:
        """Draw the random noise of n images: the same numbers that a call of `forward` would draw now.

        Returns:
            float32 [n, 1, H, W] for each layer.
        """
        seeds = zip(self._seeds(device), self.layer_sizes(), strict=True)
        return [draw_noise(seed.reshape(1), n, (size, size)) for seed, size in seeds]

    def layer_sizes(self) -> list[int]:
        """Return the side, in pixels, of each layer's noise."""
        return [self.block_resolutions[(index + 1) // 2] for index in range(self.num_ws - 1)]

    def _seeds(self, device: torch.device | str | None) -> Tensor:
        # From 2**33, so that these streams differ from those of `sample` (with small seeds) and of the trainer.
        return torch.randint(2**33, 2**63 - 1, (self.num_ws - 1,), device=device)

    def forward(self, h: Tensor, noise: str | list[Tensor] | None = None) -> Tensor:
        """Make the images of latent vectors.

        Under `torch.autocast`, the convolutions run in autocast's dtype. The image is accumulated in the dtype of h.

        Args:
            h: [N, D], or [N, num_ws, D] with one latent vector for each layer (ToRGB uses that of the next layer).
            noise: per-pixel noise: "random" (drawn in each call), "const" (stored noise, which gives the same image
                every time) or "none"; or the noise itself, [N or 1, 1, H, W] for each layer, as returned by
                `draw_noise`. Default: "random" in training mode, "const" in eval mode.

        Returns:
            [N, C, H, W] images, in about [-1, 1].

        Raises:
            ValueError: if h or the noise has the wrong shape, or the noise mode is unknown.
        """
        mode, sources = self._noise_sources(noise, h)
        if h.ndim not in (2, 3) or h.shape[-1] != self.dim_h or (h.ndim == 3 and h.shape[1] != self.num_ws):
            raise ValueError(
                f"h must have shape [N, {self.dim_h}] or [N, {self.num_ws}, {self.dim_h}], got {list(h.shape)}"
            )
        dtype = network_dtype(h)
        with torch.autocast(h.device.type, enabled=False):
            if mode == "random":
                sources = [*self._seeds(h.device)]
            if (backend := inference_backend(self, h, dtype, self.img_channels)) is not None:
                kept = self._refresh()
                prepared = self._prepared if kept else PreparedSynthesis()
                return synthesize(self.blocks, h, mode, sources, dtype, backend, prepared, kept)
            # Not while compiling: the compiler would guard on the state, and recompile when a parameter changes.
            if not torch.compiler.is_compiling() and self._prepared.state:
                self._refresh()
            return self._run_blocks(h, mode, sources, dtype)

    def _noise_sources(self, noise: str | list[Tensor] | None, h: Tensor) -> tuple[str, list[Tensor | None]]:
        """Return the noise mode and the source of each layer's noise; see `SynthesisLayer.noise_inputs`."""
        if isinstance(noise, list):
            shapes, sides = [tuple(x.shape) for x in noise], self.layer_sizes()
            if len(shapes) != len(sides) or any(
                shape not in ((h.shape[0], 1, side, side), (1, 1, side, side))
                for shape, side in zip(shapes, sides, strict=True)
            ):
                raise ValueError(f"noise must be [N or 1, 1, H, W] for layers of the sizes {sides}, got {shapes}")
            return "given", [*noise]
        mode = ("random" if self.training else "const") if noise is None else noise
        if mode not in NOISE_MODES:
            raise ValueError(f"noise must be one of {', '.join(NOISE_MODES)}, got {mode!r}")
        return mode, [None] * (self.num_ws - 1)

    def _run_blocks(self, h: Tensor, mode: str, sources: list[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Run the network as it is defined: block by block, and differentiable."""
        latents = [h] * self.num_ws if h.ndim == 2 else list(h.unbind(1))
        x: Tensor | None = None
        img: Tensor | None = None
        start = 0
        for block in self.blocks:
            stop = start + len(block.layers)
            # ToRGB shares the latent vector of the next block's first layer. The last ToRGB has its own.
            x, img = block(x, img, latents[start : stop + 1], mode, sources[start:stop], dtype)
            start = stop
        assert img is not None
        return img

    @property
    def prepared(self) -> PreparedSynthesis:
        """What inference has precomputed from the current parameters.

        The generator drops it when a parameter changes. Hold a reference as long as a CUDA graph reads it.
        """
        return self._prepared

    def forget(self) -> None:
        """Drop `prepared`. Call this after changing frozen parameters in a way that cannot be detected (`.data`)."""
        self._prepared = PreparedSynthesis()

    def _refresh(self) -> bool:
        """Free `prepared` if it is outdated. Return whether every later change of a tensor can be detected."""
        state = None if self.training else frozen_state(self)
        if state is None or state != self._prepared.state:
            self._prepared = PreparedSynthesis(state or ())
        return state is not None
