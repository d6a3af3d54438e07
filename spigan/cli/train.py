"""`spigan train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spigan.cli.options import Device, NoProgress

if TYPE_CHECKING:
    from spigan.config import TrainConfig
    from spigan.training.trainer import Trainer

_WHAT, _HOW = "What to train", "How to train"


def train(
    preset: Annotated[
        str | None,
        typer.Option(
            help="Configuration to start from: digits (default), cifar10, cifar10-small, celebahq256 or church256.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images to train on: a folder, a zip file, a parquet file or a folder of them, an LMDB database, tar "
            "shards, cifar-10-python.tar.gz, or a hub id (default: the preset's). With --resume: where the images of "
            "the run are now.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Column (parquet, hub) or file extension (tar) of the images.", rich_help_panel=_WHAT),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder, new or empty (default: the next free runs/NNNNN).", rich_help_panel=_WHAT),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A config.json to start from instead of a preset.", rich_help_panel=_WHAT)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Resume the run in this folder. Add --kimg to extend it.", rich_help_panel=_WHAT),
    ] = None,
    kimg: Annotated[
        float | None, typer.Option(help="Length of training in thousands of images.", rich_help_panel=_HOW)
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per minibatch.", rich_help_panel=_HOW)] = None,
    intervals: Annotated[
        int | None,
        typer.Option(
            "-k", "--intervals", help="K, the number of times t_1, ..., t_K in each iteration.", rich_help_panel=_HOW
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the initial weights, the noise and the data order.", rich_help_panel=_HOW),
    ] = None,
    device: Device = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Set any other field of TrainConfig. Repeat the option for several fields.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--show-config", help="Print the configuration and exit.")] = False,
    quiet: NoProgress = False,
) -> None:
    """Train a model (Algorithm 1 of the paper).

    The run folder receives config.json, stats.jsonl, TensorBoard events, reals.png, samples-NNNNNN.png (NNNNNN is the
    number of thousands of images seen), checkpoints/ and the exported model/. Ctrl-C saves a checkpoint; --resume
    continues from it. With --set metric_features=..., the run is also evaluated, and gets metrics.jsonl and best/.

    \b
    Examples:
      spigan train
      spigan train --preset cifar10 --kimg 10000
      spigan train --data photos.zip --set model.resolution=64 --set augment=ada
      spigan train --resume runs/00000
      torchrun --nproc-per-node 4 -m spigan train --preset cifar10   # needs the extra `distributed`
    """
    fields = {"batch": batch, "seed": seed, "intervals": intervals, "device": device}
    if resume is not None:
        others: dict[str, Any] = {"preset": preset, "column": column, "out": out, "config": config, "set": changes}
        _refuse_beside_resume(others | fields | {"show-config": show or None})
    else:
        if preset is not None and config is not None:
            raise ValueError("--preset and --config cannot be combined: leave out one of them")
        given = {name: value for name, value in {"total_kimg": kimg, **fields}.items() if value is not None}
        chosen = [] if column is None else [f"data.column={json.dumps(column)}"]
        settings = train_config(preset or "digits", config, data, given, chosen + (changes or []))
        if show:
            typer.echo(settings.model_dump_json(indent=2))
            return
    from spigan.training.trainer import Trainer  # not before it is needed: it loads torch

    if resume is not None:
        _fit(Trainer.resume(resume, total_kimg=kimg, data=data, progress=not quiet))
    else:
        _fit(Trainer(settings, out, progress=not quiet))


def _refuse_beside_resume(others: dict[str, Any]) -> None:
    if extra := [f"--{name}" for name, value in others.items() if value is not None]:
        raise ValueError(f"--resume uses the run's own configuration: leave out {', '.join(extra)}")


def _fit(trainer: Trainer) -> None:
    """Train until the end or a signal, and say where the model is."""
    count, main = trainer.processes.count, trainer.processes.main
    where = f"{count} processes on {trainer.device.type}" if count > 1 else str(trainer.device)
    if main:
        length = f"{trainer.config.total_kimg:g} kimg on {where}, K = {trainer.config.intervals}"
        typer.echo(f"{trainer.run_dir}: {length}")
    trainer.fit()
    trainer.processes.close()
    if trainer.interrupted:
        raise typer.Exit(130)
    if main:
        typer.echo(f"Done. The model is in {trainer.run_dir / 'model'}; try: spigan sample --model {trainer.run_dir}")


def train_config(
    preset: str, config: Path | None, data: str | None, given: dict[str, Any], changes: list[str]
) -> TrainConfig:
    """Return the configuration from the command line: a preset or file, changed by named options, then by --set.

    Args:
        preset: name of the preset, unless `config` is given.
        config: config.json to start from.
        data: source of the images. None keeps the source of the preset or file.
        given: fields set by named options.
        changes: list of "FIELD=VALUE". VALUE is parsed as JSON if possible; otherwise it is text.

    Raises:
        ValueError: if the fields do not make a valid configuration.
        OSError: if `config` cannot be read.
    """
    from spigan.config import TrainConfig
    from spigan.files import read_json
    from spigan.presets import preset_fields

    fields = preset_fields(preset) if config is None else read_json(config)
    fields |= given
    if data is not None:
        stored = fields.get("data", {})
        if not isinstance(stored, dict):
            raise ValueError(f"data must be an object in {config}, got {stored!r}")
        fields["data"] = stored | {"source": data}
    for change in changes:
        _apply(fields, change)
    if "data" not in fields:
        raise ValueError(f"the preset {preset!r} needs images: pass --data with a folder, zip, parquet file or hub id")
    return TrainConfig.model_validate(fields)


def _apply(fields: dict[str, Any], change: str) -> None:
    """Set one field, as in "model.ode_steps=8"."""
    name, separator, text = change.partition("=")
    if not separator:
        raise ValueError(f"--set takes FIELD=VALUE, got {change!r}")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, leaf = name.split(".")
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ValueError(f"--set {change}: {parent!r} has no fields")
    fields[leaf] = value
