"""No pickle is read anywhere: not by the package's code, and not where somebody puts one in place of a file."""

from __future__ import annotations

import ast
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fuzz_targets import TARGETS, attempt, fresh, image_rows, model_files, tarred, try_file, zipped

import spigan
from spigan import SPIGAN
from spigan.interop import stylegan2_synthesis

# ---- The code ----

MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.package"}
CALLS = {"torch.load", "np.load", "numpy.load", "pd.read_pickle", "torch.hub.load", "yaml.load", "yaml.unsafe_load"}
CALLS |= {"torch.hub.load_state_dict_from_url", "eval", "exec", "runpy.run_path"}


def name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def uses(source: str) -> Iterator[str]:
    """What a module's source has that could read a pickle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            found = {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
            yield from found & (MODULES | CALLS)
        elif isinstance(node, ast.Call) and name_of(node.func) in CALLS:
            yield name_of(node.func)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only", "trust_remote_code"):
            yield str(node.arg)
        elif isinstance(node, ast.Constant) and node.value in MODULES:  # importlib.import_module("pickle")
            yield str(node.value)


def test_code_reads_no_pickle() -> None:
    folders = [Path(spigan.__file__).parent, Path(spigan.__file__).parents[1] / "kernels"]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 50
    assert {str(path): found for path in files if (found := list(uses(path.read_text(encoding="utf-8"))))} == {}


@pytest.mark.parametrize("source", [
    "import pickle", "from pickle import loads", "import torch\ntorch.load(path)", "from torch import load",
    "np.load(path)", "f(allow_pickle=True)", "import_module('dill')", "def f():\n    import joblib", "eval(text)",
])  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert list(uses(source))


# ---- Pickles in place of files ----

_unpickled: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:  # there is no way to take one away
    if _watching and event == "pickle.find_class":
        _unpickled.append(".".join(map(str, arguments[1:])))


sys.addaudithook(_hook)


@pytest.fixture
def unpickled() -> Iterator[list[str]]:
    """What pickles ask for while the test runs, in this process."""
    global _watching
    _unpickled.clear()
    _watching = True
    yield _unpickled
    _watching = False


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def array_of(payload: Payload, save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.array([payload], dtype=object))
    return buffer.getvalue()


def saved(payload: Payload) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": payload}, buffer)
    return buffer.getvalue()


KINDS: dict[str, Callable[[Payload], bytes]] = {
    "pickle": pickle.dumps,
    "old pickle": lambda payload: pickle.dumps(payload, 0),
    "torch.save": saved,
    "npy": lambda payload: array_of(payload, np.save),
    "npz": lambda payload: array_of(payload, np.savez),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_pickles(kind: str, marker: Path, unpickled: list[str]) -> None:
    """They are executed where something reads them."""
    path = marker.with_name("file.pt")
    path.write_bytes(KINDS[kind](Payload(marker)))
    if kind == "torch.save":
        torch.load(path, weights_only=False)
    else:
        found = np.load(path, allow_pickle=True)
        _ = found["arr_0"] if kind == "npz" else found
    assert marker.exists() and unpickled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_pickle_in_place_of_a_file(target: str, kind: str, marker: Path, unpickled: list[str]) -> None:
    accepted = try_file(target, KINDS[kind](Payload(marker)))
    assert not marker.exists() and not unpickled
    ignored = ("cache of features", "cache of plans", "record of the best", "run metrics", "run statistics")
    assert not accepted or target in ignored


@pytest.mark.parametrize("target", TARGETS)
def test_no_pickle_in_sound_files(target: str, unpickled: list[str]) -> None:
    for content in TARGETS[target].examples():
        try_file(target, content)
    assert not unpickled


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_beside_and_within(kind: str, marker: Path, unpickled: list[str]) -> None:
    """Under the names that others read pickles from; as an image in every kind of source."""
    import lmdb

    from spigan.data import DataConfig, open_dataset

    content = KINDS[kind](Payload(marker))
    folder = fresh("pickles")
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors.index.json"):
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(model_files()["config.json"])
    assert not attempt("pickle", lambda: SPIGAN.from_pretrained(folder), "lacks model.safetensors")
    for source in ("images.npz", "images.npy", "images.pkl", "images.pt"):
        (folder / source).write_bytes(content)
        read = lambda source=source: open_dataset(DataConfig(source=str(folder / source)))  # noqa: E731
        assert not attempt("pickle", read, "is not a source of images")
    holders = {"a.zip": zipped({"a.png": content}), "a.tar": tarred({"a.png": content, "a.pickle": content})}
    for name, data in holders.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"image": image_rows(content)}), folder / "a.parquet")
    with lmdb.open(str(folder / "lmdb"), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"0", content)
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(content)
    (folder / "cifar-10-batches-py").mkdir()
    for number in range(1, 6):
        (folder / "cifar-10-batches-py" / f"data_batch_{number}").write_bytes(content)
    for name in (*holders, "a.parquet", "lmdb", "images", "cifar-10-batches-py"):
        read = lambda name=name: open_dataset(DataConfig(source=str(folder / name)), progress=False)  # noqa: E731
        assert not attempt("pickle", read, name)
    assert not attempt("pickle", lambda: stylegan2_synthesis(content), "must be a mapping")  # type: ignore[arg-type]
    assert not marker.exists() and not unpickled


def test_arrow_type_that_is_a_pickle(marker: Path, unpickled: list[str]) -> None:
    """Which pyarrow before 14.0.1 executed."""
    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    field = pa.field("image", pa.binary(), metadata=metadata)
    path = fresh("pickles") / "a.parquet"
    pq.write_table(pa.table([pa.array([b"x"])], schema=pa.schema([field])), path)
    from spigan.data import DataConfig, open_dataset

    assert not attempt("pickle", lambda: open_dataset(DataConfig(source=str(path), column="image")), "a.parquet")
    assert not marker.exists() and not unpickled
