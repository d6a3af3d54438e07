"""The reference images of an evaluation: by default those that the model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spigan.data import DataConfig
from spigan.models.load import BUNDLED_MODELS
from spigan.presets import preset_fields
from spigan.runs import read_data, run_of

if TYPE_CHECKING:
    from spigan.models.load import Model

# Fields that may change while the images stay those of the run.
_FREE = {"resolution", "cache", "workers", "check"}


def reference_of(model: Model, data: DataConfig | None = None) -> tuple[DataConfig, dict[str, Any] | None]:
    """Return the reference images of a model, and what its run recorded about them.

    Args:
        model: the model, as for `spigan.sample`.
        data: the images. None: those that the run or the bundled model was trained on.

    Returns:
        The images, and the record of the run if they are its training images; see `spigan.data.dataset.data_record`.

    Raises:
        ValueError: if `data` is None and the model is neither a run nor bundled.
    """
    named = model is None or isinstance(model, (str, Path))
    if model is None or (isinstance(model, str) and model in BUNDLED_MODELS):
        own = DataConfig.model_validate(preset_fields(str(model or BUNDLED_MODELS[0]))["data"])
        return data or own, None
    run = run_of(model) if named else None  # type: ignore[arg-type]
    if run is None:
        if data is None:
            name = model if named else "the model"
            raise ValueError(f"{name} is not a training run, so its training images are unknown: pass --data")
        return data, None
    try:
        trained, record = read_data(run)
    except (OSError, ValueError):
        if data is None:
            raise
        return data, None  # a model without the files of its run
    if data is None:
        data = trained
    same = data.model_dump(exclude=_FREE) == trained.model_dump(exclude=_FREE)
    return data, record if same and record else None
