"""`spigan bench`: measure speed on this machine, and report results of the benchmark suite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spigan.cli.options import HELP_NAMES, Backend, Batch, Device, Dtype, help_text, torch_dtype

app = typer.Typer(context_settings=HELP_NAMES)


def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="A run folder, a saved model or a hub id (default: random weights for --preset)."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Architecture to time if --model is not given.")] = "cifar10",
    n: Annotated[int, typer.Option("-n", help="Number of images.", min=1)] = 100,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = "bfloat16",
    backend: Backend = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one call to this JSON file.")] = None,
) -> None:
    """Time image generation on this machine.

    Prints the total time, the time of the first call, and the time of each stage of a batch. To compare with other
    models, clone the repository and run its benchmark suite: pytest benchmarks/ --benchmark-only

    \b
    Examples:
      spigan bench
      spigan bench --model runs/00000 -n 1000 --dtype float32
      spigan bench --profile trace.json
    """
    if context.invoked_subcommand is not None:
        return
    from spigan.bench import profile_sampler, random_model, time_sampler
    from spigan.sampling import Sampler, default_batch_size

    network = random_model(preset, device) if model is None else model
    options: dict[str, Any] = {"dtype": torch_dtype(dtype), "backend": backend, "device": device, "output": "uint8"}
    sampler = Sampler(network, **options)
    resolution = sampler.model.config.resolution
    sampler.batch_size = batch or min(n, default_batch_size(resolution))
    times = time_sampler(sampler, n)
    if profile is not None:
        eager = Sampler(sampler.model, batch_size=sampler.batch_size, cuda_graph=False, **options)
        profile_sampler(eager, n, profile)
    size = f"{n} images of {resolution} x {resolution}, {dtype}, {sampler.batch_size} at a time, NFE = 1"
    rate = n / times["total"]
    typer.echo(f"{size}, on {sampler.device}: {1e3 * times['total']:.4g} ms, {rate:.4g} images/s (median of 7)")
    typer.echo(f"  first call: {1e3 * times['first']:.4g} ms")
    for stage in ("noise", "mapping", "synthesis", "convert"):
        typer.echo(f"  {stage + ' of a batch:':<20}{1e3 * times[stage]:10.4g} ms")
    if profile is not None:
        typer.echo(f"Trace: {profile} (open it in chrome://tracing or ui.perfetto.dev)")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="JSON files written by `pytest benchmarks/ --benchmark-only --benchmark-json`."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("benchmarks/results"),
) -> None:
    """Turn a run of the benchmark suite into tables, a plot and compact JSON.

    The files are named after the device. All runs must come from the same device. If two runs contain the same row, the
    later file counts.
    """
    from spigan.bench import write_report

    for path in write_report(runs, out):
        typer.echo(path)


app.callback(invoke_without_command=True, help=help_text(bench))(bench)
app.command(help=help_text(report))(report)
