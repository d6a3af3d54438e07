"""`spigan sample` and `spigan interpolate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spigan.cli.options import Backend, Batch, Device, Dtype, Model, one_of, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def sample(
    n: Annotated[int | None, typer.Option("-n", help="Number of images (default: 16).", min=1)] = None,
    model: Model = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(
            help="Seed of the first image; image i uses seed + i (default: 0). Or give one --seed for each image.",
            min=0,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder (png), or a .png, .npz or .parquet file.")] = Path("samples.png"),
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="png: one file per image. grid: all images in one PNG. npz: uint8 [N, H, W, C]. parquet: one PNG per "
            "row. (default: inferred from --out)",
            callback=one_of("--format", ("png", "grid", "npz", "parquet")),
        ),
    ] = None,
    t: Annotated[
        list[float] | None,
        typer.Option(
            help="Time on the straight path: 0 is noise, 1 is the image (default). Repeat the option for several times."
        ),
    ] = None,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Backend = None,
) -> None:
    """Sample images from a model.

    Writes a folder of PNGs, a grid, an npz file or a parquet file. Each batch is written while the next one is
    computed. Except for a grid, memory use does not grow with the number of images. With several times, a grid has one
    row per image, a folder has one file per image and time, and an npz file has a leading axis for the times.

    \b
    Examples:
      spigan sample -n 64
      spigan sample --model runs/00000 -n 50000 --out images.npz --dtype bfloat16
      spigan sample --seed 7 --t 0 --t 0.5 --t 1
    """
    from spigan.sampling import Sampler, count_evaluations, resolve_seeds
    from spigan.sampling.writers import Format, image_format, image_writer

    times = t or [1.0]
    seeds = resolve_seeds(n, seed[0] if seed and len(seed) == 1 else seed or 0)
    options: dict[str, Any] = {"batch_size": batch, "dtype": torch_dtype(dtype), "backend": backend, "device": device}
    sampler = Sampler(model, t=times, output="uint8", **options)
    config = sampler.model.config
    shape = (config.img_channels, config.resolution, config.resolution)
    writer = image_writer(Format(fmt) if fmt else image_format(out), out, seeds, times, shape)
    with count_evaluations(sampler.model) as evaluations:
        sampler(seeds[:1])
    began = time.perf_counter()
    with writer as add:
        for images in sampler.stream(seeds, to="cpu"):
            add(images)
    elapsed = time.perf_counter() - began
    nfe = evaluations[0] / len(times)
    typer.echo(f"{len(seeds) * len(times)} images in {elapsed:.2f} s (including writing), NFE = {nfe:g}: {out}")


def interpolate(
    kind: Annotated[
        str,
        typer.Option(
            help="time: h(0) to h(1) of each seed (Fig. 9). z: between the noise of two seeds (Fig. 10). "
            "h: between their h(1) (Fig. 11). path: real images to noise, along the SDE path and the straight path "
            "(Fig. 4).",
            callback=one_of("--kind", ("time", "z", "h", "path")),
        ),
    ] = "time",
    model: Model = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SEED ...",
            help="For example, --seeds 3 1 4 (default: 0 1 2 3). For z and h, each row leads from one seed to the "
            "next. For path, each seed is also the number of an image in --data.",
            min=0,
        ),
    ] = None,
    more: Annotated[list[int] | None, typer.Argument(hidden=True, metavar="SEED", min=0)] = None,
    steps: Annotated[int, typer.Option(help="Images per row.", min=2)] = 9,
    out: Annotated[
        Path, typer.Option(help="A grid (.png), or an animation that plays forwards and back (.gif, .webp).")
    ] = Path("interpolation.png"),
    mix: Annotated[
        str,
        typer.Option(
            help="For z. spherical keeps z standard normal. linear, the paper's (1 - a) z' + a z'', does not."
        ),
    ] = "spherical",
    noise: Annotated[
        str,
        typer.Option(
            help="For time, on the learned path: the generator's per-pixel noise. stored: the same in all rows. "
            "own: drawn from each row's seed.",
            callback=one_of("--noise", ("stored", "own")),
        ),
    ] = "stored",
    data: Annotated[
        str, typer.Option(help="For path: the images, from any source that `spigan train --data` accepts.")
    ] = "digits",
    resolution: Annotated[
        int | None, typer.Option(help="For path: size of the images (default: as stored).", min=1)
    ] = None,
    frame_time: Annotated[int, typer.Option(help="Milliseconds per frame of an animation.", min=1)] = 80,
    batch: Batch = None,
    device: Device = None,
) -> None:
    """Draw rows of interpolated images.

    By default, each row shows how the noise of one seed turns into an image, from h(0) to h(1).

    \b
    Examples:
      spigan interpolate
      spigan interpolate --kind z --seeds 3 1 4 --out walk.webp
      spigan interpolate --kind path --data photos --resolution 64
    """
    from spigan.sampling import interpolation

    if more and not seeds:
        raise ValueError(f"unexpected argument {more[0]}; did you mean --seeds {' '.join(map(str, more))}?")
    interpolation.check_suffix(out)
    # --seeds takes any number of values: click assigns the first to the option, and the rest to the argument.
    numbers = [*seeds, *(more or [])] if seeds else [0, 1, 2, 3]
    options: dict[str, Any] = {"model": model, "batch_size": batch, "device": device}
    columns = None
    if kind == "path":
        rows, columns = _forward_rows(data, resolution, numbers, steps), 2
    elif kind == "time":
        rows = interpolation.interpolate_time(numbers, steps, noise=noise, **options)  # type: ignore[arg-type]
    elif kind == "z":
        rows = interpolation.interpolate_z(numbers, steps, mix=mix, **options)  # type: ignore[arg-type]
    else:
        rows = interpolation.interpolate_h(numbers, steps, **options)
    interpolation.save_rows(rows, out, columns=columns, frame_time=frame_time)
    typer.echo(f"{rows.shape[0]} rows of {steps} images: {out}")


def _forward_rows(source: str, resolution: int | None, numbers: list[int], steps: int) -> Tensor:
    """Return `forward_path` of the images with these numbers. Each number is also the seed of the image's noise."""
    from spigan.data import DataConfig, open_dataset
    from spigan.sampling.interpolation import forward_path

    dataset = open_dataset(DataConfig(source=source, resolution=resolution, cache="none"))
    if bad := [number for number in numbers if number >= len(dataset)]:
        raise ValueError(f"{source} has images 0 to {len(dataset) - 1}, got --seeds {bad[0]}")
    return forward_path(dataset.images(numbers), numbers, steps)
