"""Publish models: write the folder that is pushed to the Hugging Face hub, with its model card.

A push uploads config.json, model.safetensors (the averaged weights), samples.png, and README.md (the card). It never
uploads the discriminator, optimiser states or checkpoints, and shows at most the last part of a local path.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from spigan.files import read_json, shorten
from spigan.images import grid_side, save_png
from spigan.models.grid import sample_grid
from spigan.models.pretrained import CARD_NAME, PretrainedModel, hub_connection, weights_sha256
from spigan.runs import read_best, read_config, read_rows

SAMPLES_NAME = "samples.png"

_TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
_TASK = "unconditional-image-generation"
_DATA = {"source", "split", "count", "resolution", "channels", "resize", "crop", "xflip", "fingerprint"}
# Fields of a run's configuration that describe where and how it ran. They are private and may name local files.
_PRIVATE = {"device", "metric_features", "metric_samples", "metric_ticks"}


def push_to_hub(
    model: PretrainedModel,
    repo_id: str,
    *,
    run: str | Path | None = None,
    metrics: str | Path | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str = "Push model using spigan.",
    create_pr: bool = False,
) -> str:
    """Upload a model and its card in one commit; see `spigan.SPIGAN.push_to_hub`."""
    if create_pr and branch is not None:
        raise ValueError(f"a pull request targets the main branch: leave out create_pr or the branch {branch!r}")
    fields = describe(model, run=run, metrics=metrics, license=license)  # before anything is created on the hub
    api = HfApi(token=token)
    with TemporaryDirectory() as scratch, hub_connection():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        _write(model, Path(scratch), repo_id, fields)
        # Not upload_folder, which may make several commits: config.json and the weights must change together.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in sorted(Path(scratch).iterdir())],
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def write_folder(
    model: PretrainedModel,
    folder: str | Path,
    repo_id: str,
    *,
    run: str | Path | None = None,
    metrics: str | Path | None = None,
    license: str | None = None,
) -> Path:
    """Write the folder that `push_to_hub` would upload.

    Args:
        model: the model.
        folder: a new or empty folder.
        repo_id: name on the hub, for the instructions in the card.
        run, metrics, license: as in `spigan.SPIGAN.push_to_hub`.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder is not empty.
        FileNotFoundError, ValueError: as for `spigan.SPIGAN.push_to_hub`, or if the hub does not allow the name.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: give a new or empty folder")
    _write(model, folder, repo_id, describe(model, run=run, metrics=metrics, license=license))
    return folder


def _write(model: PretrainedModel, folder: Path, repo_id: str, fields: dict[str, Any]) -> None:
    save_png(sample_grid(model), folder / SAMPLES_NAME)
    model.save_pretrained(folder)
    card(model, repo_id, **fields, samples=grid_side(model.config.resolution) ** 2).save(folder / CARD_NAME)


def card(
    model: PretrainedModel,
    repo_id: str | None = None,
    *,
    data: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    license: str | None = None,
    samples: int = 0,
) -> ModelCard:
    """Return the model card.

    Args:
        model: the model.
        repo_id: name on the hub, or another place where the model can be found.
        data, training, metrics, license: as returned by `describe`.
        samples: number of images in samples.png, or 0 if there is no such file.
    """
    config = model.config
    name = (repo_id or "spigan model").rpartition("/")[2]
    results = []
    if metrics is not None:
        source, split = metrics["reference"]
        where = {"dataset_name": source, "dataset_type": source, "dataset_split": split}
        results = [
            EvalResult(task_type=_TASK, metric_type=key.lower(), metric_name=key, metric_value=value, **where)
            for key, value in metrics["values"].items()
        ]
    front = ModelCardData(
        library_name="spigan",
        pipeline_tag=_TASK,
        tags=["spigan", "gan", _TASK],
        license=license,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        front,
        template_path=str(_TEMPLATE),
        name=name,
        repo_id=repo_id or "PATH-OR-HUB-ID",
        size=f"{config.resolution}x{config.resolution} {'grey' if config.img_channels == 1 else 'RGB'}",
        model=config,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        data=data,
        training=training,
        settings=json.dumps(training["config"], indent=2) if training else "",
        metrics=metrics,
        licence=license or "The author of the model has not stated a licence. The code of spigan is under Apache-2.0.",
        samples=samples,
    )


