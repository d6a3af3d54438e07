"""The command line: `spigan demo | train | sample | evaluate | interpolate | ablate | export | push | app | data |
bench | info`.

Heavy packages load inside the commands.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from spigan.config import TrainConfig
    from spigan.data import DataConfig

app = typer.Typer(
    help="SPI-GAN: images from noise in one evaluation of the generator.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_MODEL_HELP = (
    "A run folder, a saved model, a hub id, or a model that comes with spigan: digits (default), cifar10-small."
)


def _fail(error: Exception | str) -> NoReturn:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        from spigan.config import describe_problems

        error = describe_problems(error)
    where = f" in process {os.environ.get('RANK')} of {_processes()}" if _processes() > 1 else ""
    # Names that come from files may hold what a terminal obeys.
    shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(error))
    typer.secho(f"error{where}: {shown}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)


def _processes() -> int:
    """How many a launcher (torchrun, accelerate launch) has started."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _show_version(value: bool) -> None:
    if value:
        from spigan._version import __version__

        typer.echo(f"spigan {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand in ("ablate", "demo") and _processes() > 1:
        _fail(f"{context.invoked_subcommand} runs in one process; `spigan train` is what several can do together")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Versions, devices, what was built, and which backend each operation would use and why."""
    from spigan.info import main as print_info

    print_info(as_json)


@app.command()
def train(
    preset: Annotated[
        str | None,
        typer.Option(help="Where to start: digits (default), cifar10, cifar10-small, celebahq256, church256."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images: a folder, zip, parquet file or folder of them, LMDB, tar shards, cifar-10-python.tar.gz, "
            "or a hub id."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run, new or empty (default: runs/NNNNN).")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json to start from instead of a preset.")] = None,
    kimg: Annotated[float | None, typer.Option(help="Thousands of images to train on.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images in a minibatch.")] = None,
    intervals: Annotated[int | None, typer.Option("-k", "--intervals", help="K, times per iteration.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial weights, noise and data order.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of TrainConfig: --set augment=ada --set model.ode_steps=8",
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder; --kimg may extend it.")
    ] = None,
    show: Annotated[bool, typer.Option("--show-config", help="Print the configuration and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model (Algorithm 1 of the paper). Ctrl-C saves; --resume goes on.

    The run folder gets config.json, stats.jsonl, TensorBoard events, reals.png, samples-NNNNNN.png (NNNNNN: kimg),
    checkpoints and the exported model. With --set metric_features=... also metrics.jsonl and best/.

    On several GPUs or machines: torchrun --nproc-per-node 4 -m spigan train ... (needs the extra `distributed`).
    """
    from spigan.ops import BackendUnavailable
    from spigan.training.trainer import Trainer

    given = {"total_kimg": kimg, "batch": batch, "intervals": intervals, "seed": seed, "device": device}
    given = {name: value for name, value in given.items() if value is not None}
    errors = (ValueError, OSError, ImportError, FloatingPointError, BackendUnavailable)
    try:
        if resume is not None:
            others = {
                "--preset": preset, "--data": data, "--out": out, "--config": config, "--batch": batch, "--seed": seed,
                "--intervals": intervals, "--device": device, "--set": changes, "--show-config": show or None,
            }  # fmt: skip
            if extra := [name for name, value in others.items() if value is not None]:
                raise ValueError(f"--resume goes on with the run's own configuration: leave out {', '.join(extra)}")
            trainer = Trainer.resume(resume, total_kimg=kimg, progress=not quiet)
        else:
            if preset is not None and config is not None:
                raise ValueError("--preset and --config both say where to start: leave out one of them")
            settings = _train_config(preset or "digits", config, data, given, changes or [])
            if show:
                typer.echo(settings.model_dump_json(indent=2))
                return
            trainer = Trainer(settings, out, progress=not quiet)
        count, main = trainer.processes.count, trainer.processes.main
        where = f"{count} processes on {trainer.device.type}" if count > 1 else str(trainer.device)
        if main:
            length = f"{trainer.config.total_kimg:g} kimg on {where}, K = {trainer.config.intervals}"
            typer.echo(f"{trainer.run_dir}: {length}")
        trainer.fit()
        trainer.processes.close()
    except errors as error:
        _fail(error)
    if trainer.interrupted:
        raise typer.Exit(130)
    if main:
        typer.echo(f"Done: {trainer.run_dir / 'model'} holds the model; try: spigan sample --model {trainer.run_dir}")


def _train_config(
    preset: str, config: Path | None, data: str | None, given: dict[str, Any], changes: list[str]
) -> TrainConfig:
    """The configuration that the command line describes: preset or file, then named options, then --set."""
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
        name, separator, text = change.partition("=")
        if not separator:
            raise ValueError(f"--set takes FIELD=VALUE, got {change!r}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        *parents, leaf = name.split(".")
        target = fields
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ValueError(f"--set {change}: {parent!r} has no fields of its own")
        target[leaf] = value
    if "data" not in fields:
        raise ValueError(f"the preset {preset!r} needs images: pass --data with a folder, zip, parquet or hub id")
    return TrainConfig.model_validate(fields)


@app.command()
def sample(
    n: Annotated[int | None, typer.Option("-n", help="Number of images (default: 16).", min=1)] = None,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Image i uses seed + i (default: 0); or give one --seed for each image.", min=0),
    ] = None,
    out: Annotated[Path, typer.Option(help="A folder (png), or a .png, .npz or .parquet file.")] = Path("samples.png"),
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format", help="png: a file each; grid; npz: uint8 [N, H, W, C]; parquet: PNGs (default: by --out)."
        ),
    ] = None,
    t: Annotated[
        list[float] | None,
        typer.Option(help="Time on the straight path (default: 1, the clean image); several: --t 0 --t 0.5 --t 1."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images at a time (default: by resolution).", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str | None, typer.Option(help="auto, reference, cpp, triton, cuda.")] = None,
) -> None:
    """Draw images: a folder of PNGs, one grid, an npz or a parquet file.

    With several times: a row for each image in a grid, a file for each time in a folder, a leading axis in an npz.
    Images are written while the next ones are computed, in memory that does not grow with their number (but a grid's).
    """
    import torch

    from spigan.ops import BackendUnavailable
    from spigan.sampling import Sampler
    from spigan.sampling.sampler import count_evaluations, resolve_seeds
    from spigan.sampling.writers import Format, format_of, image_writer

    try:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype}")
        if fmt is not None and fmt not in list(Format):
            raise ValueError(f"--format must be one of {', '.join(Format)}, got {fmt}")
        times = t or [1.0]
        seeds = resolve_seeds(n, seed[0] if seed and len(seed) == 1 else seed or 0)
        sampler = Sampler(
            model,
            batch_size=batch,
            dtype=getattr(torch, dtype),
            backend=backend,
            device=None if device == "auto" else device,
            t=times,
            output="uint8",
        )
        config = sampler.model.config
        shape = (config.img_channels, config.resolution, config.resolution)
        writer = image_writer(Format(fmt) if fmt else format_of(out), out, seeds, times, shape)
        with count_evaluations(sampler.model) as evaluations:
            sampler(seeds[:1])
        began = time.perf_counter()
        with writer as add:
            for images in sampler.stream(seeds, to="cpu"):
                add(images)
        elapsed = time.perf_counter() - began
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)
    count = len(seeds) * len(times)
    typer.echo(f"{count} images in {elapsed:.2f} s (with writing), NFE = {evaluations[0] / len(times):g}: {out}")


