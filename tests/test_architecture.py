"""The structure of the code: layers, imports, private names, and the sizes of files and functions."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From top to bottom. A module imports modules of lower layers and of its own package, never upwards or sideways.
# The longest prefix decides. `spigan` itself offers names of all layers, so nothing below the command line imports it.
LAYERS = [
    ["spigan.__main__"],
    ["spigan.cli"],
    ["spigan", "spigan.ablation", "spigan.app", "spigan.bench", "spigan.doctor", "spigan.info"],
    ["spigan.training"],
    ["spigan.evaluation"],
    ["spigan.sampling"],
    ["spigan.interop"],
    ["spigan.models"],
    ["spigan.runs", "spigan.presets"],
    ["spigan.config"],
    ["spigan.ops", "spigan.data"],
    ["spigan.kernels", "spigan._C", "spigan.data.config", "spigan.images", "spigan.sde"],
    ["spigan.files"],
    ["spigan.choices", "spigan._moved", "spigan._version"],
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}

MAX_PACKAGE_FILE, MAX_TEST_FILE, MAX_FUNCTION = 400, 600, 60
LONG_FUNCTIONS = {
    "spigan.cli.sample.interpolate": "each option of the command is a parameter with its help",
    "spigan.cli.train.train": "each option of the command is a parameter with its help",
    "spigan.cli.evaluate.evaluate": "each option of the command is a parameter with its help",
    "spigan.app.build": "the page from top to bottom, which reads like the page looks",
    "spigan.kernels.fir_bias_act.fir_bias_act_kernel": "one loop nest of a GPU; each of 33 parameters has its line",
    "spigan.kernels.modulated_conv2d.conv2d_kernel": "one program of a GPU; each of 30 parameters has its line",
    "spigan.kernels.rk4_mlp.rk4_mlp_kernel": "one loop nest of a GPU: steps, stages, layers, and the barriers between",
}


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module

    @property
    def where(self) -> str:
        return str(self.path.relative_to(ROOT))


class Import(NamedTuple):
    source: Module
    target: str  # a module
    name: str  # imported from it; "" for the module itself
    line: int


@cache
def modules() -> dict[str, Module]:
    """All modules of the package, by name. kernels/ is installed as spigan.kernels."""
    found = {}
    for folder, package in (("spigan", "spigan"), ("kernels", "spigan.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if folder == "spigan" and "kernels" in path.relative_to(ROOT).parts:
                continue  # a link to kernels/ in a source tree
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *parts]).removesuffix(".__init__")
            found[name] = Module(name, path, ast.parse(path.read_text(encoding="utf-8")))
    return found


@cache
def imports() -> list[Import]:
    """All imports of the package's own modules, also those in functions and under TYPE_CHECKING."""
    return [found for module in modules().values() for node in ast.walk(module.tree) for found in resolve(module, node)]


def resolve(module: Module, node: ast.AST) -> Iterator[Import]:
    names = []
    if isinstance(node, ast.Import):
        names = [(alias.name, "") for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module.name.split(".") if module.path.stem == "__init__" else module.name.split(".")[:-1]
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
        names = [(base, alias.name) for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        names = [(arg.value, "") for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    for base, name in names:
        base = f"spigan.{base}" if base.partition(".")[0] == "kernels" else base
        if f"{base}.{name}" in modules() or f"{base}.{name}" == "spigan._C":
            base, name = f"{base}.{name}", ""
        if base.partition(".")[0] == "spigan" and base != module.name:
            yield Import(module, base, name, node.lineno)  # type: ignore[attr-defined]


def layer(name: str) -> tuple[int, str]:
    """The layer of a module, 0 at the top, and the entry of LAYERS that it belongs to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (prefix := ".".join(parts[:length])) in LAYER_OF and (length > 1 or name == "spigan"):
            return LAYER_OF[prefix], prefix
    raise AssertionError(f"{name} belongs to no layer: add it to LAYERS")


def assert_none(violations: list[str]) -> None:
    assert not violations, f"{len(violations)}:\n" + "\n".join(sorted(violations))


def test_no_import_leads_upwards_or_sideways() -> None:
    wrong = []
    for found in imports():
        (here, mine), (there, other) = layer(found.source.name), layer(found.target)
        if mine != other and there <= here:
            wrong.append(f"{found.source.where}:{found.line}: {mine} imports {found.target}")
    assert_none(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {name: set() for name in modules()}
    for found in imports():
        if found.target in graph:
            graph[found.source.name].add(found.target)
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [*graph[start]]
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        reach[start] = seen
    circles = {frozenset(b for b in reach[a] if a in reach[b]) for a in reach if a in reach[a]}
    assert_none([" <-> ".join(sorted(circle)) for circle in circles])


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and f"spigan.{name}" not in {*modules(), "spigan._C"}


def test_no_private_name_is_imported() -> None:
    assert_none(
        [f"{i.source.where}:{i.line}: {i.name} of {i.target}" for i in imports() if private(i.name) and i.name != "_C"]
    )


def defined_names(module: Module) -> set[str]:
    """Private names that a module defines: functions, classes, variables, attributes, slots."""
    names = set()
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return {name for name in names if private(name)}


def test_no_private_attribute_of_another_module_is_used() -> None:
    defined = {name: defined_names(module) for name, module in modules().items()}
    everywhere = set().union(*defined.values())
    wrong = [
        f"{module.where}:{node.lineno}: {ast.unparse(node)}"
        for name, module in modules().items()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute) and node.attr in everywhere - defined[name]
        if ast.unparse(node.value) not in ("self", "cls", "super()")
    ]
    assert_none(wrong)


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short() -> None:
    wrong = [f"{m.where}: {lines(m.path)} lines" for m in modules().values() if lines(m.path) > MAX_PACKAGE_FILE]
    tests = (ROOT / "tests").rglob("*.py")
    wrong += [f"{p.relative_to(ROOT)}: {lines(p)} lines" for p in tests if lines(p) > MAX_TEST_FILE]
    assert_none(wrong)


def function_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, without the docstring: a thorough one is no reason to split a function."""
    length = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    return length - ((first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(function) is not None else 0)


def test_functions_are_short() -> None:
    long = {
        f"{module.name}.{node.name}": f"{module.where}:{node.lineno}: {node.name}, {function_lines(node)} lines"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and function_lines(node) > MAX_FUNCTION
    }
    wrong = [f"{text}, not in LONG_FUNCTIONS" for name, text in long.items() if name not in LONG_FUNCTIONS]
    wrong += [f"{name} is short or gone: remove it from LONG_FUNCTIONS" for name in LONG_FUNCTIONS if name not in long]
    assert_none(wrong)


def test_every_file_of_csrc_has_a_name_of_its_own() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert files
    count = Counter(path.name for path in files)
    assert_none([str(path.relative_to(ROOT)) for path in files if count[path.name] > 1])


@pytest.mark.parametrize("name", [name for layer in LAYERS for name in layer])
def test_every_entry_of_the_layers_exists(name: str) -> None:
    assert name in modules() or name == "spigan._C"
