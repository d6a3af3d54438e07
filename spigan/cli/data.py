"""`spigan data`: prepare and check images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spigan.cli.errors import fail, warn
from spigan.cli.options import HELP_NAMES, AsJson, NoProgress, help_text, one_of
from spigan.files import printable

if TYPE_CHECKING:
    from spigan.data import DataConfig

app = typer.Typer(
    no_args_is_help=True, context_settings=HELP_NAMES, help="Prepare and check images for training and evaluation."
)

Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Any source that `spigan train --data` accepts.")]
Split = Annotated[str, typer.Option(help="Split of the source.")]
Column = Annotated[str | None, typer.Option(help="Column (parquet, hub) or file extension (tar) of the images.")]
Channels = Annotated[int, typer.Option(help="Channels of the images: 3 (RGB) or 1 (grey).")]
Crop = Annotated[str, typer.Option(help="center: crop to the largest centred square. none: images must be square.")]
Resize = Annotated[str, typer.Option(help="Resize filter: lanczos, bicubic, bilinear, box or nearest.")]
Workers = Annotated[int | None, typer.Option(help="Number of processes (default: one per CPU core).", min=0)]


def convert(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder to write the parquet files to.", show_default=False)],
    resolution: Annotated[int, typer.Option(help="Height and width in pixels.", min=1, show_default=False)],
    split: Split = "train",
    column: Column = None,
    channels: Channels = 3,
    crop: Crop = "center",
    resize: Resize = "lanczos",
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="png (lossless), webp or jpeg.",
            callback=one_of("--format", ("png", "webp", "jpeg")),
        ),
    ] = "png",
    quality: Annotated[int | None, typer.Option(help="Quality of webp and jpeg, 1 to 100 (default: 95).")] = None,
    shard_size: Annotated[int, typer.Option(help="Images per file.", min=1)] = 4096,
    workers: Workers = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out broken images.")] = False,
    quiet: NoProgress = False,
) -> None:
    """Crop and resize images once, and save them as parquet files.

    Train on the result with `spigan train --data OUT`. After an interruption, run the same command again: finished
    files are kept. Without --skip-broken, files that would contain broken images are not written, and the exit status
    is 1.

    \b
    Examples:
      spigan data convert photos.zip --out photos64 --resolution 64
      spigan data convert lsun/church_outdoor_train_lmdb --out church --resolution 256 --format webp
    """
    from spigan.data import convert as conversion

    config = _config(source, split, column, channels, crop, resize, resolution)
    try:
        result = conversion.convert(
            config,
            out,
            image_format=fmt,  # type: ignore[arg-type]  # checked by the option
            quality=quality,
            shard_size=shard_size,
            workers=workers,
            skip_broken=skip_broken,
            progress=not quiet,
        )
    except RuntimeError as error:  # a worker was killed
        fail(error)
    _list_broken(result["broken"])
    size = sum(file["bytes"] for file in result["files"]) / 1e6
    rate = result["converted"] / result["seconds"]
    typer.echo(
        f"{printable(out)}: {result['images']} images of {resolution} x {resolution} in {len(result['files'])} files, "
        f"{size:.1f} MB; {result['converted']} read now, {rate:.0f} images/s; {len(result['broken'])} broken"
    )
    if not result["complete"]:
        fail("files that contain broken images were not written: repair the images, or add --skip-broken")
    if not result["images"]:
        fail("no images are left")


def check(
    source: Source,
    split: Split = "train",
    column: Column = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="Convert the images to 3 (RGB) or 1 (grey) channels (default: as stored; all must have the same).",
            show_default=False,
        ),
    ] = None,
    crop: Crop = "center",
    resize: Resize = "lanczos",
    resolution: Annotated[
        int | None, typer.Option(help="Also crop and resize the images, as training at this resolution would.", min=1)
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
    quiet: NoProgress = False,
) -> None:
    """Decode every image and report problems.

    Reports counts, sizes, modes, broken images, duplicates, files that are left out and decoding speed. The exit status
    is 1 if any image is broken: training would refuse it, too.

    \b
    Examples:
      spigan data check photos.zip
      spigan data check cifar10 --json
    """
    from spigan.data import check as checking

    config = _config(source, split, column, channels, crop, resize, resolution)
    try:
        report = checking.check(config, workers=workers, progress=not quiet)
    except RuntimeError as error:  # a worker was killed
        fail(error)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _show(report)
    if report["broken"]:
        raise typer.Exit(1)


def _show(report: dict[str, Any]) -> None:
    """Print the report of `spigan data check`."""
    _list_broken(report["broken"])
    for name in ("sizes", "modes", "formats", "profiles", "left_out"):
        if not report[name] and name in ("profiles", "left_out"):
            continue
        counts = [f"{key} ({count})" for key, count in report[name].items()]
        title = name.replace("_", " ") + ":"
        typer.echo(f"{title:<12}{printable(', '.join(counts[:8]))}{', ...' if len(counts) > 8 else ''}")
    if others := report["profiles"].get("other", 0) + report["modes"].get("CMYK", 0):
        warn(
            f"{others} images are CMYK or have a colour profile other than sRGB, which is not applied: see docs/data.md"
        )
    if report["enlarged"]:
        warn(f"{report['enlarged']} images are smaller than the resolution, and are enlarged")
    if report["width"]:
        ranges = " x ".join("{}..{}".format(*report[side]) for side in ("width", "height"))
        typer.echo(f"{'range:':<12}{ranges}")
    duplicates = report["duplicates"]
    typer.echo(f"{'duplicates:':<12}{duplicates['images']} in {duplicates['groups']} groups of identical images")
    for group in duplicates["examples"]:
        typer.echo(f"{'':<12}{printable(' = '.join(group))}")
    core = report["images_per_second_core"]
    typer.echo(
        f"{'speed:':<12}{report['images_per_second']:.0f} images/s with {report['workers']} workers"
        + (f"; one core decodes {core:.0f} images/s" if core else "")
    )
    typer.echo(f"{'images:':<12}{report['images']}, {len(report['broken'])} broken")


def _config(
    source: str, split: str, column: str | None, channels: int | None, crop: str, resize: str, resolution: int | None
) -> DataConfig:
    from spigan.data import DataConfig

    fields = {"source": source, "split": split, "column": column, "channels": channels}
    return DataConfig.model_validate({**fields, "crop": crop, "resize": resize, "resolution": resolution})


def _list_broken(broken: list[dict[str, Any]]) -> None:
    lines = [row["error"] for row in broken[:20]]
    if len(broken) > 20:
        lines.append(f"{len(broken) - 20} more")
    for line in lines:
        typer.secho(f"broken: {printable(line)}", fg=typer.colors.YELLOW, err=True)


for _command in (convert, check):
    app.command(help=help_text(_command))(_command)
