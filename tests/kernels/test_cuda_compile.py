"""The CUDA kernels compile for every architecture that is shipped, without spilling registers to memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
# Blocks have 256 threads: rk4_mlp has one on a multiprocessor; fir_bias_act at least two, as a thread keeps many loads
# in flight; the others hide latencies with many.
MOST_REGISTERS = {
    "rk4_mlp": 255,
    "fir_bias_act": 128,
    "bias_act_backward": 80,
    "path_interpolate": 48,
    "philox_normal": 48,
    "probe": 8,
}


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel."""

    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def empty(self) -> bool:
        """Clusters need sm_90; there is nothing to run before it."""
        return "ClusterExchange" in self.kernel and int(self.arch.removeprefix("sm_")) < 90


def readable(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters, where a demangler is found."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None:
        return names
    demangled = subprocess.run([demangler], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"\(anonymous namespace\)::|\b\w+::|\([a-z ]+\)(?=\d)", "", n) for n in demangled.splitlines()]
    return [n.removeprefix("void ").partition("(")[0] for n in names]


def parse(log: str) -> list[Usage]:
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, arch = re.findall(r"'(\S+?)'", part)[:2]
        stack, stores, loads = re.findall(r"(\d+) bytes (?:stack frame|spill)", part)[:3]
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None, part
        spills, static = int(stores) + int(loads), int(shared[1]) if shared else 0
        found.append(Usage(name, arch, int(registers[1]), static, int(stack), spills))
    names = readable([usage.kernel for usage in found])
    return [Usage(name, *list(vars(usage).values())[1:]) for name, usage in zip(names, found, strict=True)]


def compile_kernels(source: Path, folder: Path) -> list[Usage]:
    """Compile a source for every architecture, and return what its kernels need."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    # As in CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = [nvcc, *flags, "-c", source, "-o", folder / f"{source.stem}.o"]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert run.returncode == 0, run.stdout
    return parse(run.stdout)


def print_table(usages: list[Usage]) -> None:
    width = max(len(usage.kernel) for usage in usages)
    print(f"\n{'kernel':{width}}  arch   registers  static shared  stack  spills")
    for u in usages:
        print(f"{u.kernel:{width}}  {u.arch}  {u.registers:9}  {u.shared:13}  {u.stack:5}  {u.spills:6}")


def check_fit(usage: Usage) -> None:
    assert usage.spills == 0, usage
    assert usage.stack == 0, usage
    assert usage.shared == 0, usage  # all of it is dynamic, so that a block of rk4_mlp can have 227 KiB
    assert usage.registers <= MOST_REGISTERS[usage.kernel.partition("_kernel")[0]], usage


def test_sources_are_found() -> None:
    assert {source.stem for source in SOURCES} == set(MOST_REGISTERS)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_fit_every_architecture(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usages = compile_kernels(source, tmp_path)
    rows = [usage for usage in usages if not usage.empty]
    with capsys.disabled():
        print_table(rows)
    for usage in rows:
        check_fit(usage)
    kernels = [{u.kernel for u in usages if u.arch == f"sm_{arch}"} for arch in ARCHITECTURES]
    assert kernels[0] and all(names == kernels[0] for names in kernels)
    assert {name.partition("<")[0] for name in kernels[0]} == {f"{source.stem}_kernel"}
