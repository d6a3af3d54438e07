"""Models saved and loaded; files that are damaged, missing, or do not fit."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from spigan import SPIGAN, ModelConfig
from spigan.models import pretrained

TINY = {"resolution": 8, "img_channels": 1, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
FILES = {"config.json", "model.safetensors", "README.md"}


def make(seed: int = 0, **changes: Any) -> SPIGAN:
    torch.manual_seed(seed)
    return SPIGAN(ModelConfig.model_validate(TINY | changes)).eval()


def noise(model: SPIGAN, n: int = 3) -> Tensor:
    return torch.randn(n, *model.config.z_shape, generator=torch.Generator().manual_seed(8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model that a test may damage."""
    make().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("changes", [{}, {"mapping": "mlp"}, {"conv_clamp": 256.0, "ode_solver": "euler"}])
def test_round_trip_to_the_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = make(**changes).train()
    assert model.save_pretrained(tmp_path / "new" / "folder") is None
    loaded = SPIGAN.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    z = noise(model)
    assert torch.equal(loaded(z), model.eval()(z))
    assert torch.equal(SPIGAN.from_pretrained(str(tmp_path / "new" / "folder"))(z), model(z))


def test_folder_content(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert config == make().config.model_dump() and config.items() >= TINY.items()
    state = load_file(folder / "model.safetensors")
    assert state.keys() == make().state_dict().keys()
    assert {name.split(".")[0] for name in state} == {"mapping", "generator"}


def test_model_card(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()  # type: ignore[union-attr]
    assert "library_name: spigan" in head and "pipeline_tag: unconditional-image-generation" in head
    assert "8x8 grey" in body and "spigan.sample(" in body
    assert "More Information Needed" not in card and "{{" not in card


def test_files_get_the_permissions_of_new_files(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        make().save_pretrained(tmp_path / "model")
    finally:
        os.umask(old)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(FILES, 0o640)


def test_saving_again_replaces_the_weights_and_keeps_the_readme(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    other = make(seed=1, dim_h=8)
    other.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "README.md").read_text() == "mine"
    loaded = SPIGAN.from_pretrained(folder)
    assert torch.equal(loaded(noise(other)), other(noise(other)))


def test_failure_while_saving_leaves_the_old_files_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(pretrained, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        make(seed=1).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    z = noise(make())
    assert torch.equal(SPIGAN.from_pretrained(folder)(z), make()(z))


def test_weights_stored_in_bfloat16(folder: Path) -> None:
    path = folder / "model.safetensors"
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}
    save_file(stored, path)
    loaded = SPIGAN.from_pretrained(folder)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name


def test_loading_onto_a_device(folder: Path) -> None:
    assert next(SPIGAN.from_pretrained(folder).parameters()).device.type == "cpu"
    loaded = SPIGAN.from_pretrained(folder, device="meta")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    expected = f"{folder} is not a saved spigan model: it lacks {missing}"
    with pytest.raises(FileNotFoundError, match=re.escape(expected)):
        SPIGAN.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "../nothing", "/nothing/here", "~/model", "model", ""])
def test_neither_a_folder_nor_a_hub_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(pretrained, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match=r"neither an existing folder nor a hub id|is not a saved spigan model"):
        SPIGAN.from_pretrained(name)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights(folder: Path, length: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or not a safetensors file"):
        SPIGAN.from_pretrained(folder)


def test_weights_of_wrong_shape(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["mapping.bias"] = torch.zeros(3, 17)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"mapping\.bias has shape \[3, 17\], expected \[3, 16\]"):
        SPIGAN.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    state = load_file(folder / "model.safetensors")
    state["mapping.bias"][1, 2] = value
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds weights that are not finite: mapping\.bias"):
        SPIGAN.from_pretrained(folder)


def test_names_missing_and_unexpected(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["extra"] = state.pop("generator.b4.const")
    save_file(state, folder / "model.safetensors")
    expected = "does not fit the model's configuration: missing generator.b4.const; unexpected extra"
    with pytest.raises(ValueError, match=re.escape(expected)):
        SPIGAN.from_pretrained(folder)


def test_many_problems_are_counted(folder: Path) -> None:
    save_file({"extra": torch.zeros(1)}, folder / "model.safetensors")
    count = len(make().state_dict()) + 1
    with pytest.raises(ValueError, match=f"; missing .* and {count - 5} more$"):
        SPIGAN.from_pretrained(folder)


def test_weights_that_do_not_fit_leave_the_module_alone(folder: Path) -> None:
    model = make(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = load_file(folder / "model.safetensors")
    del state["mapping.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing mapping\.bias"):
        pretrained.load_weights(model, folder / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_load_weights_with_a_prefix(tmp_path: Path) -> None:
    model, other = make(), make(seed=1)
    state = {f"ema.{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(state | {"step": torch.zeros(1)}, tmp_path / "all.safetensors")
    pretrained.load_weights(other, tmp_path / "all.safetensors", prefix="ema.")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[8, 1]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object, got NoneType"),
        ('{"resolution": 9}', "resolution: Input should be 8, 16, 32"),
        ('{"dim_h": 0}', "dim_h: Input should be greater than or equal to 1, got 0"),
        ('{"colour": true}', "colour: there is no such field, got True"),
        ('{"ode_solver": "heun"}', "ode_solver: Input should be 'rk4', 'euler' or 'dopri5', got 'heun'"),
        ('{"dim_h": 0, "ode_steps": -1}', "dim_h: .*; ode_steps: "),
        ("\udcff", "codec can't decode"),
    ],
)
def test_wrong_config_file(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        ValueError, match=f"config.json is not the configuration of a spigan model: .*{message}"
    ) as caught:
        SPIGAN.from_pretrained(folder)
    assert "\n" not in str(caught.value)


class Bomb:
    """Unpickling it leaves a trace."""

    exploded = False

    def __reduce__(self) -> Any:
        return (_explode, ())


def _explode() -> None:
    Bomb.exploded = True


def test_never_unpickles(folder: Path) -> None:
    bomb = pickle.dumps(Bomb())
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(FileNotFoundError, match=r"it lacks model\.safetensors"):
        SPIGAN.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        SPIGAN.from_pretrained(folder)
    assert not Bomb.exploded
    pickle.loads(bomb)
    assert Bomb.exploded  # so the bomb works
