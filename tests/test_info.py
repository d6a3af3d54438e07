"""spigan.info: the report, above all where something does not work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from spigan import __version__, info
from spigan.ops import backends


@pytest.fixture(autouse=True)
def _no_request(monkeypatch):
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)


def run(program, tmp_path):
    """Standard output of a Python program in a fresh process, which must end with status 0."""
    done = subprocess.run(
        [sys.executable, *program], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_collect():
    collected = info.collect()
    assert set(collected) == {"versions", "system", "devices", "extension", "SPIGAN_BACKEND", "backends"}
    assert collected["versions"]["spigan"] == __version__
    assert collected["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert collected["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert f"{torch.get_num_threads()} threads" in collected["devices"]["cpu"]
    assert ("cuda" in collected["devices"]) != torch.cuda.is_available()
    assert ("cuda:0" in collected["devices"]) == torch.cuda.is_available()
    assert collected["extension"]["compiler"] and isinstance(collected["extension"]["openmp"], bool)
    assert collected["SPIGAN_BACKEND"] == "not set"
    assert collected["backends"]["cpu"] == backends.describe(torch.device("cpu"))
    assert set(collected["backends"]["cpu"]) == set(backends.operations())
    assert json.loads(json.dumps(collected)) == collected


def test_packages_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package-here"))
    assert info.collect()["versions"]["no-such-package-here"] == "not installed"


def test_module_prints_json_and_text(tmp_path):
    printed = json.loads(run(["-m", "spigan.info", "--json"], tmp_path))
    assert printed["versions"]["spigan"] == __version__
    assert printed["backends"]["cpu"]["philox_normal"]["chosen"] == "cpp"


def test_main(capsys):
    info.main()
    assert capsys.readouterr().out == info.report() + "\n"
    info.main(as_json=True)
    assert json.loads(capsys.readouterr().out) == info.collect()


def backend_section(report):
    lines = report.splitlines()
    return lines[lines.index("backends on cpu:") + 1 :]


def test_report():
    report = info.report()
    assert f"  spigan: {__version__}\n" in report
    assert "SPIGAN_BACKEND: not set\n" in report
    lines = backend_section(report.split("backends on cuda:")[0])
    assert "  philox_normal     cpp        (auto: first that runs on cpu)" in lines
    for op, entry in backends.describe(torch.device("cpu")).items():
        assert sum(line.startswith(f"  {op} ") for line in lines) == 1
        for backend in entry["cannot_run"]:
            assert any(line.startswith(f"    {backend} cannot run: ") for line in lines)


def test_report_is_one_line_per_operation_and_the_causes(monkeypatch):
    described = {
        "first": {
            "chosen": "reference",
            "why": "auto: first that runs on cpu",
            "cannot_run": {"cpp": "it is out of order"},
            "not_chosen": [],
            "not_implemented": ["triton", "cuda"],
        },
        "second_op": {
            "chosen": "reference",
            "why": "auto: first that runs on cpu",
            "cannot_run": {},
            "not_chosen": [],
            "not_implemented": ["triton", "cuda", "cpp"],
        },
    }
    assert described["first"].keys() == backends.describe(torch.device("cpu"))["philox_normal"].keys()
    monkeypatch.setattr(backends, "describe", lambda device: described)
    assert backend_section(info.report().split("\nbackends on cuda:")[0]) == [
        "  first      reference  (auto: first that runs on cpu)",
        "    cpp cannot run: it is out of order",
        "  second_op  reference  (auto: first that runs on cpu)",
        "  not in this version: triton, cuda, cpp (second_op)",
    ]
    described["first"] |= {"chosen": None, "why": "cpp was asked for by SPIGAN_BACKEND: it is out of order"}
    assert backend_section(info.report().split("\nbackends on cuda:")[0])[:2] == [
        "  first      NONE       (cpp was asked for by SPIGAN_BACKEND: it is out of order)",
        "    cpp cannot run: it is out of order",
    ]


def test_an_unknown_backend_in_the_environment_is_reported(monkeypatch):
    monkeypatch.setenv("SPIGAN_BACKEND", "nonsense")
    report = info.report()
    assert "SPIGAN_BACKEND: nonsense\n" in report
    assert "error: ValueError: SPIGAN_BACKEND names the backend 'nonsense'" in report


NO_EXTENSION = "import sys; sys.modules['spigan._C'] = None"
BROKEN_EXTENSION = """
    import sys
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "spigan._C":
                raise OSError("undefined symbol: some_function")
    sys.meta_path.insert(0, Finder())
"""
NO_TORCH = "import sys; sys.modules['torch'] = None"
PRINT_BOTH = """
    from spigan import info
    info.main(as_json=True)
    print("=====")
    info.main()
"""


def both(sabotage, tmp_path):
    """(parsed JSON, text) that are printed after a sabotage."""
    printed = run(["-c", textwrap.dedent(sabotage) + textwrap.dedent(PRINT_BOTH)], tmp_path)
    as_json, text = printed.split("=====\n")
    return json.loads(as_json), text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "cause"),
    [
        (NO_EXTENSION, "ModuleNotFoundError: import of spigan._C halted"),
        (BROKEN_EXTENSION, "OSError: undefined symbol: some_function"),
    ],
    ids=["missing", "broken"],
)
def test_without_the_extension(sabotage, cause, tmp_path):
    collected, text = both(sabotage, tmp_path)
    assert collected["extension"]["error"].startswith(cause)
    entry = collected["backends"]["cpu"]["philox_normal"]
    assert entry["chosen"] == "reference"
    assert cause in entry["cannot_run"]["cpp"]
    lines = text.splitlines()
    at = lines.index("  philox_normal     reference  (auto: first that runs on cpu)")
    assert lines[at + 1].startswith("    cpp cannot run: the compiled extension spigan._C does not load (")
    assert cause in lines[at + 1]
    assert any(line.startswith(f"  error: {cause}") for line in lines)


def test_without_torch(tmp_path):
    collected, text = both(NO_TORCH, tmp_path)
    cause = "ModuleNotFoundError: import of torch halted"
    for part in ("devices", "backends"):
        assert collected[part]["error"].startswith(cause)
    assert collected["versions"]["spigan"] == __version__
    assert collected["extension"]["compiler"], "the extension needs no torch"
    assert text.count(f"error: {cause}") == 2


def test_module_runs_without_torch(tmp_path):
    program = f"{NO_TORCH}; import runpy; sys.argv = ['info']; runpy.run_module('spigan.info', run_name='__main__')"
    assert "error: ModuleNotFoundError: import of torch halted" in run(["-c", program], tmp_path)
