"""The Triton kernels compiled for sm_80 and sm_90 without a GPU: they fit, spill nothing and use the matrix units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CONVOLUTIONS = {"conv2d", "transposed_conv2d"}
KERNELS = {
    "philox_normal": {"philox_normal"},
    "path_interpolate": {"path_interpolate"},
    "rk4_mlp": {"rk4_mlp"},
    "fir_bias_act": {"fir_bias_act", "bias_act_backward"},
    "modulated_conv2d": CONVOLUTIONS,
}
"""The kernels of each operation."""

SHARED_KIB = {80: 163, 90: 227}
"""Shared memory that a program can have."""


def compile_kernels(operation: str, cache: Path) -> list[dict[str, Any]]:
    """What compile_triton.py prints. It must not see TRITON_INTERPRET, nor find kernels in a cache."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_triton.py"), operation],
        cwd=cache,
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_resources(kernel: dict[str, Any]) -> None:
    assert kernel["stack"] == 0, f"spills: {kernel}"
    assert kernel["shared"] <= SHARED_KIB[kernel["arch"]] * 1024, f"too much shared memory: {kernel}"


def check_matrix_unit(kernel: dict[str, Any]) -> None:
    exact = kernel["dtype"] == "float32" and "TF32" not in kernel["what"]
    if kernel["kernel"] not in {"rk4_mlp", *CONVOLUTIONS} or exact:
        expected = "none"
    elif kernel["kernel"] in CONVOLUTIONS:
        expected = "wgmma" if kernel["arch"] == 90 else "mma"
    else:
        expected = "wgmma" if kernel["arch"] == 90 and "64 rows" in kernel["what"] else "mma"
    assert kernel["matrix"] == expected, kernel


def check_stores(kernel: dict[str, Any]) -> None:
    """A thread stores its 4 neighbouring elements at once, without gathering them in shared memory."""
    if kernel["kernel"] in ("philox_normal", "path_interpolate") and kernel["what"] != "offset 1":
        assert kernel["narrowest_store"] == (128 if kernel["dtype"] == "float32" else 64), kernel
        assert kernel["shared"] == 0, kernel


def print_table(kernels: list[dict[str, Any]]) -> None:
    row = "{:17} {:19} {:9} {:5} {:>9} {:>10} {:>6}  {}".format
    print("\n" + row("kernel", "", "dtype", "arch", "registers", "shared KiB", "spills", "matrix unit"))
    for k in kernels:
        shared = f"{k['shared'] / 1024:.1f}"
        print(row(k["kernel"], k["what"], k["dtype"], f"sm_{k['arch']}", k["reg"], shared, k["stack"], k["matrix"]))


@pytest.mark.slow
@pytest.mark.parametrize("operation", KERNELS)
def test_compiled_kernels(operation, tmp_path, capsys):
    pytest.importorskip("triton", reason="Triton has no release for this platform")
    lines = compile_kernels(operation, tmp_path)
    kernels = [line for line in lines if "arch" in line]
    with capsys.disabled():
        print_table(kernels)
    for arch in SHARED_KIB:
        assert {k["kernel"] for k in kernels if k["arch"] == arch} == KERNELS[operation]
    for kernel in kernels:
        check_resources(kernel)
        check_matrix_unit(kernel)
        check_stores(kernel)
    # Arguments that change from call to call compile nothing new.
    counts = [line for line in lines if "variants" in line]
    assert {line["kernel"] for line in counts} == KERNELS[operation]
    for line in counts:
        assert line["compiled"] == 1 < line["variants"], line


def test_the_package_imports_without_triton():
    code = (
        "import sys, torch; had = 'triton' in sys.modules; import spigan.kernels; print('triton' in sys.modules, had)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported, by_torch = done.stdout.split()
    assert imported == by_torch
