"""Exported models: what onnxruntime and a PyTorch without spigan make of them, against the model itself."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import spigan
from spigan import SPIGAN, ModelConfig
from spigan.models.load import load_model
from spigan.sampling.export import FORMATS, METADATA, export_model

TINY = {"resolution": 8, "img_channels": 3, "dim_h": 16, "embed_channels": 4, "channel_base": 64, "channel_max": 8}
MODELS: dict[str, dict[str, Any] | None] = {
    "digits": None,
    "ode": TINY | {"conv_clamp": 256.0},
    "mlp": TINY | {"mapping": "mlp", "resolution": 16},
}

# In float32 a digit is off by up to 3e-6 from float64, whether the model or one of the programs makes it (1000 digits,
# AVX-512), so that two of them are up to 6e-6 apart. 1e-5 is a 400th of one of 255 levels.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def make(**changes: Any) -> SPIGAN:
    """A small RGB model with noise, whose strength is zero before training."""
    torch.manual_seed(1)
    model = SPIGAN(ModelConfig.model_validate(TINY | changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.1)
    return model


def noise(model: SPIGAN, n: int) -> Tensor:
    return torch.randn(n, *model.config.z_shape, generator=torch.Generator().manual_seed(n))


def images(model: SPIGAN, z: Tensor, t: float = 1.0) -> Tensor:
    """[N, C, H, W] in [0, 1], by the model itself."""
    result = spigan.sample(model=model, z=z, t=t, device="cpu")
    assert isinstance(result, Tensor)
    return result


def run_onnx(path: Path, z: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["images"], {"z": z.numpy()})[0])


def run_pt2(path: Path, z: Tensor) -> Tensor:
    result = torch.export.load(path).module()(z)
    assert isinstance(result, Tensor)
    return result


RUN: dict[str, Callable[[Path, Tensor], Tensor]] = {"onnx": run_onnx, "pt2": run_pt2}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> SPIGAN:
    changes = MODELS[request.param]
    return load_model(None, "cpu") if changes is None else make(**changes)


@pytest.fixture(scope="module", params=FORMATS)
def exported(request: pytest.FixtureRequest, model: SPIGAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported `model`; the suffix tells the format."""
    path = tmp_path_factory.mktemp("exported") / f"model.{request.param}"
    assert export_model(model, path) == path
    return path


def format_of(path: Path) -> str:
    return path.suffix[1:]


# ---- What a file computes ----


@pytest.mark.parametrize("n", [1, 3, 5])
def test_makes_the_models_images(model: SPIGAN, exported: Path, n: int) -> None:
    z = noise(model, n)
    expected = images(model, z)
    actual = RUN[format_of(exported)](exported, z)
    assert actual.dtype == torch.float32 and not actual.requires_grad
    torch.testing.assert_close(actual, expected, **CLOSE)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1  # where nothing is clamped, errors show


def test_metadata(model: SPIGAN, exported: Path) -> None:
    if format_of(exported) == "onnx":
        text = onnxruntime.InferenceSession(exported).get_modelmeta().custom_metadata_map[METADATA]
    else:
        files = {METADATA: ""}
        torch.export.load(exported, extra_files=files)
        text = files[METADATA]
    assert json.loads(text) == {
        "spigan": spigan.__version__,
        "config": model.config.model_dump(),
        "z_shape": list(model.config.z_shape),
        "t": 1.0,
        "range": [0, 1],
    }


def test_holds_no_path_of_this_machine(exported: Path) -> None:
    if format_of(exported) == "onnx":
        contents = [exported.read_bytes()]
    else:
        with zipfile.ZipFile(exported) as archive:
            contents = [archive.read(name) for name in archive.namelist()]
    package = str(Path(spigan.__file__).parent).encode()
    assert not [content for content in contents if package in content]


def test_pt2_runs_without_spigan(tmp_path: Path) -> None:
    model = make(mapping="mlp")
    export_model(model, tmp_path / "model.pt2")
    z = noise(model, 3)
    np.save(tmp_path / "z.npy", z.numpy())
    code = (
        "import sys; sys.modules['spigan'] = None\n"  # importing it raises ImportError
        "import numpy, torch\n"
        "z = torch.from_numpy(numpy.load('z.npy'))\n"
        "numpy.save('images.npy', torch.export.load('model.pt2').module()(z).numpy())\n"
        "print([name for name in sys.modules if name.startswith('spigan') and sys.modules[name]])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert result.stdout == "[]\n"
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "images.npy")), images(model, z), **CLOSE)


