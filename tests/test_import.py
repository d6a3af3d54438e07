"""What importing costs: `import spigan` is light, operations need torch alone, others load where used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import spigan

HEAVY = (
    *("datasets", "sklearn", "tensorboard", "huggingface_hub", "torchdiffeq", "pandas", "matplotlib", "diffusers"),
    *("onnx", "onnxscript", "gradio"),
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python holds after `code`."""
    script = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


def test_import_spigan_loads_no_torch() -> None:
    modules = loaded_after("import spigan; spigan.__version__; dir(spigan)")
    assert "spigan" in modules
    assert not modules & {"torch", "numpy", "pydantic", "PIL", "triton", *HEAVY}


def test_operations_load_no_heavy_package() -> None:
    modules = loaded_after("import spigan.ops; spigan.ops.rk4_mlp, spigan.VPSDE")
    assert "torch" in modules
    assert not modules & {"pydantic", "PIL", "typer", *HEAVY}


def test_models_load_no_training_package() -> None:
    modules = loaded_after(
        "import spigan.sampling.export, spigan.app; spigan.SPIGAN, spigan.TrainConfig, spigan.preset, spigan.sample"
    )
    assert "torch" in modules
    assert not modules & ({"typer", *HEAVY} - {"huggingface_hub"})


def test_a_study_loads_matplotlib_and_the_trainer_where_used() -> None:
    modules = loaded_after("import spigan.ablation.study")
    assert "torch" in modules
    assert not modules & ({"typer", *HEAVY} - {"huggingface_hub"})


def test_evaluation_loads_no_training_package() -> None:
    modules = loaded_after("import spigan.evaluation.features; spigan.evaluate")
    assert "torch" in modules
    assert not modules & ({"typer", "scipy", *HEAVY} - {"huggingface_hub"})


def test_command_line_loads_no_torch() -> None:
    modules = loaded_after("import spigan.cli")
    assert "typer" in modules
    assert not modules & {"torch", "numpy", *HEAVY}


def test_dir_lists_the_api() -> None:
    names = dir(spigan)
    assert names == sorted(names)
    assert set(spigan.__all__) <= set(names)
    classes = {"SPIGAN", "VPSDE", "DataConfig", "Discriminator", "Generator", "ModelConfig", "Sampler"}
    classes |= {"TrainConfig", "Trainer"}
    assert set(spigan.__all__) == classes | {"__version__", "evaluate", "interop", "ops", "preset", "sample"}


@pytest.mark.parametrize("name", spigan.__all__)
def test_every_name_of_the_api_loads(name: str) -> None:
    value = getattr(spigan, name)
    assert value is getattr(spigan, name)
    if isinstance(value, type):
        assert value.__name__ == name and value.__doc__


def test_star_import() -> None:
    namespace: dict[str, object] = {}
    exec("from spigan import *", namespace)
    assert set(spigan.__all__) <= namespace.keys()


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="module 'spigan' has no attribute 'sampel'"):
        spigan.sampel  # noqa: B018
    assert not hasattr(spigan, "kernel")
    with pytest.raises(ImportError, match="cannot import name 'Sampel'"):
        from spigan import Sampel  # type: ignore[attr-defined]  # noqa: F401
