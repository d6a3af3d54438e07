"""Sampling images from a model: `sample` for a few images, `Sampler` for many (section 3.6 of the paper)."""

from spigan.models.grid import default_batch_size
from spigan.models.load import load_model
from spigan.sampling.sample import count_evaluations, sample
from spigan.sampling.sampler import Sampler
from spigan.sampling.seeds import resolve_seeds

__all__ = [
    "Sampler",
    "count_evaluations",
    "default_batch_size",
    "load_model",
    "resolve_seeds",
    "sample",
]
