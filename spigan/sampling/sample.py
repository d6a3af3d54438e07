"""`sample`, which draws a few images in one call. The samplers that it uses are kept with their model."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from spigan.images import to_pil
from spigan.models import SPIGAN
from spigan.models.load import Model, load_model
from spigan.models.uncopied import Uncopied
from spigan.ops import backends
from spigan.sampling.sampler import Sampler
from spigan.sampling.seeds import resolve_seeds

if TYPE_CHECKING:
    from PIL.Image import Image

OutputType = Literal["pt", "np", "pil"]

MAX_SAMPLERS = 8  # samplers kept for each model; see spigan/sampling/cuda_graph.py for the memory of their graphs


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

    Up to rounding, image i depends only on its own seed and the weights. It does not depend on n, batch_size, its
    neighbours or the device.

    Args:
        n: number of images. Default: 16, or the number of seeds or of noise images in z.
        model: a SPIGAN; a folder (a saved model or a training run); a hub id; the name of a bundled model, "digits" or
            "cifar10-small"; or None for the digits.
        seed: an int s, so that image i uses the seed s + i; or a list of ints, one for each image.
        z: [N, *model.config.z_shape] noise to use instead of drawing it from seeds.
        t: time in [0, 1] on the straight path (1 is the clean image), or a list of K times.
        batch_size: number of images to evaluate at once. The default depends on the resolution.
        device: device of the model. Default: the SPIGAN's own device, or cuda if available, else the CPU.
        dtype: dtype of the convolutions: float32 (default), bfloat16 or float16.
        output_type: "pt" for a float32 tensor [N, C, H, W] in [0, 1], "np" for a float32 array [N, H, W, C] in [0, 1],
            or "pil" for a list of N Pillow images. If t is a list, there is a leading axis (or list) of length K.
        backend: backend of all operations. Default: see `spigan.ops.use_backend`.

    Returns:
        The images, in the form given by `output_type`.

    Raises:
        ValueError, TypeError: if an argument is out of range or has the wrong type.
        BackendUnavailable: if a backend was requested by name and cannot run.
    """
    if output_type not in ("pt", "np", "pil"):
        raise ValueError(f'output_type must be "pt", "np" or "pil", got {output_type!r}')
    network = load_model(model, device)
    if z is None:
        source: Sequence[int] | Tensor = resolve_seeds(n, seed)
    else:
        source = _check_noise(n, seed, z)
    sampler = kept_sampler(
        network,
        batch_size=batch_size,
        dtype=dtype,
        backend=backend,
        t=t if isinstance(t, (int, float)) else tuple(t),
        output="uint8" if output_type == "pil" else "float",
    )
    images = sampler(source) if z is None else sampler.of_noise(z)
    return _converted(images, output_type)


def _converted(images: Tensor, output_type: OutputType) -> Tensor | np.ndarray | list[Image] | list[list[Image]]:
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.movedim(-3, -1).cpu().numpy()
    return to_pil(images) if images.ndim == 4 else [to_pil(row) for row in images]


def _check_noise(n: int | None, seed: int | Sequence[int], z: Tensor) -> Tensor:
    """Return z, after checking that it agrees with the other arguments."""
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
    if n is not None and n != len(z):
        raise ValueError(f"n is {n}, but z holds noise for {len(z)} images: leave out n")
    if not isinstance(seed, int):
        raise ValueError("z was given, so the seeds would not be used: leave out one of them")
    return z


class KeptSamplers(Uncopied, OrderedDict[tuple[Any, ...], Sampler]):
    """The samplers that `sample` keeps with a model, by their options. The most recently used one comes last."""


_lock = threading.Lock()


def kept_sampler(model: SPIGAN, **options: Any) -> Sampler:
    """Return a sampler of `model` with these options of `Sampler`.

    The sampler is kept as an attribute of the model, so that both are freed together.
    """
    key = (*options.values(), backends.requested(options["backend"])[0], next(model.parameters()).device)
    with _lock:
        samplers: KeptSamplers = vars(model).setdefault("kept_samplers", KeptSamplers())
        if (sampler := samplers.get(key)) is None:
            sampler = samplers[key] = Sampler(model, **options)
            if len(samplers) > MAX_SAMPLERS:
                samplers.popitem(last=False)
        samplers.move_to_end(key)
    return sampler


@contextlib.contextmanager
def count_evaluations(model: SPIGAN) -> Iterator[list[int]]:
    """Count the images that the generator evaluates inside the block. NFE is this count per image drawn.

    Yields:
        A list whose only element is the count so far.
    """
    count = [0]

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count[0] += output.shape[0]

    handle = model.generator.register_forward_hook(hook)
    try:
        yield count
    finally:
        handle.remove()
