"""Sampling (the paper's section 3.6): z ~ N(0, I) -> h(1) -> image, one evaluation of the generator per image."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from spigan.images import to_pil, to_uint8, to_unit_interval
from spigan.models import SPIGAN
from spigan.ops import philox_normal, use_backend

if TYPE_CHECKING:
    from PIL.Image import Image

BUNDLED_MODEL = Path(__file__).parent / "assets" / "digits"
"""The model of `sample(model=None)`: digits, 16x16 grey, trained by this project (docs/training.md)."""

Model = SPIGAN | str | Path | None
OutputType = Literal["pt", "np", "pil"]


@cache
def _bundled_model() -> SPIGAN:
    return SPIGAN.from_pretrained(BUNDLED_MODEL).requires_grad_(False)


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """The device that a name means; None and "auto": cuda where there is one, else the CPU.

    Raises:
        ValueError: no such device, or none here.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu, cuda, cuda:1, ..., got {device!r}") from None
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        seen = f"sees {count or 'no'} CUDA device{'s' * (count > 1)}"
        raise ValueError(f"device {str(device)!r} was asked for, but torch {torch.__version__} {seen}")
    return resolved


def load_model(model: Model = None, device: torch.device | str | None = None) -> SPIGAN:
    """The model that an argument `model` means.

    Args:
        model: a SPIGAN; a folder or hub id for `SPIGAN.from_pretrained`; a run folder, whose exported model is taken;
            None for the bundled model.
        device: where it shall be; default: where a SPIGAN is, else cuda where there is one, else the CPU.

    Returns:
        The model; the one that was passed where it is on `device` already, else a copy.
    """
    if isinstance(model, SPIGAN):
        here = next(model.parameters()).device
        # An empty tensor knows which device "cuda" is at the moment.
        if device is None or here == torch.empty(0, device=resolve_device(device)).device:
            return model
        return copy.deepcopy(model).to(resolve_device(device))
    device = resolve_device(device)
    if model is None:
        return load_model(_bundled_model(), device)
    exported = Path(model) / "model"
    return SPIGAN.from_pretrained(exported if exported.is_dir() else model, device=device).requires_grad_(False)


def default_batch_size(resolution: int) -> int:
    """Images at a time that keep memory moderate: 128 up to 128 pixels, 64 at 256, 4 at 1024."""
    return max(1, min(128, 2**22 // resolution**2))


def generate(
    model: SPIGAN,
    source: Sequence[int] | Tensor,
    *,
    t: float | Sequence[float] = 1.0,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Iterator[Tensor]:
    """Images in batches, for streams longer than memory.

    Args:
        model: the model, used where it is.
        source: seeds, or z [N, *config.z_shape].
        t, batch_size, dtype, backend: see `sample`.

    Yields:
        [B, C, H, W], or [K, B, C, H, W] where t is a list, floats in about [-1, 1] on the model's device.
    """
    device = next(model.parameters()).device
    batch_size = default_batch_size(model.config.resolution) if batch_size is None else batch_size
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    autocast = torch.autocast(device.type, dtype, enabled=dtype in (torch.bfloat16, torch.float16))
    for start in range(0, len(source), batch_size):
        part = source[start : start + batch_size]
        # Entered anew for each batch: the caller's code between batches must not run under these settings.
        with torch.inference_mode(), autocast, use_backend(backend) if backend else contextlib.nullcontext():
            if isinstance(part, Tensor):
                z = part.to(device)
            else:
                seeds = torch.tensor(part, dtype=torch.int64, device=device)
                z = philox_normal((len(part), *model.config.z_shape), seed=seeds)
            images = model(z, t, noise="const")
        yield images


def resolve_seeds(n: int | None, seed: int | Sequence[int]) -> list[int]:
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
        model: a SPIGAN, a folder (a saved model or a training run), a hub id; None for the bundled model of digits.
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
    source: Sequence[int] | Tensor = z if z is not None else resolve_seeds(n, seed)
    shape = (network.config.img_channels, network.config.resolution, network.config.resolution)
    if len(source):
        batches = list(_with_progress(network, source, t=t, batch_size=batch_size, dtype=dtype, backend=backend))
        images = torch.cat(batches, dim=-4)
    else:
        leading = () if isinstance(t, (int, float)) else (len(t),)
        images = torch.empty(*leading, 0, *shape, device=next(network.parameters()).device)
    if output_type == "pt":
        return to_unit_interval(images)
    if output_type == "np":
        return to_unit_interval(images).movedim(-3, -1).cpu().numpy()
    pixels = to_uint8(images)
    return to_pil(pixels) if pixels.ndim == 4 else [to_pil(row) for row in pixels]


def _with_progress(model: SPIGAN, source: Sequence[int] | Tensor, **options) -> Iterator[Tensor]:  # type: ignore[no-untyped-def]
    """`generate` with a progress bar, which appears only where sampling takes longer than two seconds."""
    from tqdm.auto import tqdm

    with tqdm(total=len(source), unit="img", delay=2.0, leave=False, dynamic_ncols=True) as bar:
        for images in generate(model, source, **options):
            bar.update(images.shape[-4])
            yield images


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