def describe(
    model: PretrainedModel,
    *,
    run: str | Path | None = None,
    metrics: str | Path | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """Collect the facts that a card shows about data, training and metrics.

    Args:
        model: the model.
        run: folder of the training run.
        metrics: JSON file written by `spigan evaluate --out`. Default: the metrics in the run's best/, if that holds
            the weights of the model.
        license: a licence, as the hub names it, such as "cc-by-4.0".

    Returns:
        Arguments for `card`.

    Raises:
        FileNotFoundError: if the run or one of its files does not exist.
        ValueError: if the run's files are damaged, the run trained a different architecture, or the metrics belong to
            other weights.
    """
    fields: dict[str, Any] = {"license": license}
    if run is not None:
        fields |= _describe_run(Path(run), model)
    if metrics is not None:
        fields["metrics"] = _evaluation(Path(metrics), model)
    return fields


def _describe_run(run: Path, model: PretrainedModel) -> dict[str, Any]:
    """Return the data and training of a run, and the metrics that it measured for the weights of `model`, if any."""
    config = read_config(run)
    if config.model != model.config:
        raise ValueError(f"{run} trained a model with a different architecture than the one to push")
    best = _best(run, model)
    rows = read_rows(run / "stats.jsonl", "iteration", "kimg", "seconds")
    stats = [row for row in rows if best is None or row["iteration"] <= best["iteration"]]
    settings = config.model_dump(exclude=_PRIVATE)
    settings["data"]["source"] = _public(config.data.source)
    data = read_json(run / "data.json")
    if missing := _DATA - data.keys():
        raise ValueError(f"{run / 'data.json'} lacks {', '.join(sorted(missing))}")
    data["source"] = _public(str(data["source"]))
    training: dict[str, Any] = {"config": settings}
    if stats:  # empty before the first tick
        training |= {"kimg": float(stats[-1]["kimg"]), "hours": stats[-1]["seconds"] / 3600}
    fields: dict[str, Any] = {"data": data, "training": training}
    if best is not None:
        values = {key: value for key, value in best.items() if key not in ("metric", "value", "iteration", "kimg")}
        note = f"Measured during training at {best['kimg']:g} kimg, on the training images. This was the lowest "
        note += f"{best['metric']} of the run."
        fields["metrics"] = {"values": values, "note": note, "reference": (data["source"], data["split"])}
    return fields


def _best(run: Path, model: PretrainedModel) -> dict[str, Any] | None:
    """Return the record of the run's best model if `model` has its weights, else None."""
    record = read_best(run)
    if record is None or weights_sha256(type(model).from_pretrained(run / "best")) != weights_sha256(model):
        return None
    return record


def _evaluation(path: Path, model: PretrainedModel) -> dict[str, Any]:
    """Return the metrics that `spigan evaluate` wrote."""
    result = read_json(path)
    try:
        sha, values, samples = result["model"]["sha256"], dict(result["metrics"]), result["samples"]["count"]
        reference = _public(result["reference"]["source"]), result["reference"]["split"]
        note = f"{samples:,} samples against {result['reference']['count']:,} images of {', '.join(reference)}, with "
        note += f"the features of {result['features']['name']}; measured by `spigan evaluate`, {result['date']}."
        values = {**values, "NFE": result["nfe"]}
        if wrong := [name for name, value in values.items() if not isinstance(value, (int, float))]:
            raise ValueError(f"{shorten(wrong[0])} is not a number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} was not written by `spigan evaluate --out`: {type(error).__name__} {error}"
        ) from error
    if sha != weights_sha256(model):
        raise ValueError(f"{path} holds metrics of other weights than the model's: evaluate this model")
    return {"values": values, "note": note, "reference": reference}


def _public(source: str) -> str:
    """Return a data source without its parent folders. Names and hub ids are returned unchanged."""
    path = Path(source)
    if source.count("/") <= 1 and not path.is_absolute() and source[:1] not in "~." and not path.exists():
        return source
    return path.resolve().name
