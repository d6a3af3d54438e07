"""`spigan demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from spigan.models import SPIGAN


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs.")] = Path("demo"),
    kimg: Annotated[float | None, typer.Option(help="Length of training in thousands of images.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for training.", min=0)] = 0,
) -> None:
    """Train on small digits for a few minutes, then sample.

    Draws a grid of samples, shows noise turning into images (Fig. 9), and times 100 images. Takes a few minutes on 2
    CPU cores, and works offline.
    """
    from spigan.evaluation.evaluate import time_100_images
    from spigan.presets import preset
    from spigan.sampling import Sampler
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
    nfe, seconds = time_100_images(Sampler(model))
    typer.echo(
        f"100 images: NFE = {nfe:g}, {seconds * 1000:.1f} ms on {trainer.device} (median of 5, without the first call)"
    )
    typer.echo(f"More images: spigan sample --model {run_dir} -n 100 --out digits.png")


def _draw(model: SPIGAN, run_dir: Path) -> None:
    """Write a grid of 64 samples, and a strip of 4 samples from h(0) to h(1)."""
    from spigan.images import save_png
    from spigan.models.grid import sample_grid
    from spigan.sampling.interpolation import interpolate_time, save_rows

    grid = save_png(sample_grid(model), run_dir / "samples.png")
    strip = save_rows(interpolate_time(range(4), model=model), run_dir / "strip.png")
    typer.echo(f"Samples:              {grid}")
    typer.echo(f"h(0) to h(1), Fig. 9: {strip}")
