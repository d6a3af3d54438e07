"""The networks: mapping, generator, discriminator, and the model made of the first two."""

from spigan.models.discriminator import Discriminator
from spigan.models.generator import Generator
from spigan.models.mapping import MLPMapping, ODEMapping
from spigan.models.spigan import SPIGAN

__all__ = ["SPIGAN", "Discriminator", "Generator", "MLPMapping", "ODEMapping"]