@app.command()
def interpolate(
    kind: Annotated[
        str,
        typer.Option(
            help="time: h(0) to h(1) of each seed (Fig. 9). z: between the noise of the seeds (Fig. 10). "
            "h: between their h(1) (Fig. 11). path: real images to noise, along the SDE and straight (Fig. 4)."
        ),
    ] = "time",
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SEED ...",
            help="--seeds 3 1 4 (default: 0 1 2 3). z, h: a row from each seed to the next. "
            "path: numbers of the images too.",
            min=0,
        ),
    ] = None,
    more: Annotated[list[int] | None, typer.Argument(hidden=True, metavar="SEED", min=0)] = None,
    steps: Annotated[int, typer.Option(help="Images in a row.", min=2)] = 9,
    out: Annotated[Path, typer.Option(help="A grid (.png), or an animation there and back (.gif, .webp).")] = Path(
        "interpolation.png"
    ),
    mix: Annotated[
        str,
        typer.Option(
            help="z: spherical keeps z standard normal; linear is the paper's (1 - a) z' + a z'', which does not."
        ),
    ] = "spherical",
    data: Annotated[str, typer.Option(help="path: images, any source that `spigan train` takes.")] = "digits",
    resolution: Annotated[
        int | None, typer.Option(help="path: size of the images (default: as stored).", min=1)
    ] = None,
    frame_time: Annotated[int, typer.Option(help="Milliseconds that a frame of an animation is shown.", min=1)] = 80,
    batch: Annotated[int | None, typer.Option(help="Images at a time (default: by resolution).", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
) -> None:
    """Pictures between pictures: a row for each seed or pair of seeds, a column for each step.

    Without --kind: noise turning into images, h(0) to h(1).
    """
    from spigan.ops import BackendUnavailable
    from spigan.sampling import interpolation

    columns = None
    try:
        if kind not in ("time", "z", "h", "path"):
            raise ValueError(f"--kind must be time, z, h or path, got {kind}")
        if more and not seeds:
            raise ValueError(f"{more[0]} is no option; did you mean --seeds {' '.join(map(str, more))}?")
        interpolation.check_suffix(out)
        # One option that takes any number of values: click gives the first to the option, the others are arguments.
        numbers = [*seeds, *(more or [])] if seeds else [0, 1, 2, 3]
        options: dict[str, Any] = {"model": model, "batch_size": batch, "device": None if device == "auto" else device}
        if kind == "path":
            rows, columns = _forward_rows(data, resolution, numbers, steps), 2
        elif kind == "time":
            rows = interpolation.interpolate_time(numbers, steps, **options)
        elif kind == "z":
            rows = interpolation.interpolate_z(numbers, steps, mix=mix, **options)  # type: ignore[arg-type]
        else:
            rows = interpolation.interpolate_h(numbers, steps, **options)
        interpolation.save_rows(rows, out, columns=columns, frame_time=frame_time)
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)
    typer.echo(f"{rows.shape[0]} rows of {steps} images: {out}")


