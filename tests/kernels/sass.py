"""Reads the machine code of compiled CUDA kernels, to see what a GPU will execute without having one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest


def cuobjdump() -> str:
    """Path of cuobjdump: of the CUDA toolkit, or of Triton, which brings its own."""
    folders = [os.environ.get("PATH", os.defpath)]
    if (nvcc := shutil.which("nvcc")) is not None:
        folders.append(str(Path(nvcc).resolve().parent))
    if (triton := find_spec("triton")) is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    if found is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    return found


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel by address, such as {0x180: "STG.E.128 desc[UR4][R2.64], R8"}."""

    mangled: str
    arch: str
    instructions: dict[int, str]

    def between(self, first: int, last: int) -> list[str]:
        return [text for at, text in self.instructions.items() if first <= at <= last]

    def accesses(self, operation: str) -> Counter[int]:
        """Number of instructions of an operation (LDG, STG, LDS, ...) by the bits that a thread moves."""
        return accesses(self.instructions.values(), operation)

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) address of every loop: a branch backwards, and all up to where it goes."""
        targets = {at: re.search(r"\bBRA\S* (?:\S+, )?(0x[0-9a-f]+)", text) for at, text in self.instructions.items()}
        found = [(int(target[1], 16), at) for at, target in targets.items() if target is not None]
        return [(first, last) for first, last in found if first < last]


def accesses(instructions: object, operation: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for text in instructions:  # type: ignore[attr-defined]
        match = re.search(rf"(?:^|\s){operation}((?:\.\w+)*)(?:\s|$)", text)
        if match is None:
            continue
        widths = [part for part in match[1].split(".") if re.fullmatch(r"U?S?\d+", part)]
        found[int(re.sub(r"\D", "", widths[-1])) if widths else 32] += 1
    return found


def read(path: Path) -> list[Code]:
    """Return the kernels of an object file, for every architecture in it."""
    command = [cuobjdump(), "-sass", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = []
    for section in re.split(r"^\s*arch = ", text, flags=re.MULTILINE)[1:]:
        arch = section.split(maxsplit=1)[0]
        for part in re.split(r"^\s*Function : ", section, flags=re.MULTILINE)[1:]:
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part)
            kernels.append(Code(part.split(maxsplit=1)[0], arch, {int(at, 16): what for at, what in lines}))
    return kernels
