"""Models by name, folder, run and hub id; devices by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import spigan
from spigan import SPIGAN, ModelConfig
from spigan.models.load import load_model, resolve_device
from spigan.models.pretrained import weights_sha256

TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}


def make() -> SPIGAN:
    torch.manual_seed(0)
    return SPIGAN(ModelConfig.model_validate(TINY)).eval()


def pt(*args: Any, **options: Any) -> Tensor:
    result = spigan.sample(*args, **options)
    assert isinstance(result, Tensor)
    return result


def test_model_by_folder(tmp_path: Path) -> None:
    model = make()
    images = pt(9, model=model)
    model.save_pretrained(tmp_path / "run" / "model")
    for path in (tmp_path / "run" / "model", str(tmp_path / "run" / "model"), tmp_path / "run", str(tmp_path / "run")):
        assert torch.equal(pt(9, model=path, device="cpu"), images)


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a saved spigan model"):
        spigan.sample(1, model=tmp_path)


def test_hub_id_reaches_from_pretrained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = make()
    monkeypatch.chdir(tmp_path)
    asked = []

    def from_pretrained(name: str, device: torch.device) -> SPIGAN:
        asked.append((name, device))
        return model

    monkeypatch.setattr(SPIGAN, "from_pretrained", from_pretrained)
    assert load_model("user/name", "cpu") is model
    assert asked == [("user/name", torch.device("cpu"))]


def test_a_model_is_used_where_it_is() -> None:
    model = make()
    assert load_model(model) is model
    assert load_model(model, "cpu") is model
    elsewhere = load_model(model, "meta")
    assert elsewhere is not model
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert elsewhere.config == model.config and not elsewhere.training
    assert load_model(elsewhere) is elsewhere


def test_resolve_device() -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device().type == resolve_device("auto").type == here
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_bundled_model() -> None:
    """`spigan.sample()` works right after install, without network: digits, which look like the data they come from."""
    config = load_model(device="cpu").config
    assert config.z_shape == (1, 16, 16)
    images = pt(64, device="cpu")
    assert images.shape == (64, 1, 16, 16)
    assert torch.equal(pt(64, device="cpu"), images)
    # Bright strokes on black, no two alike.
    assert images.amax(dim=(1, 2, 3)).min() > 0.7
    assert images[:, :, :, 0].mean() < 0.1
    assert 0.1 < images.mean() < 0.5
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(64)
    assert distances.min() > 0.5


def test_bundled_models_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    assert load_model(None, "cpu") is load_model("digits", "cpu")  # loaded once
    images = pt(8, model="cifar10-small", device="cpu")
    assert images.shape == (8, 3, 32, 32) and images.dtype == torch.float32
    assert torch.equal(pt(8, model="cifar10-small", device="cpu"), images)
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 100 * torch.eye(8)
    assert distances.min() > 5  # every seed another image; white noise over the whole range is 22.6 apart
    # Photographs are smooth, in colour, and neither dark nor bright throughout.
    assert (images[..., 1:] - images[..., :-1]).abs().mean() < 0.1
    assert (images[:, 0] - images[:, 2]).abs().mean() > 0.01
    assert 0.3 < images.mean() < 0.7 and images.std() > 0.15


def test_card_of_a_bundled_model_is_of_its_weights() -> None:
    """Who replaces the weights has to measure them again."""
    folder = Path(spigan.__file__).parent / "assets" / "cifar10-small"
    assert (folder / "model.safetensors").stat().st_size < 10e6
    model = load_model("cifar10-small", "cpu")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert weights_sha256(model) in text
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in text


def test_a_folder_with_a_bundled_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is the bundled model whatever the working directory holds; ./name and a Path are the folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_model("./digits", "cpu")
    model = make()
    model.save_pretrained("digits")
    assert load_model("digits", "cpu").config.resolution == 16
    for folder in ("./digits", Path("digits"), str(tmp_path / "digits")):
        assert load_model(folder, "cpu").config == model.config
    with pytest.raises(FileNotFoundError, match=r"'digit' is neither .* nor a bundled model \(digits, cifar10-small\)"):
        load_model("digit", "cpu")