def _forward_rows(source: str, resolution: int | None, numbers: list[int], steps: int) -> Tensor:
    """`forward_path` of the images with these numbers, each with the noise of that seed."""
    from spigan.data import DataConfig, open_dataset
    from spigan.sampling.interpolation import forward_path

    dataset = open_dataset(DataConfig(source=source, resolution=resolution, cache="none"))
    if bad := [number for number in numbers if number >= len(dataset)]:
        raise ValueError(f"{source} has images 0 to {len(dataset) - 1}, got --seeds {bad[0]}")
    return forward_path(dataset.__getitems__(numbers), numbers, steps)


@app.command()
def ablate(
    grid: Annotated[
        str, typer.Argument(help="A grid file (.toml or .json), or one that comes with spigan: table5, digits.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study, a run folder in it for each arm.")] = Path("ablation"),
    show: Annotated[bool, typer.Option("--show", help="Print the grid file and stop: a start for your own.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Write table and curve of what there is; train nothing.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train the arms of a study one after the other; write table.md, table.json and curve.png (Table 5, Fig. 8).

    Run it again after a stop or a kill: arms that have ended are kept, one that was interrupted goes on exactly.
    Exit status: 0 all arms have ended, 1 one failed, 130 stopped by Ctrl-C.
    """
    from spigan.ablation import study
    from spigan.files import read_text

    try:
        path = study.grid_path(grid)
        if show:
            typer.echo(read_text(path), nl=False)
            return
        plan = study.read_grid(path)
        failed: list[str] = []
        interrupted = False
        if not report_only:
            failed, interrupted = study.run(plan, out, progress=not quiet, say=typer.echo)
        paths = study.write_report(plan, out)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    if interrupted:
        typer.echo(f"Stopped. Go on with: spigan ablate {grid} --out {out}")
        raise typer.Exit(130)
    typer.echo(f"Report: {', '.join(map(str, paths))}")
    if failed:
        _fail(f"{len(failed)} of {len(plan.arms)} arms failed: {', '.join(failed)}; run it again to try them again")


@app.command()
def evaluate(
    model: Annotated[str | None, typer.Argument(help=_MODEL_HELP, show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Reference images: a folder, zip, parquet file or folder of them, cifar-10-python.tar.gz, or a hub id "
            "[default: what the run was trained on].",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of the reference (default: train, or the run's).")] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 (grey) or 3 (RGB) converts the reference (default: as stored, or the run's).")
    ] = None,
    resize: Annotated[
        str | None, typer.Option(help="lanczos (default, or the run's), bicubic, bilinear, box or nearest.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="inception or inception=PATH (FID), cifar10-resnet56=PATH, or [NAME=]PATH of a TorchScript network, "
            "which is a program: only one from somebody you trust."
        ),
    ] = "inception",
    samples: Annotated[int, typer.Option(help="Images to draw.", min=1)] = 50_000,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the result, with all that it depends on, as JSON.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images at a time (default: by resolution).", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    backend: Annotated[str | None, typer.Option(help="auto, reference, cpp, triton, cuda.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of reference statistics (default: SPIGAN_CACHE, or ~/.cache/spigan).")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Measure a model: FID (or another Frechet distance), KID, Inception Score, precision, recall, coverage, time.

    FID needs the Inception network of 2015-12-05; the error that it is missing says where to get it.
    """
    import warnings

    import torch

    from spigan.evaluation.evaluate import evaluate as measure
    from spigan.evaluation.evaluate import table
    from spigan.files import write_text
    from spigan.ops import BackendUnavailable

    try:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype}")
        reference = _reference_config(model, data, {"split": split, "channels": channels, "resize": resize})
        if out is not None and out.is_dir():
            raise ValueError(f"--out {out} is a folder; expected the path of a JSON file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the result has them
            result = measure(
                model,
                data=reference,
                features=features,
                samples=samples,
                seed=seed,
                batch_size=batch,
                dtype=getattr(torch, dtype),
                device=None if device == "auto" else device,
                backend=backend,
                cache_dir=cache,
                progress=not quiet,
            )
        if out is not None:
            write_text(out, json.dumps(result, indent=2) + "\n")
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)
    for warning in result["warnings"]:
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW, err=True)
    typer.echo(table(result))
    if out is not None:
        typer.echo(f"{out} records all of it")


def _reference_config(model: str | None, data: str | None, changes: dict[str, Any]) -> DataConfig:
    """The reference of an evaluation: --data, else what the bundled model or the run in the folder was trained on."""
    from spigan.data import DataConfig
    from spigan.models.load import BUNDLED_MODELS
    from spigan.presets import preset_fields
    from spigan.runs import read_config, run_of

    fields: dict[str, Any] = {}
    if data is not None:
        fields = {"source": data}
    elif model is None or model in BUNDLED_MODELS:
        fields = preset_fields(model or BUNDLED_MODELS[0])["data"]
    else:
        run = run_of(model)
        if run is None:
            raise ValueError(f"{model} is no training run, so its images are not known: pass --data")
        fields = read_config(run).data.model_dump() | {"resolution": None}
    given = {name: value for name, value in changes.items() if value is not None}
    return DataConfig.model_validate(fields | given)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The file.", show_default=False)],
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    fmt: Annotated[
        str | None,
        typer.Option("--format", help="onnx (needs the extra `export`) or pt2 (for PyTorch) [default: by --out]."),
    ] = None,
    t: Annotated[float, typer.Option(help="Time on the straight path; 1 is the clean image.")] = 1.0,
    batch: Annotated[int | None, typer.Option(help="The only batch size that it takes [default: any].", min=1)] = None,
) -> None:
    """Write the model as one file that makes images without spigan.

    It takes z, standard normal, to the images that `sample` makes of the same z, in [0, 1]; both are float32.
    """
    from spigan.models.load import load_model
    from spigan.sampling.export import export_model, format_of

    try:
        fmt = format_of(out) if fmt is None else fmt
        network = load_model(model, "cpu")
        export_model(network, out, format=fmt, t=t, batch_size=batch)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    config, size = network.config, out.stat().st_size / 1e6
    z, images = (
        f"[{', '.join(map(str, (batch or 'N', *shape)))}]"
        for shape in (config.z_shape, (config.img_channels, config.resolution, config.resolution))
    )
    typer.echo(f"{out}: {size:.1f} MB, z {z} to images {images} in [0, 1], t = {t:g}")
    if fmt == "onnx":
        typer.echo(f'Run it: onnxruntime.InferenceSession("{out}").run(None, {{"z": z}})[0], z a NumPy array')
    else:
        typer.echo(f'Run it: torch.export.load("{out}").module()(z)')


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="A run folder, model/ or best/ in it, or a saved model.")],
    repo: Annotated[str, typer.Argument(help="Where to on the Hugging Face hub: user/name.")],
    metrics: Annotated[
        Path | None,
        typer.Option(help="JSON of `spigan evaluate --out` (default: what the run measured of these weights)."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the weights, as the hub writes it: cc-by-4.0, ...")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository (default: the hub's setting).")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Made if it does not exist (default: the main branch).")] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Push model using spigan.",
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Propose the commit, do not make it.")] = False,
    local: Annotated[
        Path | None, typer.Option(help="Write what would be uploaded to this new or empty folder, and upload nothing.")
    ] = None,
) -> None:
    """Upload a model to the Hugging Face hub with a card: configuration, data, training, metrics, samples.

    The averaged weights alone: no discriminator, no optimiser, no checkpoint. Log in before with `hf auth login`.
    """
    from spigan.models import hub
    from spigan.models.load import load_model
    from spigan.ops import BackendUnavailable
    from spigan.runs import run_of

    try:
        if not Path(model).is_dir():
            raise FileNotFoundError(f"{model} is no folder: give a run or a saved model")
        network = load_model(Path(model))
        about: dict[str, Any] = {"run": run_of(model), "metrics": metrics, "license": license}
        if local is not None:
            folder = hub.write_folder(network, local, repo, **about)
            typer.echo(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; nothing was uploaded")
            return
        link = network.push_to_hub(
            repo, **about, private=private, branch=branch, commit_message=message, create_pr=pull_request
        )
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)
    typer.echo(link)


