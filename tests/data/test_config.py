"""DataConfig: what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from spigan.data import DataConfig


@pytest.mark.parametrize(
    "options", [{"resolution": 0}, {"channels": 4}, {"resize": "area"}, {"source": ""}, {"size": 3}, {"crop": None}]
)
def test_config_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        DataConfig(**{"source": "digits", **options})


def test_config_fields_are_described() -> None:
    assert all(field.description for field in DataConfig.model_fields.values())
