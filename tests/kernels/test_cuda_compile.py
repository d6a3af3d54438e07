"""The CUDA kernels compiled for every architecture that is shipped.

They spill nothing to memory, load and store as many bytes at once as they should, and take no more instructions than
docs/kernels.md counts on.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sass
from sass import Code

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
KERNELS = {source.stem: {source.stem} for source in SOURCES} | {"rk4_mlp": {"rk4_mlp", "rk4_mlp_matrix"}}
# Blocks have 256 threads: rk4_mlp has one on a multiprocessor; fir_bias_act at least two, as a thread keeps many loads
# in flight; the others hide latencies with many.
MOST_REGISTERS = {
    "rk4_mlp": 255,
    "rk4_mlp_matrix": 255,
    "fir_bias_act": 128,
    "bias_act_backward": 80,
    "path_interpolate": 48,
    "philox_normal": 48,
    "probe": 8,
}


# Of the loop over whole groups of four elements, on all branches together, for K = 2 times.
MOST_INSTRUCTIONS = {"path_interpolate": 240, "philox_normal": 130}
BYTES = {"unsigned char": 1, "bfloat16": 2, "float16": 2, "float": 4}


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


def compile_kernels(source: Path, folder: Path) -> tuple[list[Usage], Path]:
    """Compile a source for every architecture. Return what its kernels need, and the object file."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    # As in CMakeLists.txt.
    flags = ["-std=c++17", "-O3", "--fmad=false", "-Xptxas", "-v", "-Werror", "all-warnings"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    compiled = folder / f"{source.stem}.o"
    command = [nvcc, *flags, "-c", source, "-o", compiled]
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert run.returncode == 0, run.stdout
    return parse(run.stdout), compiled


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Usage], Path]:
    """The name of a source, what its kernels need, and the object file."""
    return request.param.stem, *compile_kernels(request.param, tmp_path_factory.mktemp("compiled"))


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
    assert {kernel for kernels in KERNELS.values() for kernel in kernels} == set(MOST_REGISTERS)


def test_kernels_fit_every_architecture(
    compiled: tuple[str, list[Usage], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, usages, _ = compiled
    rows = [usage for usage in usages if not usage.empty]
    with capsys.disabled():
        print_table(rows)
    for usage in rows:
        check_fit(usage)
    kernels = [{u.kernel for u in usages if u.arch == f"sm_{arch}"} for arch in ARCHITECTURES]
    assert kernels[0] and all(names == kernels[0] for names in kernels)
    assert {kernel.partition("<")[0] for kernel in kernels[0]} == {f"{kernel}_kernel" for kernel in KERNELS[name]}


# ---- Widths of loads and stores, and instructions ----


def hot_loops(code: Code) -> tuple[list[str], list[str]]:
    """Instructions of the loop with the widest stores, and of the loop within it or none."""
    widest = max(code.accesses("STG"))
    loops = [code.between(*loop) for loop in code.loops()]
    loops = sorted((loop for loop in loops if sass.accesses(loop, "STG")[widest]), key=len)
    return loops[-1], loops[0] if len(loops) > 1 else []


def check_path_interpolate(types: list[str], code: Code) -> int:
    """A thread loads and stores four elements at once, and four floats of given noise."""
    x0, out = (32 * BYTES[name] for name in types)
    outer, inner = hot_loops(code)
    assert sass.accesses(outer, "STG") == {out: 2} and sass.accesses(inner, "STG") == {out: 1}
    assert sass.accesses(outer, "LDG") == Counter([x0, 128, 8])  # 8: whether the image is mirrored
    return len(outer) + len(inner)


def check_philox_normal(types: list[str], code: Code) -> int:
    if types == ["double"]:
        return 0
    outer, _ = hot_loops(code)
    assert sass.accesses(outer, "STG") == {32 * BYTES[types[0]]: 1}
    assert sass.accesses(outer, "LDG") == {64: 1}  # the seed
    return len(outer)


def check_fir_bias_act(types: list[str], code: Code) -> int:
    """Of everything that has channels, 16 bytes at once. One float at once: filter, noise, strength, RGB."""
    if types[1] == "1":
        return 0
    rgb = types[-1] in ("true", "1")
    assert code.accesses("STG") == {128: 4} | ({32: 16} if rgb else {})
    loads = code.accesses("LDG")
    assert set(loads) == {32, 64, 128} and loads[32] <= 10 and loads[64] == 1 and loads[128] >= 11, loads
    return 0


def check_bias_act_backward(types: list[str], code: Code) -> int:
    if types[1] == "1":
        return 0
    assert code.accesses("STG") == {128: 1, 32: 3}  # 32: the sums
    loads = code.accesses("LDG")
    assert set(loads) == {32, 128} and loads[32] == 1 and loads[128] >= 4, loads
    return 0


def check_rk4_mlp(types: list[str], code: Code) -> int:
    """Weights and activations, 16 bytes at once; four activations to the other blocks at once."""
    dtype, exchange, _, weights_in_shared = types
    four = 32 * BYTES[dtype]
    assert code.accesses("LDS")[128] >= 10
    assert code.accesses("LDGSTS" if weights_in_shared in ("true", "1") else "LDG")[128] >= 1
    if exchange == "ClusterExchange":
        assert set(code.accesses("ST")) == {four}
    else:
        assert code.accesses("STG")[four] >= 1 and code.accesses("STS")[128] >= 1
    return 0


def check_rk4_mlp_matrix(types: list[str], code: Code) -> int:
    """Three matrix products for each product of float32 factors, which a lane loads 16 bytes at a time."""
    assert code.accesses("LDS")[128] >= 4 and code.accesses("LDGSTS")[128] >= 1
    products = sum("HMMA.1688.F32.TF32" in text for text in code.instructions.values())
    assert products > 0 and products % 12 == 0  # 3 products x 2 halves of 16 terms x 2 tiles of 8 rows
    if types == ["SingleBufferExchange"]:
        assert set(code.accesses("ST")) == {128}
    else:
        assert code.accesses("STG")[128] >= 1
    return 0


def readable_kernels(path: Path) -> Iterator[tuple[str, list[str], Code]]:
    """Yield (name, template arguments, code) of every kernel that does anything."""
    codes = [code for code in sass.read(path) if len(code.instructions) > 16]
    for name, code in zip(readable([code.mangled for code in codes]), codes, strict=True):
        kernel, _, rest = name.partition("<")
        # Of the template arguments only the last but one may have arguments of its own: Filter<4, 2, 1>.
        arguments = re.sub(r"<[^<>]*>", "", rest.removesuffix(">"))
        yield kernel.removesuffix("_kernel"), [a.strip() for a in arguments.split(",")], code


def test_machine_code(compiled: tuple[str, list[Usage], Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, _, path = compiled
    kernels = list(readable_kernels(path))
    if name == "probe":
        assert not kernels  # its kernel does nothing
        return
    assert {code.arch for _, _, code in kernels} == {f"sm_{arch}" for arch in ARCHITECTURES}
    for kernel, types, code in kernels:
        assert kernel in KERNELS[name]
        assert not code.accesses("LDL") and not code.accesses("STL"), (types, "uses local memory")
        instructions = globals()[f"check_{kernel}"](types, code)
        if instructions:
            with capsys.disabled():
                print(f"\n{name} {types} {code.arch}: {instructions} instructions", end="")
            assert instructions <= MOST_INSTRUCTIONS[name]
