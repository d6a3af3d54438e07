"""`spigan evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spigan.cli.errors import warn
from spigan.cli.options import MODEL_HELP, Backend, Batch, Device, Dtype, FirstSeed, NoProgress, torch_dtype

if TYPE_CHECKING:
    from spigan.data import DataConfig

_REFERENCE = "Reference images"


def _check_features(value: str) -> str:
    """Catch misspelled names of known networks. Anything else may be the path of a network."""
    from spigan.choices import did_you_mean

    hint = did_you_mean(value, ("inception", "cifar10-resnet56=PATH", "digits", "pixels"))
    if (
        hint
        and value not in ("inception", "cifar10-resnet56", "digits", "pixels")
        and "=" not in value
        and not Path(value).exists()
    ):
        raise ValueError(f"--features must be a known network or an existing file, got {value}{hint}")
    return value


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help=MODEL_HELP, show_default=False),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Any source that `spigan train --data` accepts (default: the images that the run was trained on).",
            show_default=False,
            rich_help_panel=_REFERENCE,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            help="Column (parquet, hub) or file extension (tar) of the images (default: the only one, or the run's).",
            rich_help_panel=_REFERENCE,
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the source (default: train, or the run's).", rich_help_panel=_REFERENCE)
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            help="Convert the images to 1 (grey) or 3 (RGB) channels (default: as stored, or the run's).",
            rich_help_panel=_REFERENCE,
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="Resize filter: lanczos, bicubic, bilinear, box or nearest (default: lanczos, or the run's).",
            rich_help_panel=_REFERENCE,
        ),
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="Feature network: inception or inception=PATH (FID), cifar10-resnet56=PATH, digits, pixels, or a "
            "TorchScript file as PATH or NAME=PATH. A TorchScript file is a program: use only files you trust.",
            callback=_check_features,
        ),
    ] = "inception",
    samples: Annotated[int, typer.Option(help="Number of images to sample.", min=1)] = 50_000,
    seed: FirstSeed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Write the result, and everything it depends on, to this JSON file.")
    ] = None,
    batch: Batch = None,
    device: Device = None,
    dtype: Dtype = "float32",
    backend: Backend = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that caches reference statistics (default: $SPIGAN_CACHE, or ~/.cache/spigan)."),
    ] = None,
    quiet: NoProgress = False,
) -> None:
    """Measure the quality of a model's images.

    Computes FID (or another Frechet distance), KID, Inception Score, precision, recall and coverage, and measures the
    sampling speed. FID needs the Inception network of 2015-12-05. If it is missing, the error message tells you where
    to get it.

    \b
    Examples:
      spigan evaluate runs/00000 --out metrics.json
      spigan evaluate runs/00000 --features cifar10-resnet56=resnet56.safetensors
      spigan evaluate user/model --data photos.zip --samples 10000
    """
    changes = {"column": column, "split": split, "channels": channels, "resize": resize}
    reference = reference_config(model, data, changes)
    if out is not None and out.is_dir():
        raise ValueError(f"--out {out} is a folder; expected the path of a JSON file")
    options = {"features": features, "samples": samples, "seed": seed, "batch_size": batch, "device": device}
    options |= {"dtype": torch_dtype(dtype), "backend": backend, "cache_dir": cache, "progress": not quiet}
    _measure(model, reference, out, options)


def _measure(model: str | None, reference: DataConfig, out: Path | None, options: dict[str, Any]) -> None:
    import warnings

    from spigan.evaluation.evaluate import evaluate, table
    from spigan.files import write_text

    with warnings.catch_warnings():
        warnings.showwarning = lambda *_, **__: None  # the result contains them
        result = evaluate(model, data=reference, **options)
    if out is not None:
        write_text(out, json.dumps(result, indent=2) + "\n")
    for warning in result["warnings"]:
        warn(warning)
    typer.echo(table(result))
    if out is not None:
        typer.echo(f"Result with all settings: {out}")


def reference_config(model: str | None, data: str | None, changes: dict[str, Any]) -> DataConfig:
    """Return the configuration of the reference images of an evaluation.

    Args:
        model: the model's name or folder.
        data: source of the images. None selects the images that the bundled model or the run was trained on.
        changes: fields of `DataConfig` to replace; None keeps the field.

    Raises:
        ValueError: if `data` is None and `model` is not a training run.
    """
    from spigan.data import DataConfig
    from spigan.evaluation.reference import reference_of

    reference = DataConfig(source=data) if data is not None else reference_of(model)[0]
    given = {name: value for name, value in changes.items() if value is not None}
    return DataConfig.model_validate(reference.model_dump() | given)
