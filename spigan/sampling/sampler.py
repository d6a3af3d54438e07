"""Sampling (the paper's section 3.6): z ~ N(0, I) -> h(1) -> image, one evaluation of the generator per image."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from spigan.images import to_pil, to_uint8, to_unit_interval
from spigan.models import SPIGAN, Generator
from spigan.models.layers import frozen_state
from spigan.models.load import Model, load_model
from spigan.models.mapping import check_times
from spigan.ops import backends, philox_normal, use_backend
from spigan.ops.library import stage

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["pt", "np", "pil"]


def default_batch_size(resolution: int) -> int:
    """Images at a time that keep memory moderate: 128 up to 128 pixels, 64 at 256, 4 at 1024."""
    return max(1, min(128, 2**22 // resolution**2))


class Sampler:
    """Draws images of one model, in batches, with all that can be prepared prepared once.

    Image i depends on its own seed and the weights alone, up to rounding: not on its neighbours, the size of the batch
    or the device. Packed weights and demodulation sums are kept as long as the model's parameters are frozen
    (`model.requires_grad_(False)`, as models are that this module loads) and unchanged; on a GPU the whole of a batch,
    from seeds to pixels, is then one CUDA graph. With parameters that may be trained each batch prepares them anew.
    To be used by one thread at a time.

    Args:
        model: a SPIGAN; a folder (a saved model or a training run); a hub id; the name of a bundled model, "digits" or
            "cifar10-small"; None for the digits.
        batch_size: images evaluated at once, at all K times; default by resolution and K. Memory depends on it, not on
            the number of images.
        dtype: float32 (default), bfloat16 or float16, in which the convolutions run.
        backend: for all operations; default: what `spigan.ops.use_backend` says now.
        device: default: where a SPIGAN is, else cuda where there is one, else the CPU.
        t: time in [0, 1] on the straight path, 1 is the clean image; or a list of K times.
        output: "float", float32 in [0, 1], or "uint8".
        cuda_graph: False: no CUDA graphs, so that a profiler sees the stages.

    Raises:
        ValueError, TypeError: an argument out of range.
        FileNotFoundError: no such model.
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
        check_times(times)
        if batch_size is None:
            batch_size = max(1, default_batch_size(self.model.config.resolution) // len(times))
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.batch_size = batch_size
        self.output = output
        self._graph: _Graph | None = None
        # dopri5 asks the device for its step sizes, which a graph cannot.
        adaptive = self.model.config.mapping == "ode" and self.model.config.ode_solver == "dopri5"
        self._use_graph = cuda_graph and self.device.type == "cuda" and not adaptive

    def __call__(self, seeds: Sequence[int] | Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Images of `seeds`.

        Args:
            seeds: integers in [0, 2^63), one for each image.
            to: device of the result; default: the sampler's. "cpu" from a GPU: pinned memory.

        Returns:
            [N, C, H, W], or [K, N, C, H, W] where t is a list.
        """
        return self._collect(_seed_list(seeds), to)

    def of_noise(self, z: Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Images of z [N, *config.z_shape]; see `__call__`."""
        return self._collect(_floats("z", z), to)

    def of_latents(self, h: Tensor, *, to: torch.device | str | None = None) -> Tensor:
        """Images of latent vectors h [N, D], of whatever time each is, or [N, num_ws, D] with one for each layer.

        Returns:
            [N, C, H, W]; see `__call__`.
        """
        return self._collect(_floats("h", h), to, latents=True)

    def stream(self, seeds: Sequence[int] | Tensor, *, to: torch.device | str | None = None) -> Iterator[Tensor]:
        """The images batch by batch, for more of them than memory holds.

        Yields:
            [B, C, H, W], or [K, B, C, H, W] where t is a list.
        """
        for images in self._batches(_seed_list(seeds)):
            yield self._copy(images, self._empty(self._times() + images.shape[-4:-3], to))

    def refresh(self) -> None:
        """Prepare anew in the next call, after weights were changed in a way that leaves no trace, such as `.data`."""
        self._graph = None
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
        """The leading axis of images, where there are several times."""
        return () if isinstance(self.t, (int, float)) else (len(self.t),)

    def _empty(self, shape: tuple[int, ...], to: torch.device | str | None) -> Tensor:
        """Memory for images [*shape, C, H, W]."""
        config = self.model.config
        device = self.device if to is None else torch.device(to)
        return torch.empty(
            (*shape, config.img_channels, config.resolution, config.resolution),
            dtype=torch.uint8 if self.output == "uint8" else torch.float32,
            device=device,
            pin_memory=self.device.type == "cuda" and device.type == "cpu",
        )

    def _copy(self, images: Tensor, result: Tensor) -> Tensor:
        """`images` in `result`, which, unlike they, may be trained on."""
        result.copy_(images, non_blocking=True)
        if result.device != images.device:
            torch.cuda.current_stream(self.device).synchronize()
        return result

    def _batches(self, source: Sequence[int] | Tensor, latents: bool = False) -> Iterator[Tensor]:
        """Images of seeds, z or h, as inference tensors. With a progress bar after two seconds."""
        from tqdm.auto import tqdm

        alone = len(source) <= self.batch_size
        with tqdm(total=len(source), unit="img", delay=2.0, leave=False, dynamic_ncols=True, disable=alone) as bar:
            for start in range(0, len(source), self.batch_size):
                part = source[start : start + self.batch_size]
                if not isinstance(part, Tensor):
                    part = torch.tensor(part, dtype=torch.int64, device="cpu")
                # Entered anew for each batch: the caller's code between batches must not run under these settings.
                with torch.inference_mode(), self._autocast(), use_backend(self.backend):
                    if latents:
                        images = self._synthesise(part.to(self.device))
                    elif (graph := self._current_graph(part)) is None:
                        images = self._evaluate(part.to(self.device))
                    else:
                        images = graph.replay(part)
                yield images
                bar.update(len(part))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _evaluate(self, source: Tensor) -> Tensor:
        """Images of seeds, int64 [B], or of z."""
        z = source
        if source.dtype == torch.int64:
            with stage("noise"):
                z = philox_normal((len(source), *self.model.config.z_shape), seed=source)
        return self._convert(self.model(z, self.t, noise="const"))

    def _synthesise(self, h: Tensor) -> Tensor:
        """Images of h."""
        with stage("synthesis"):
            images = self.model.generator(h, "const")
        return self._convert(images)

    def _convert(self, images: Tensor) -> Tensor:
        with stage("convert"):
            return to_uint8(images) if self.output == "uint8" else to_unit_interval(images)

    def _current_graph(self, source: Tensor) -> _Graph | None:
        """The graph of a full batch of seeds with the weights as they are now; None where there can be none."""
        if not self._use_graph or source.dtype != torch.int64 or len(source) < self.batch_size:
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules()):
            return None  # they want to be called
        if (state := frozen_state(self.model)) is None:
            return None
        if self._graph is None or self._graph.state != state:
            self._graph = None  # its memory is free before the next one is captured
            self._graph = _Graph(self._evaluate, self.batch_size, self.device, state, self.model.generator)
        return self._graph


class _Graph:
    """A batch, from seeds to pixels, as one CUDA graph.

    Args:
        evaluate: int64 [B] on the device -> images.
        batch_size: B.
        device: a CUDA device.
        state: `frozen_state` of the model.
        generator: the generator, whose packed weights the graph reads.
    """

    def __init__(
        self,
        evaluate: Callable[[Tensor], Tensor],
        batch_size: int,
        device: torch.device,
        state: tuple[Any, ...],
        generator: Generator,
    ) -> None:
        self.state = state
        self._lock = threading.Lock()
        with torch.cuda.device(device):
            self._seeds = torch.zeros(batch_size, dtype=torch.int64, device=device)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):  # packs the weights, compiles Triton's kernels, allocates the libraries' workspaces
                    evaluate(self._seeds)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            # Without `stream` all graphs of the process are captured on one stream of one device. "thread_local": what
            # other threads allocate meanwhile, such as a loader's pinned memory, does not spoil the capture.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._images = evaluate(self._seeds)
        # The generator drops these when it is called with other weights; the graph still reads them.
        self._prepared = generator._prepared

    def replay(self, seeds: Tensor) -> Tensor:
        """Images of int64 [B] seeds."""
        with self._lock:  # `sample` shares its samplers between threads
            self._seeds.copy_(seeds, non_blocking=True)
            self._graph.replay()
            return self._images.clone()


