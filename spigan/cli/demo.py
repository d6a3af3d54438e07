"""`spigan demo` and `spigan app`."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from spigan.cli.errors import warn
from spigan.cli.options import Device

if TYPE_CHECKING:
    from spigan.models import SPIGAN

TIMES = [i / 8 for i in range(9)]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs.")] = Path("demo"),
    kimg: Annotated[float | None, typer.Option(help="Length of training in thousands of images.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for training.", min=0)] = 0,
) -> None:
    """Train on small digits for a few minutes, then sample.

    Draws a grid of samples, shows noise turning into images (Fig. 9), and times 100 images. Takes a few minutes on 2
    CPU cores, and works offline.
    """
    from spigan.presets import preset
    from spigan.training.run_folder import next_run_dir
    from spigan.training.trainer import Trainer

    config = preset("digits", seed=seed, **({} if kimg is None else {"total_kimg": kimg}))
    run_dir = next_run_dir(out)
    typer.echo(
        f"Training on 1,797 handwritten digits (16x16, bundled with scikit-learn) for {config.total_kimg:g} kimg ..."
    )
    trainer = Trainer(config, run_dir)
    model = trainer.fit()
    if trainer.interrupted:
        raise typer.Exit(130)
    _draw(model, run_dir)
    nfe, seconds = _time(model)
    typer.echo(
        f"100 images: NFE = {nfe:g}, {seconds * 1000:.1f} ms on {trainer.device} (median of 5, without the first call)"
    )
    typer.echo(f"More images: spigan sample --model {run_dir} -n 100 --out digits.png")


def _draw(model: SPIGAN, run_dir: Path) -> None:
    """Write a grid of 64 samples, and a strip of 4 samples at the times `TIMES`."""
    from spigan.images import display_scale, make_grid, save_png
    from spigan.models.grid import sample_grid
    from spigan.sampling import Sampler

    grid = save_png(sample_grid(model), run_dir / "samples.png")
    rows = Sampler(model, t=TIMES, output="uint8")(range(4), to="cpu").transpose(0, 1).flatten(0, 1)
    scale = display_scale(model.config.resolution)
    strip = save_png(make_grid(rows, columns=len(TIMES), scale=scale), run_dir / "strip.png")
    typer.echo(f"Samples:              {grid}")
    typer.echo(f"h(0) to h(1), Fig. 9: {strip}")


def _time(model: SPIGAN) -> tuple[float, float]:
    """Return the number of network evaluations per image, and the median time for 100 images, in seconds."""
    from spigan.sampling import Sampler, count_evaluations

    sampler = Sampler(model, batch_size=100, output="uint8")
    with count_evaluations(model) as evaluations:
        sampler(range(100))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        sampler(range(100), to="cpu")
        seconds.append(time.perf_counter() - began)
    return evaluations[0] / 100, statistics.median(seconds[1:])


def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A run folder, a saved model or a hub id, offered in addition to the bundled models. Repeat the "
            "option for several models.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. With 0.0.0.0, other machines can reach the page.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(help="Port (default: the first free one from 7860).", min=1, max=65535, show_default=False),
    ] = None,
    device: Device = None,
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in the browser.")] = False,
) -> None:
    """Explore a model in the browser (needs the extra `app`).

    The page shows batches of images, noise turning into images, and interpolations. Only this machine can reach it,
    unless --host allows others. It works offline and does not send data anywhere.

    \b
    Examples:
      spigan app --open
      spigan app --model runs/00000 --model user/name
    """
    from spigan.app import Page, is_loopback, launch

    if not is_loopback(host):
        warn(f"anyone who can reach this machine at {host} can use the page; it has no password")
    launch(Page(models or [], device), host=host, port=port, browser=browser)
