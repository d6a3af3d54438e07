"""`Sampler` (section 3.6 of the paper): z ~ N(0, I) -> h(1) -> image, with one generator evaluation per image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from spigan.images import to_uint8, to_unit_interval
from spigan.models.grid import default_batch_size
from spigan.models.load import Model, load_model
from spigan.models.mapping import check_unit_times
from spigan.ops import backends, philox_normal, use_backend
from spigan.ops.library import stage
from spigan.sampling.cuda_graph import GraphedBatches, supports_cuda_graph
from spigan.sampling.seeds import resolve_seeds


class Sampler:
    """Draws images from one model in batches, and prepares everything only once.

    Up to rounding, image i depends only on its own seed and the weights. It does not depend on its neighbours, the
    batch size or the device. As long as the model's parameters are frozen (`model.requires_grad_(False)`, as in the
    models that spigan loads) and unchanged, packed weights and demodulation sums are kept. On a GPU, a whole batch,
    from seeds to pixels, is then one CUDA graph from the second batch of its size on. If the parameters require
    gradients, they are prepared again for each batch.

    Use a sampler from one thread at a time.

    Args:
        model: a SPIGAN; a folder (a saved model or a training run); a hub id; the name of a bundled model, "digits" or
            "cifar10-small"; or None for the digits.
        batch_size: number of images to evaluate at once, at all K times. The default depends on the resolution and K.
            The memory needed depends on the batch size, not on the number of images.
        dtype: dtype of the convolutions: float32 (default), bfloat16 or float16.
        backend: backend of all operations. Default: the backend currently in effect; see `spigan.ops.use_backend`.
        device: device of the model. Default: the SPIGAN's own device, or cuda if available, else the CPU.
        t: time in [0, 1] on the straight path (1 is the clean image), or a list of K times.
        output: "float" for float32 in [0, 1], or "uint8".
        cuda_graph: whether to use CUDA graphs. The graphs of all samplers keep at most a quarter of the GPU's memory.
            Set this to False if a profiler is to see the stages.

    Attributes:
        model: the SPIGAN.
        device: its device.
        dtype: dtype of the convolutions.
        backend: the backend of all operations, or "auto".
        t: the time, or a list of K times.
        batch_size: number of images evaluated at once.
        output: "float" or "uint8".

    Raises:
        ValueError, TypeError: if an argument is out of range or has the wrong type.
        FileNotFoundError: if there is no such model.
    """

    def __init__(
        self,
        model: Model = None,
        *,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        t: float | Sequence[float] = 1.0,
        output: Literal["float", "uint8"] = "float",
        cuda_graph: bool = True,
    ) -> None:
        if output not in ("float", "uint8"):
            raise ValueError(f'output must be "float" or "uint8", got {output!r}')
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
        self.model = load_model(model, device)
        self.device = next(self.model.parameters()).device
        self.dtype = dtype or torch.float32
        self.backend = backends.requested(backend)[0]
        self.t = t if isinstance(t, (int, float)) else [float(time) for time in t]
        times = [self.t] if isinstance(self.t, (int, float)) else self.t
        check_unit_times(times)
        if batch_size is None:
            batch_size = max(1, default_batch_size(self.model.config.resolution) // len(times))
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self._batch_size = batch_size
        self.output = output
        self._graphed: GraphedBatches | None = None
        if cuda_graph and supports_cuda_graph(self.model):
            self._graphed = GraphedBatches(self.model)

    @property
    def batch_size(self) -> int:
        """Number of images to evaluate at once."""
        return self._batch_size

    def __call__(self, seeds: Sequence[int] | Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Draw the images of `seeds`.

        Args:
            seeds: integers in [0, 2^63), one for each image.
            to: device of the result. Default: the sampler's device. With "cpu", images from a GPU are in pinned memory.

        Returns:
            [N, C, H, W], or [K, N, C, H, W] if t is a list.

        Raises:
            ValueError, TypeError: if a seed is out of range or not an integer.
        """
        return self._collect(_check_seeds(seeds), to)

    def of_noise(self, z: Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Make the images of z [N, *config.z_shape]; see `__call__`.

        Raises:
            ValueError: if z has the wrong shape.
            TypeError: if z is not a tensor of floats.
        """
        return self._collect(_check_floats("z", z), to)

    def of_latents(self, h: Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Make the generator's images of latent vectors, of any time. On the analytic path, they are without noise.

        Args:
            h: [N, D], or [N, num_ws, D] with one latent vector for each layer of the generator.
            to: device of the result; see `__call__`.

        Returns:
            [N, C, H, W].

        Raises:
            ValueError: if h has the wrong shape.
            TypeError: if h is not a tensor of floats.
        """
        return self._collect(_check_floats("h", h), to, latents=True)

    def stream(self, seeds: Sequence[int] | Tensor, *, to: torch.device | str | None = None) -> Iterator[Tensor]:
        """Draw the images batch by batch, so that they need not all fit into memory.

        Yields:
            [B, C, H, W], or [K, B, C, H, W] if t is a list.
        """
        for images in self._batches(_check_seeds(seeds)):
            yield self._copy(images, self._empty(self._times() + images.shape[-4:-3], to))

    def refresh(self) -> None:
        """Prepare the weights again in the next call.

        Call this after changing the weights in a way that cannot be detected (`.data`).
        """
        if self._graphed is not None:
            self._graphed.forget()
        self.model.generator.forget()

    def _collect(self, source: Sequence[int] | Tensor, to: torch.device | str | None, latents: bool = False) -> Tensor:
        shape = (len(source),) if latents else (*self._times(), len(source))
        result, start = self._empty(shape, to), 0
        for images in self._batches(source, latents):
            stop = start + images.shape[-4]
            self._copy(images, result[..., start:stop, :, :, :])
            start = stop
        return result

    def _times(self) -> tuple[int, ...]:
        """Return the leading axis of the images, which exists only if there are several times."""
        return () if isinstance(self.t, (int, float)) else (len(self.t),)

    def _empty(self, shape: tuple[int, ...], to: torch.device | str | None) -> Tensor:
        """Allocate memory for images [*shape, C, H, W]."""
        config = self.model.config
        device = self.device if to is None else torch.device(to)
        return torch.empty(
            (*shape, config.img_channels, config.resolution, config.resolution),
            dtype=torch.uint8 if self.output == "uint8" else torch.float32,
            device=device,
            pin_memory=self.device.type == "cuda" and device.type == "cpu",
        )

    def _copy(self, images: Tensor, result: Tensor) -> Tensor:
        """Copy `images` into `result`. Unlike an inference tensor, the result can be used in training."""
        result.copy_(images, non_blocking=True)
        if result.device != images.device:
            torch.cuda.current_stream(self.device).synchronize()
        return result

    def _batches(self, source: Sequence[int] | Tensor, latents: bool = False) -> Iterator[Tensor]:
        """Yield the images of seeds, z or h, as inference tensors. A progress bar appears after two seconds."""
        from tqdm.auto import tqdm

        single = len(source) <= self.batch_size
        with tqdm(total=len(source), unit="img", delay=2.0, leave=False, dynamic_ncols=True, disable=single) as bar:
            for start in range(0, len(source), self.batch_size):
                part = source[start : start + self.batch_size]
                if not isinstance(part, Tensor):
                    part = torch.tensor(part, dtype=torch.int64, device="cpu")
                # Entered for each batch, because the caller's code between batches must not run with these settings.
                with torch.inference_mode(), self._autocast(), use_backend(self.backend):
                    images = self._synthesize(part.to(self.device)) if latents else self._images_of(part)
                yield images
                bar.update(len(part))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _images_of(self, source: Tensor) -> Tensor:
        """Return the images of int64 [B] seeds, or of z. Use a CUDA graph if possible."""
        if self._graphed is not None and source.dtype == torch.int64:
            images = self._graphed.replay(source, self._evaluate)
            if images is not None:
                return images
        return self._evaluate(source.to(self.device))

    def _evaluate(self, source: Tensor) -> Tensor:
        """Return the images of int64 [B] seeds, or of z."""
        z = source
        if source.dtype == torch.int64:
            with stage("noise"):
                z = philox_normal((len(source), *self.model.config.z_shape), seed=source)
        return self._convert(self.model(z, self.t, noise="const"))

    def _synthesize(self, h: Tensor) -> Tensor:
        """Return the images of h."""
        with stage("synthesis"):
            images = self.model.generator(h, "const")
        return self._convert(images)

    def _convert(self, images: Tensor) -> Tensor:
        with stage("convert"):
            return to_uint8(images) if self.output == "uint8" else to_unit_interval(images)


def _check_seeds(seeds: Sequence[int] | Tensor) -> list[int]:
    if isinstance(seeds, (int, np.integer)):
        raise TypeError(
            f"seeds must be integers, one for each image, got {seeds}: use range({seeds}) for that many images"
        )
    return resolve_seeds(None, seeds)


def _check_floats(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():  # integers would be treated as seeds
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floats, got {given}")
    return value
