"""`spigan export` and `spigan push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spigan.cli.options import Model, one_of


def export(
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    model: Model = None,
    fmt: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="onnx (needs the extra `export`), or pt2 for PyTorch (default: inferred from --out).",
            callback=one_of("--format", ("onnx", "pt2")),
        ),
    ] = None,
    t: Annotated[float, typer.Option(help="Time on the straight path. 1 gives the clean image.")] = 1.0,
    batch: Annotated[int | None, typer.Option(help="Fix the batch size (default: any size).", min=1)] = None,
) -> None:
    """Export a model to one file that runs without spigan.

    The exported model maps standard normal z to images in [0, 1], both float32. The images are those that
    `spigan sample` makes from the same z.

    \b
    Examples:
      spigan export --out digits.onnx
      spigan export --model runs/00000 --out model.pt2 --batch 16
    """
    from spigan.models.load import load_model
    from spigan.sampling.export import export_model, format_of

    fmt = format_of(out) if fmt is None else fmt
    network = load_model(model, "cpu")
    export_model(network, out, format=fmt, t=t, batch_size=batch)
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


def push(
    model: Annotated[str, typer.Argument(help="A run folder, its model/ or best/ folder, or a saved model.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hugging Face hub: user/name.")],
    metrics: Annotated[
        Path | None,
        typer.Option(help="JSON file from `spigan evaluate --out` (default: the run's metrics of these weights)."),
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the weights, as the hub names it, such as cc-by-4.0.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Visibility of a new repository (default: the hub's).")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to push to, created if missing (default: main).")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Push model using spigan.",
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request instead of committing.")
    ] = False,
    local: Annotated[
        Path | None, typer.Option(help="Write the files to this new or empty folder, and do not upload them.")
    ] = None,
) -> None:
    """Upload a model to the Hugging Face hub.

    Uploads the averaged weights and a model card with the configuration, data, training, metrics and samples. Does not
    upload the discriminator, the optimisers or the checkpoints. Log in first with `hf auth login`.

    \b
    Examples:
      spigan push runs/00000 user/name --license mit
      spigan push runs/00000/best user/name --private --pull-request
      spigan push runs/00000 user/name --local preview
    """
    from spigan.models import hub
    from spigan.models.load import load_model
    from spigan.runs import run_of

    if not Path(model).is_dir():
        raise FileNotFoundError(f"{model} is not a folder; expected a run folder or a saved model")
    network = load_model(Path(model))
    about: dict[str, Any] = {"run": run_of(model), "metrics": metrics, "license": license}
    if local is not None:
        folder = hub.write_folder(network, local, repo, **about)
        typer.echo(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}; nothing was uploaded")
        return
    where: dict[str, Any] = {"branch": branch, "commit_message": message, "create_pr": pull_request}
    typer.echo(network.push_to_hub(repo, **about, private=private, **where))
