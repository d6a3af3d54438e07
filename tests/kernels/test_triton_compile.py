"""The Triton kernels compiled for sm_80 and sm_90 without a GPU: they fit, spill nothing and use the matrix units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CONVOLUTIONS = {"conv2d", "transposed_conv2d"}
LAYERS = {"fir_bias_act", "bias_act_backward", *CONVOLUTIONS}

SHARED_KIB = {80: 163, 90: 227}
"""Shared memory that a program can have."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What compile_triton.py found. The compiler must not see TRITON_INTERPRET, nor kernels that are cached already."""
    pytest.importorskip("triton", reason="Triton has no release for this platform")
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py")],
        cwd=cache,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def kernels(lines):
    return [line for line in lines if "arch" in line]


def test_resources(kernels, capsys):
    row = "{:17} {:19} {:9} {:5} {:>9} {:>10} {:>6}  {}".format
    table = [row("kernel", "", "dtype", "arch", "registers", "shared KiB", "spills", "matrix unit")]
    for k in kernels:
        shared = f"{k['shared'] / 1024:.1f}"
        table.append(
            row(k["kernel"], k["what"], k["dtype"], f"sm_{k['arch']}", k["reg"], shared, k["stack"], k["matrix"])
        )
    with capsys.disabled():
        print("", *table, sep="\n")
    assert {k["kernel"] for k in kernels} == {"philox_normal", "path_interpolate", "rk4_mlp", *LAYERS}
    for kernel in kernels:
        assert kernel["stack"] == 0, f"spills: {kernel}"
        assert kernel["shared"] <= SHARED_KIB[kernel["arch"]] * 1024, f"too much shared memory: {kernel}"


def test_matrix_units(kernels):
    for kernel in kernels:
        exact = kernel["dtype"] == "float32" and "TF32" not in kernel["what"]
        if kernel["kernel"] not in {"rk4_mlp", *CONVOLUTIONS} or exact:
            expected = "none"
        elif kernel["kernel"] in CONVOLUTIONS:
            expected = "wgmma" if kernel["arch"] == 90 else "mma"
        else:
            expected = "wgmma" if kernel["arch"] == 90 and "64 rows" in kernel["what"] else "mma"
        assert kernel["matrix"] == expected, kernel


def test_stores_are_wide(kernels):
    # A thread's 4 neighbouring elements in one store; they need no shared memory to come together.
    for kernel in kernels:
        if kernel["kernel"] in ("philox_normal", "path_interpolate") and kernel["what"] != "offset 1":
            assert kernel["narrowest_store"] == (128 if kernel["dtype"] == "float32" else 64), kernel
            assert kernel["shared"] == 0, kernel


def test_changing_arguments_compile_nothing_new(lines):
    counts = [line for line in lines if "variants" in line]
    assert len(counts) == 8
    for line in counts:
        assert line["compiled"] == 1 < line["variants"], line


def test_the_package_imports_without_triton():
    code = (
        "import sys, torch; had = 'triton' in sys.modules; import spigan.kernels; print('triton' in sys.modules, had)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported, by_torch = done.stdout.split()
    assert imported == by_torch
