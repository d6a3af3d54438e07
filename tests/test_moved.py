"""Old module paths: they warn, name the new place, and give the same objects."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from spigan._moved import MOVED

NAMES = {
    "spigan.ablate": ["read_grid", "run", "write_report", "curve_figure", "Study"],
    "spigan.convert": ["convert"],
    "spigan.export": ["export_model", "format_of"],
    "spigan.hub": ["push_to_hub", "write_folder", "card"],
    "spigan.interpolation": ["interpolate_time", "interpolate_z", "interpolate_h", "forward_path", "save_rows"],
    "spigan.writers": ["image_writer", "Format"],
    "spigan.training.loss": ["real_loss", "fake_loss", "generator_loss", "r1_penalty", "path_lengths"],
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_warns_once_and_gives_the_new_names(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} has moved to {MOVED[old][0]}") as warned:
        modules = [importlib.import_module(old) for _ in range(2)]
    assert len(warned) == 1
    module, again = modules
    assert module is again
    new = [importlib.import_module(name) for name in MOVED[old]]
    for name in NAMES[old]:
        assert any(getattr(module, name) is getattr(target, name, None) for target in new), name
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.slow
def test_an_old_path_is_imported_as_any_module_is() -> None:
    code = (
        "import spigan.interpolation\n"
        "from spigan.interpolation import interpolate_h\n"
        "assert spigan.interpolation.interpolate_h is interpolate_h\n"
        "try:\n    from spigan.export import nothing\n"
        "except ImportError:\n    pass\n"
        "else:\n    raise SystemExit('imported')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.count("DeprecationWarning") == 2  # shown to the user: the warnings are at the import's line
    assert "<string>:1: DeprecationWarning: spigan.interpolation has moved to spigan.sampling.interpolation" in (
        result.stderr
    )


def test_other_missing_modules_stay_missing() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'spigan\.nothing'"):
        importlib.import_module("spigan.nothing")