@app.command("app")
def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A run folder, a saved model or a hub id to choose from, beside the bundled models; several: "
            "--model A --model B.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0: other machines can reach it.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Default: the first free one from 7860 on.", min=1, max=65535, show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    browser: Annotated[bool, typer.Option("--open/--no-browser", help="Open the page in the browser.")] = False,
) -> None:
    """A page in the browser to play with a model (needs the extra `app`): batches, noise to image, interpolation.

    Only this machine can reach it, unless --host says otherwise. It works offline and reports nothing to anybody.
    """
    from spigan.app import Page, is_loopback, launch
    from spigan.ops import BackendUnavailable

    if not is_loopback(host):
        warning = f"warning: whoever can reach this machine at {host} can use the page; it has no password"
        typer.secho(warning, fg=typer.colors.YELLOW, err=True)
    try:
        launch(Page(models or [], device), host=host, port=port, browser=browser)
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demonstration.")] = Path("demo"),
    kimg: Annotated[float | None, typer.Option(help="Thousands of images to train on.")] = None,
    seed: Annotated[int, typer.Option(help="Of training.", min=0)] = 0,
) -> None:
    """Train on small digits for a few minutes (2 CPU cores), draw samples, show noise turn into images, time it."""
    from spigan.images import display_scale, make_grid, save_png
    from spigan.ops import BackendUnavailable
    from spigan.presets import preset
    from spigan.sampling import Sampler
    from spigan.sampling.sampler import count_evaluations
    from spigan.training.run_folder import next_run_dir
    from spigan.training.trainer import Trainer

    try:
        config = preset("digits", seed=seed, **({} if kimg is None else {"total_kimg": kimg}))
    except ValueError as error:
        _fail(error)
    run_dir = next_run_dir(out)
    typer.echo(
        f"Training on 1,797 handwritten digits (16x16, bundled with scikit-learn) for {config.total_kimg:g} kimg ..."
    )
    try:
        trainer = Trainer(config, run_dir)
        model = trainer.fit()
    except (ValueError, OSError, FloatingPointError, BackendUnavailable) as error:
        _fail(error)
    if trainer.interrupted:
        raise typer.Exit(130)
    scale = display_scale(config.model.resolution)
    grid = save_png(
        make_grid(Sampler(model, output="uint8")(range(64), to="cpu"), columns=8, scale=scale), run_dir / "samples.png"
    )
    times = [i / 8 for i in range(9)]
    rows = Sampler(model, t=times, output="uint8")(range(4), to="cpu").transpose(0, 1)
    strip = save_png(make_grid(rows.flatten(0, 1), columns=len(times), scale=scale), run_dir / "strip.png")
    typer.echo(f"Samples:              {grid}")
    typer.echo(f"h(0) to h(1), Fig. 9: {strip}")

    sampler = Sampler(model, batch_size=100, output="uint8")
    with count_evaluations(model) as evaluations:
        sampler(range(100))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        sampler(range(100), to="cpu")
        seconds.append(time.perf_counter() - began)
    typer.echo(
        f"100 images: NFE = {evaluations[0] / 100:g}, {statistics.median(seconds[1:]) * 1000:.1f} ms on "
        f"{trainer.device} (median of 5, first call left out)"
    )
    typer.echo(f"More images: spigan sample --model {run_dir} -n 100 --out digits.png")


