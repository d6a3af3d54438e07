"""Models for others: the folder that is pushed to the Hugging Face hub, and its model card.

What is pushed: config.json, model.safetensors (the averaged weights), samples.png and README.md, the card. Never the
discriminator, an optimiser's state or a checkpoint, and of local paths no more than the last part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from spigan.files import read_json, shorten
from spigan.images import display_scale, make_grid, save_png

if TYPE_CHECKING:
    from spigan.models import SPIGAN

CARD_NAME = "README.md"
SAMPLES_NAME = "samples.png"

_TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
_TASK = "unconditional-image-generation"
_DATA = {"source", "split", "count", "resolution", "channels", "resize", "crop", "xflip", "fingerprint"}
# Of a run's configuration: where and how it ran, which is nobody's business and may name local files.
_PRIVATE = {"device", "metric_features", "metric_samples", "metric_ticks"}


def push_to_hub(
    model: SPIGAN,
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
    """Upload a model with its card in one commit; see `spigan.SPIGAN.push_to_hub`."""
    if create_pr and branch is not None:
        raise ValueError(f"a pull request is against the main branch: leave out create_pr or the branch {branch!r}")
    fields = describe(model, run=run, metrics=metrics, license=license)  # what is wrong with it is told first
    api = HfApi(token=token)
    with TemporaryDirectory() as scratch, connection():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if branch is not None:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        _write(model, Path(scratch), repo_id, fields)
        # Not upload_folder, which may make several commits: config.json and weights must change together.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, file) for file in sorted(Path(scratch).iterdir())],
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


@contextmanager
def connection() -> Iterator[None]:
    """A connection to the hub that fails inside the block raises OSError, which those of HTTP libraries are not."""
    try:
        yield
    except Exception as error:
        # By name: huggingface_hub talks by httpx or httpx2, which are no dependencies of ours.
        if isinstance(error, OSError) or not type(error).__module__.startswith("httpx"):
            raise
        raise OSError(f"the hub cannot be reached: {error or type(error).__name__}") from error


def write_folder(
    model: SPIGAN,
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
        folder: new or empty.
        repo_id: name on the hub, which the card tells how to use.
        run, metrics, license: as in `spigan.SPIGAN.push_to_hub`.

    Raises:
        FileExistsError: the folder is not empty.
        FileNotFoundError, ValueError: as in `spigan.SPIGAN.push_to_hub`, or a name that the hub does not take.
    """
    validate_repo_id(repo_id)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: give a new or empty folder")
    _write(model, folder, repo_id, describe(model, run=run, metrics=metrics, license=license))
    return folder


def _write(model: SPIGAN, folder: Path, repo_id: str, fields: dict[str, Any]) -> None:
    from spigan.sampling import Sampler

    resolution = model.config.resolution
    side = 8 if resolution <= 64 else 4
    images = Sampler(model, output="uint8")(range(side**2), to="cpu")
    save_png(make_grid(images, columns=side, scale=display_scale(resolution)), folder / SAMPLES_NAME)
    model.save_pretrained(folder)
    card(model, repo_id, **fields, samples=side**2).save(folder / CARD_NAME)


def card(
    model: SPIGAN,
    repo_id: str | None = None,
    *,
    data: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    license: str | None = None,
    samples: int = 0,
) -> ModelCard:
    """The model card.

    Args:
        model: the model.
        repo_id: name on the hub, or where else the model can be found.
        data, training, metrics, license: of `describe`.
        samples: how many images samples.png shows; 0: there is none.
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
        licence=license or "Whoever trained the model has stated none. The code of spigan is under Apache-2.0.",
        samples=samples,
    )


def describe(
    model: SPIGAN,
    *,
    run: str | Path | None = None,
    metrics: str | Path | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """What a card tells of data, training and metrics.

    Args:
        model: the model.
        run: folder of the training run.
        metrics: JSON of `spigan evaluate --out`; default: those of the run's best/, where its weights are the model's.
        license: as the hub writes it, such as "cc-by-4.0".

    Returns:
        Arguments for `card`.

    Raises:
        FileNotFoundError: no such run, or no such file.
        ValueError: the run's files are damaged, the run made a model of another architecture, or the metrics are those
            of other weights.
    """
    from spigan.runs import read_config, read_rows

    fields: dict[str, Any] = {"license": license}
    best = None
    if run is not None:
        run = Path(run)
        config = read_config(run)
        if config.model != model.config:
            raise ValueError(f"{run} trained a model of another architecture than the one to push")
        best = _best(run, model)
        rows = read_rows(run / "stats.jsonl", "iteration", "kimg", "seconds")
        stats = [row for row in rows if best is None or row["iteration"] <= best["iteration"]]
        settings = config.model_dump(exclude=_PRIVATE)
        settings["data"]["source"] = _public(config.data.source)
        data = fields["data"] = read_json(run / "data.json")
        if missing := _DATA - data.keys():
            raise ValueError(f"{run / 'data.json'} lacks {', '.join(sorted(missing))}")
        data["source"] = _public(str(data["source"]))
        training = fields["training"] = {"config": settings}
        if stats:  # none before the first tick
            training |= {"kimg": float(stats[-1]["kimg"]), "hours": stats[-1]["seconds"] / 3600}
    if metrics is not None:
        fields["metrics"] = _evaluated(Path(metrics), model)
    elif best is not None:
        values = {key: value for key, value in best.items() if key not in ("metric", "value", "iteration", "kimg")}
        note = f"Measured during training at {best['kimg']:g} kimg, on the training images; the lowest "
        note += f"{best['metric']} of the run."
        fields["metrics"] = {"values": values, "note": note, "reference": (data["source"], data["split"])}
    return fields


def _best(run: Path, model: SPIGAN) -> dict[str, Any] | None:
    """The record of the run's best model, where `model` has its weights."""
    from spigan.models import SPIGAN
    from spigan.models.pretrained import weights_sha256
    from spigan.runs import read_best

    record = read_best(run)
    if record is None or weights_sha256(SPIGAN.from_pretrained(run / "best")) != weights_sha256(model):
        return None
    return record


def _evaluated(path: Path, model: SPIGAN) -> dict[str, Any]:
    """Metrics that `spigan evaluate` wrote."""
    from spigan.models.pretrained import weights_sha256

    result = read_json(path)
    try:
        sha, values, samples = result["model"]["sha256"], dict(result["metrics"]), result["samples"]["count"]
        reference = _public(result["reference"]["source"]), result["reference"]["split"]
        note = f"{samples:,} samples against {result['reference']['count']:,} images of {', '.join(reference)}, by the "
        note += f"features of {result['features']['name']}; measured by spigan evaluate, {result['date']}."
        values = {**values, "NFE": result["nfe"]}
        if wrong := [name for name, value in values.items() if not isinstance(value, (int, float))]:
            raise ValueError(f"{shorten(wrong[0])} is no number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what `spigan evaluate --out` writes: {type(error).__name__} {error}"
        ) from error
    if sha != weights_sha256(model):
        raise ValueError(f"{path} holds metrics of other weights than those of the model: evaluate this model")
    return {"values": values, "note": note, "reference": reference}


def _public(source: str) -> str:
    """A data source without the folders that it lies in; names and hub ids as they are."""
    path = Path(source)
    if source.count("/") <= 1 and not path.is_absolute() and source[:1] not in "~." and not path.exists():
        return source
    return path.resolve().name