class _Samplers(OrderedDict[tuple[Any, ...], Sampler]):
    """The samplers that `sample` keeps with a model, by their options; a copy of the model begins without."""

    def __deepcopy__(self, memo: Any) -> _Samplers:
        return _Samplers()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Samplers, ()


_samplers_lock = threading.Lock()
_MAX_SAMPLERS = 8  # each may hold a CUDA graph and its memory


def _kept_sampler(model: SPIGAN, **options: Any) -> Sampler:
    """A sampler of `model` with `options`, which is kept with the model: the two are collected together."""
    key = (*options.values(), backends.requested(options["backend"])[0], next(model.parameters()).device)
    with _samplers_lock:
        samplers: _Samplers = model.__dict__.setdefault("_samplers", _Samplers())
        if (sampler := samplers.get(key)) is None:
            sampler = samplers[key] = Sampler(model, **options)
            if len(samplers) > _MAX_SAMPLERS:
                samplers.popitem(last=False)
        samplers.move_to_end(key)
    return sampler


def _seed_list(seeds: Sequence[int] | Tensor) -> list[int]:
    if isinstance(seeds, (int, np.integer)):
        raise TypeError(f"seeds must be integers, one for each image, got {seeds}: range({seeds}) for so many images")
    return resolve_seeds(None, seeds)


