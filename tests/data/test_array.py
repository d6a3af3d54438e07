"""scikit-learn's digits, and the resize filters on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_helpers import chw, everything, open_source
from PIL import Image


def test_digits() -> None:
    from sklearn.datasets import load_digits

    dataset = open_source("digits")
    assert (dataset.name, len(dataset), dataset.channels, dataset.resolution, dataset.cached) == (
        "digits",
        1797,
        1,
        8,
        True,
    )
    expected = np.floor(load_digits().images * 255 / 16 + 0.5)
    images = everything(dataset)
    assert images.dtype == torch.uint8
    assert images.shape == (1797, 1, 8, 8)
    np.testing.assert_array_equal(images[:, 0].numpy(), expected)
    assert dataset.description["native_width"] == [8, 8]

    with pytest.raises(ValueError, match="digits has no split 'test'"):
        open_source("digits", split="test")


@pytest.mark.parametrize("resize", ["lanczos", "bicubic", "bilinear", "box", "nearest"])
def test_resize_filter_is_used_and_recorded(resize: str) -> None:
    native, dataset = open_source("digits"), open_source("digits", resolution=16, resize=resize)
    assert dataset.resolution == 16
    assert dataset.description["resize"] == resize
    expected = Image.fromarray(native[5][0].numpy()).resize((16, 16), Image.Resampling[resize.upper()])
    assert torch.equal(dataset[5], chw(expected))


def test_resize_filters_differ() -> None:
    prints = {
        open_source("digits", resolution=16, resize=name).fingerprint for name in ("lanczos", "bicubic", "bilinear")
    }
    assert len(prints) == 3
