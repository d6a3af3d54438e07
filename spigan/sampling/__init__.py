"""Sampling images from a model: `sample` for a few images, `Sampler` for many (section 3.6 of the paper)."""

from spigan.models.grid import default_batch_size
from spigan.models.load import BUNDLED_MODELS, Model, load_model, resolve_device
from spigan.sampling.sample import count_evaluations, sample
from spigan.sampling.sampler import Sampler
from spigan.sampling.seeds import resolve_seeds

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
