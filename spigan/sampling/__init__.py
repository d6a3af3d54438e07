"""Images from a model: `sample` for a few, `Sampler` for many (the paper's section 3.6)."""

from spigan.models.load import BUNDLED_MODELS, Model, load_model, resolve_device
from spigan.sampling.sampler import Sampler, count_evaluations, default_batch_size, resolve_seeds, sample

__all__ = [
    "BUNDLED_MODELS",
    "Model",
    "Sampler",
    "count_evaluations",
    "default_batch_size",
    "load_model",
    "resolve_device",
    "resolve_seeds",
    "sample",
]