def _floats(name: str, value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():  # integers would be taken for seeds
        given = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a tensor of floats, got {given}")
    return value


def resolve_seeds(n: int | None, seed: int | Sequence[int] | Tensor) -> list[int]:
    """n seeds: s, s + 1, ... of an int s; a list is taken as it is.

    Raises:
        ValueError: n contradicts the length of a list, or a seed is out of range.
        TypeError: a seed is not an integer.
    """
    if isinstance(seed, (int, np.integer)):
        n = 16 if n is None else n
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        seeds = list(range(int(seed), int(seed) + n))
    else:
        if isinstance(seed, Tensor) and seed.ndim == 1:
            seed = seed.tolist()  # from a GPU at once
        seeds = [operator.index(s) for s in seed]
        if n is not None and n != len(seeds):
            raise ValueError(f"n is {n}, but {len(seeds)} seeds were given: leave out n")
    if bad := [s for s in seeds if not 0 <= s < 2**63]:
        raise ValueError(f"seeds must be in [0, 2**63), got {bad[0]}")
    return seeds


def sample(
    n: int | None = None,
    *,
    model: Model = None,
    seed: int | Sequence[int] = 0,
    z: Tensor | None = None,
    t: float | Sequence[float] = 1.0,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    output_type: OutputType = "pt",
    backend: str | None = None,
) -> Tensor | np.ndarray | list[Image] | list[list[Image]]:
    """Draw images.

    Image i depends on its own seed and the weights alone: not on n, batch_size, its neighbours or the device (up to
    rounding).

    Args:
        n: number of images; default 16, or as many as there are seeds or z.
        model: a SPIGAN; a folder (a saved model or a training run); a hub id; the name of a bundled model, "digits" or
            "cifar10-small"; None for the digits.
        seed: an int s, image i uses s + i; or a list of ints, one for each image.
        z: [N, *model.config.z_shape] noise to use instead of drawing it from seeds.
        t: time in [0, 1] on the straight path, 1 is the clean image; or a list of K times.
        batch_size: images evaluated at once; default by resolution.
        device: default: where a SPIGAN is, else cuda where there is one, else the CPU.
        dtype: float32 (default), bfloat16 or float16, in which the convolutions run.
        output_type: "pt" float32 tensor [N, C, H, W] in [0, 1]; "np" float32 array [N, H, W, C] in [0, 1]; "pil" list
            of N Pillow images. A list t adds a leading axis (or list) of K.
        backend: for all operations; default: see `spigan.ops.use_backend`.

    Returns:
        The images, as `output_type` says.

    Raises:
        ValueError, TypeError: an argument out of range.
        BackendUnavailable: a backend asked for by name cannot run.
    """
    if output_type not in ("pt", "np", "pil"):
        raise ValueError(f'output_type must be "pt", "np" or "pil", got {output_type!r}')
    if z is not None and not isinstance(z, Tensor):
        raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
    network = load_model(model, device)
    if z is not None and n is not None and n != len(z):
        raise ValueError(f"n is {n}, but z holds {len(z)}: leave out n")
    if z is not None and not isinstance(seed, int):
        raise ValueError("z was given, so the seeds would not be used: leave out one of them")
    source: Sequence[int] | Tensor = _floats("z", z) if z is not None else resolve_seeds(n, seed)
    if batch_size is None:  # no larger than needed: a batch that is not full has no CUDA graph
        times = 1 if isinstance(t, (int, float)) else max(1, len(t))
        batch_size = min(max(1, len(source)), max(1, default_batch_size(network.config.resolution) // times))
    sampler = _kept_sampler(
        network,
        batch_size=batch_size,
        dtype=dtype,
        backend=backend,
        t=t if isinstance(t, (int, float)) else tuple(t),
        output="uint8" if output_type == "pil" else "float",
    )
    images = sampler._collect(source, None)
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.movedim(-3, -1).cpu().numpy()
    return to_pil(images) if images.ndim == 4 else [to_pil(row) for row in images]


@contextlib.contextmanager
def count_evaluations(model: SPIGAN) -> Iterator[list[int]]:
    """Count, image by image, the generator's evaluations inside the block: NFE is the count over the number of images.

    Yields:
        One-element list that holds the count so far.
    """
    count = [0]

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count[0] += output.shape[0]

    handle = model.generator.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()