data_app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prepare and check images to train on.",
)
app.add_typer(data_app, name="data")

_Source = Annotated[str, typer.Argument(metavar="SOURCE", help="Any source that `spigan train --data` takes.")]
_Split = Annotated[str, typer.Option(help="Part of the source.")]
_Column = Annotated[str | None, typer.Option(help="Column (parquet, hub) or extension (tar) of the images.")]
_Channels = Annotated[int, typer.Option(help="3: RGB, or 1: grey.")]
_Crop = Annotated[str, typer.Option(help="center: the largest centred square. none: images must be square.")]
_Resize = Annotated[str, typer.Option(help="lanczos, bicubic, bilinear, box or nearest.")]
_Workers = Annotated[int | None, typer.Option(help="Processes (default: one for each CPU core).", min=0)]


@data_app.command("convert")
def data_convert(
    source: _Source,
    out: Annotated[Path, typer.Option(help="Folder of the parquet files.", show_default=False)],
    resolution: Annotated[int, typer.Option(help="Side of the images in pixels.", min=1, show_default=False)],
    split: _Split = "train",
    column: _Column = None,
    channels: _Channels = 3,
    crop: _Crop = "center",
    resize: _Resize = "lanczos",
    fmt: Annotated[str, typer.Option("--format", help="png (lossless), webp or jpeg.")] = "png",
    quality: Annotated[int | None, typer.Option(help="Of webp and jpeg, 1 to 100 (default: 95).")] = None,
    shard_size: Annotated[int, typer.Option(help="Images in a file.", min=1)] = 4096,
    workers: _Workers = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken images out.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Crop and resize images once, to parquet files: `spigan train --data OUT`.

    After Ctrl-C or a kill the same command goes on; finished files are kept. Broken images end it with status 1, after
    all files without them are written, unless --skip-broken.
    """
    from spigan.data.convert import convert

    if fmt not in ("png", "webp", "jpeg"):
        _fail(f"--format must be png, webp or jpeg, got {fmt}")
    try:
        config = _data_config(source, split, column, channels, crop, resize, resolution)
        result = convert(
            config,
            out,
            image_format=fmt,  # type: ignore[arg-type]  # checked above
            quality=quality,
            shard_size=shard_size,
            workers=workers,
            skip_broken=skip_broken,
            progress=not quiet,
        )
    except (ValueError, OSError, ImportError, RuntimeError) as error:  # RuntimeError: a worker was killed
        _fail(error)
    _list_broken(result["broken"])
    size, rate = sum(file["bytes"] for file in result["files"]) / 1e6, result["converted"] / result["seconds"]
    typer.echo(
        f"{out}: {result['images']} images of {resolution} x {resolution} in {len(result['files'])} files, {size:.1f} "
        f"MB; {result['converted']} converted now, {rate:.0f} images/s; {len(result['broken'])} broken"
    )
    if not result["complete"]:
        _fail("files with broken images in them were not written: repair the images, or run again with --skip-broken")
    if not result["images"]:
        _fail("no image is left")


@data_app.command("check")
def data_check(
    source: _Source,
    split: _Split = "train",
    column: _Column = None,
    channels: _Channels = 3,
    crop: _Crop = "center",
    resize: _Resize = "lanczos",
    resolution: Annotated[
        int | None, typer.Option(help="Also crop and resize, as training at this resolution would.", min=1)
    ] = None,
    workers: _Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Decode every image and report counts, sizes, modes, broken images, duplicates and speed.

    Ends with status 1 where an image is broken.
    """
    from spigan.data.check import check

    try:
        config = _data_config(source, split, column, channels, crop, resize, resolution)
        report = check(config, workers=workers, progress=not quiet)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        _fail(error)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _list_broken(report["broken"])
        duplicates = report["duplicates"]
        for name in ("sizes", "modes", "formats"):
            counts = [f"{key} ({count})" for key, count in report[name].items()]
            typer.echo(f"{name + ':':<12}{', '.join(counts[:8])}{', ...' if len(counts) > 8 else ''}")
        if report["width"]:
            ranges = " x ".join("{}..{}".format(*report[side]) for side in ("width", "height"))
            typer.echo(f"{'range:':<12}{ranges}")
        typer.echo(f"{'duplicates:':<12}{duplicates['images']} in {duplicates['groups']} groups of equal pixels")
        for group in duplicates["examples"]:
            typer.echo(f"{'':<12}{' = '.join(group)}")
        core = report["images_per_second_core"]
        typer.echo(
            f"{'speed:':<12}{report['images_per_second']:.0f} images/s by {report['workers']} workers"
            + (f"; a core decodes {core:.0f} images/s" if core else "")
        )
        typer.echo(f"{'images:':<12}{report['images']}, {len(report['broken'])} broken")
    if report["broken"]:
        raise typer.Exit(1)


def _data_config(
    source: str, split: str, column: str | None, channels: int, crop: str, resize: str, resolution: int | None
) -> DataConfig:
    from spigan.data import DataConfig

    return DataConfig.model_validate(
        {
            "source": source, "split": split, "column": column, "channels": channels, "crop": crop, "resize": resize,
            "resolution": resolution,
        }
    )  # fmt: skip


def _list_broken(broken: list[dict[str, Any]]) -> None:
    for row in broken[:20]:
        typer.secho(f"broken: {row['error']}", fg=typer.colors.YELLOW, err=True)
    if len(broken) > 20:
        typer.secho(f"broken: {len(broken) - 20} more", fg=typer.colors.YELLOW, err=True)


bench_app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(help="A run folder, a saved model or a hub id (default: random weights of --preset)."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Whose network, where no model is given.")] = "cifar10",
    n: Annotated[int, typer.Option("-n", help="Number of images.", min=1)] = 100,
    batch: Annotated[int | None, typer.Option(help="Images at a time (default: n, or by resolution).", min=1)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    backend: Annotated[str | None, typer.Option(help="auto, reference, cpp, triton, cuda.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one call to this JSON file.")] = None,
) -> None:
    """Time images on this machine, and say where the time goes.

    The comparison with other models is the benchmark suite of the repository: pytest benchmarks/ --benchmark-only.
    """
    if context.invoked_subcommand is not None:
        return
    import torch

    from spigan import bench as benchmark
    from spigan.models import SPIGAN
    from spigan.models.load import resolve_device
    from spigan.ops import BackendUnavailable
    from spigan.presets import preset_fields
    from spigan.sampling import Sampler
    from spigan.sampling.sampler import default_batch_size

    try:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be float32, bfloat16 or float16, got {dtype}")
        network: Any = model
        if model is None:
            from spigan.config import ModelConfig

            torch.manual_seed(0)
            config = ModelConfig.model_validate(preset_fields(preset)["model"])
            network = SPIGAN(config).eval().requires_grad_(False).to(resolve_device(device))
        options: dict[str, Any] = {
            "dtype": getattr(torch, dtype), "backend": backend, "device": None if device == "auto" else device,
            "output": "uint8",
        }  # fmt: skip
        sampler = Sampler(network, **options)
        sampler.batch_size = batch or min(n, default_batch_size(sampler.model.config.resolution))
        times = benchmark.time_sampler(sampler, n)
        if profile is not None:
            eager = Sampler(sampler.model, batch_size=sampler.batch_size, cuda_graph=False, **options)
            benchmark.profile_sampler(eager, n, profile)
    except (ValueError, OSError, ImportError, BackendUnavailable) as error:
        _fail(error)
    resolution = sampler.model.config.resolution
    size = f"{n} images of {resolution} x {resolution}, {dtype}, {sampler.batch_size} at a time, NFE = 1"
    rate = n / times["total"]
    typer.echo(f"{size}, on {sampler.device}: {1e3 * times['total']:.4g} ms, {rate:.4g} images/s (median of 7)")
    typer.echo(f"  first call: {1e3 * times['first']:.4g} ms")
    for stage in ("noise", "mapping", "synthesis", "convert"):
        typer.echo(f"  {stage + ' of a batch:':<20}{1e3 * times[stage]:10.4g} ms")
    if profile is not None:
        typer.echo(f"Trace: {profile} (open it in chrome://tracing or ui.perfetto.dev)")


@bench_app.command("report")
def bench_report(
    runs: Annotated[list[Path], typer.Argument(help="JSON of pytest benchmarks/ --benchmark-only --benchmark-json.")],
    out: Annotated[Path, typer.Option(help="Folder of the tables.")] = Path("benchmarks/results"),
) -> None:
    """Turn a run of the benchmark suite into tables, a plot and compact JSON, named by the device."""
    from spigan.bench import write_report

    try:
        paths = write_report(runs, out)
    except (ValueError, OSError, ImportError) as error:
        _fail(error)
    for path in paths:
        typer.echo(path)


def main() -> None:
    """Entry point of the `spigan` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