def test_onnx_is_one_file_of_standard_operators(tmp_path: Path) -> None:
    export_model(make(), tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    file = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    onnx.checker.check_model(file, full_check=True)
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", 18)]
    assert not file.functions
    sizes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*file.graph.input, *file.graph.output)
    ]
    assert sizes == [["batch", 3, 8, 8], ["batch", 3, 8, 8]]


@pytest.mark.parametrize(("format", "n"), [("onnx", 2), ("pt2", 1)])
def test_fixed_batch_size(tmp_path: Path, format: str, n: int) -> None:
    model, path = make(), tmp_path / f"model.{format}"
    export_model(model, path, batch_size=n)
    torch.testing.assert_close(RUN[format](path, noise(model, n)), images(model, noise(model, n)), **CLOSE)
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|Guard failed|Expected input"):
        RUN[format](path, noise(model, 3))


@pytest.mark.parametrize(
    ("format", "changes", "t"),
    [
        ("pt2", {"ode_activation": "tanh"}, 0.0),
        ("onnx", {"ode_solver": "euler", "ode_activation": "softplus"}, 0.5),
        ("onnx", {"mapping": "mlp", "path": "analytic"}, 0.5),
    ],
)
def test_time_and_solver(tmp_path: Path, format: str, changes: dict[str, Any], t: float) -> None:
    model, path = make(**changes), tmp_path / "model.bin"
    export_model(model, path, format=format, t=t)
    z = noise(model, 3)
    torch.testing.assert_close(RUN[format](path, z), images(model, z, t), **CLOSE)


def test_model_in_training_and_of_another_dtype(tmp_path: Path) -> None:
    model = make().to(torch.bfloat16).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_model(model, tmp_path / "model.pt2")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name
    z = noise(model, 3)
    expected = images(model.float().eval(), z)  # the same weights, computed with in float32
    torch.testing.assert_close(run_pt2(tmp_path / "model.pt2", z), expected, **CLOSE)


def test_saved_model_by_its_folder(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "saved")
    export_model(str(tmp_path / "saved"), tmp_path / "new" / "model.PT2")
    z = noise(model, 2)
    torch.testing.assert_close(run_pt2(tmp_path / "new" / "model.PT2", z), images(model, z), **CLOSE)


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changes", "name", "options", "message"),
    [
        ({}, "model.pt2", {"format": "tflite"}, 'format must be "onnx" or "pt2", got \'tflite\''),
        (
            {},
            "model.bin",
            {},
            "model.bin: cannot tell the format from the suffix; use .onnx or .pt2",
        ),
        ({}, "", {"format": "pt2"}, "is a folder; an exported model needs a file name"),
        ({}, "model.pt2", {"batch_size": 0}, "batch_size must be positive, got 0"),
        ({}, "model.pt2", {"t": 1.5}, r"t must be a time in \[0, 1\] .*, got \[1.5\]"),
        ({}, "model.onnx", {"t": float("nan")}, r"t must be a time in \[0, 1\] .*, got \[nan\]"),
        ({"mapping": "mlp"}, "model.pt2", {"t": 0.5}, 'mapping="mlp" has no time: t must be 1.0, got 0.5'),
        ({"ode_solver": "dopri5"}, "model.pt2", {}, r'"dopri5" cannot be exported, .* set ode_solver to "rk4"'),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_model(make(**changes), tmp_path / name, **options)
    assert not [*tmp_path.iterdir()]


def test_several_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="real number, not 'list'"):
        export_model(make(), tmp_path / "model.pt2", t=[0.5, 1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'pip install "spigan\[export\]" .*{package}'):
        export_model(None, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_pt2_needs_no_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    export_model(make(), tmp_path / "model.pt2", batch_size=1)


def test_weights_too_large_for_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spigan.sampling.export, "ONNX_MAX_WEIGHTS", 10_000)
    with pytest.raises(ValueError, match=r"holds at most 10000 bytes of weights, .* export it as pt2"):
        export_model(make(), tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_failure_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")

    def disk_full(program: Any, file: Any, **options: Any) -> None:
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch.export, "save", disk_full)
    with pytest.raises(OSError, match="no space left"):
        export_model(make(), path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_the_callers_autocast_is_not_exported(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "a.onnx"  # made from the same program as a pt2 file
    with torch.autocast("cpu", torch.bfloat16):
        export_model(model, path)
    z = noise(model, 3)
    torch.testing.assert_close(run_onnx(path, z), images(model, z), **CLOSE)
