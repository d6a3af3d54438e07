"""The networks: mapping, generator, discriminator, and SPIGAN, which joins the first two."""

from spigan.models.discriminator import Discriminator
from spigan.models.generator import Generator
from spigan.models.mapping import MLPMapping, ODEMapping
from spigan.models.spigan import SPIGAN

__all__ = ["SPIGAN", "Discriminator", "Generator", "MLPMapping", "ODEMapping"]
