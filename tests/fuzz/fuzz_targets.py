"""What is fuzzed, and what must hold: shared by the tests (hypothesis) and by atheris_readers.py (coverage-guided).

A `Target` reads one file that may come from anybody. Whatever the bytes are, reading ends in a result or in one of the
errors `DOCUMENTED` that names the file, within `MEMORY` and `SECONDS`. A new reader is one more entry of `TARGETS`: an
example of a file, and the function that reads it.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import signal
import struct
import tarfile
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spigan import SPIGAN, ModelConfig, TrainConfig
from spigan.data import DataConfig, open_dataset
from spigan.data.sources import cifar
from spigan.ops import BackendUnavailable

MEMORY = 3 << 30  # address space that a case may add: a few decoded images of the largest size that is accepted
SECONDS = 20.0  # of CPU time for a case, far above what any takes on a busy machine
WALL_SECONDS = 120.0  # a case that waits for ever (for a pipe, a network) uses no CPU
MESSAGE = 20_000  # characters of an error

# FloatingPointError: training that diverges from a checkpoint whose numbers explode.
DOCUMENTED = (ValueError, TypeError, OSError, BackendUnavailable, FloatingPointError)
COUNTS: Counter[tuple[str, str]] = Counter()  # (kind, "refused" or "accepted") -> cases


class Fault(AssertionError):
    """What the package must never do with a file, whatever is in it."""


@contextmanager
def bounded(timers: bool = True, memory: int = MEMORY) -> Iterator[None]:
    """Run a case under limits; raises `Fault` where it exceeds them. `timers`: interrupt it, not only measure it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    timers = timers and threading.current_thread() is threading.main_thread()

    def late(number: int, frame: Any) -> None:
        raise Fault(f"not done within {SECONDS:g} s of CPU time or {WALL_SECONDS:g} s")

    previous = {n: signal.signal(n, late) for n in (signal.SIGPROF, signal.SIGALRM)} if timers else {}
    if timers:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, hard))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if timers:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if time.process_time() - began > SECONDS:
        raise Fault(f"took {time.process_time() - began:.1f} s of CPU time")


def attempt(kind: str, read: Callable[[], Any], *mentions: str, timers: bool = True, memory: int = MEMORY) -> bool:
    """Run a case: whether it was accepted. An error must be documented and mention one of `mentions`."""
    try:
        with warnings.catch_warnings(), bounded(timers, memory):
            warnings.simplefilter("ignore")
            read()
    except Fault:
        raise
    except DOCUMENTED as error:
        _check_error(error, mentions)
        COUNTS[kind, "refused"] += 1
        return False
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise Fault(f"{type(error).__name__}: {str(error)[:500]}") from error
    COUNTS[kind, "accepted"] += 1
    return True


def _check_error(error: BaseException, mentions: tuple[str, ...]) -> None:
    text = str(error)
    if mentions and not any(name in text for name in mentions):
        raise Fault(f"the error names none of {mentions}: {type(error).__name__}: {text[:500]}") from error
    if len(text) > MESSAGE:
        raise Fault(f"an error of {len(text)} characters: {text[:200]} ...") from error
    cause: BaseException | None = error
    while cause is not None:  # a limit that was met deeper down must not be passed on as a fault of the file
        exhausted = isinstance(cause, (MemoryError, Fault)) or "allocate memory" in str(cause)
        if exhausted or (isinstance(cause, RecursionError) and cause is error):
            raise Fault(f"{type(cause).__name__}: {str(cause)[:500]}") from error
        cause = cause.__cause__ or cause.__context__


# ---- Files that are as they should be ----


@cache
def scratch() -> Path:
    """A folder for the process, in memory where that is possible."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="spigan-fuzz-", dir=base))
    owner = os.getpid()
    import atexit

    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def fresh(name: str) -> Path:
    """An empty folder called `name`."""
    folder = scratch() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


TINY: dict[str, Any] = {"resolution": 8, "img_channels": 1, "dim_h": 4, "embed_channels": 2, "channel_base": 16,
                        "channel_max": 4, "ode_layers": 2, "mlp_layers": 2}  # fmt: skip


@cache
def model_files(mapping: str = "ode") -> dict[str, bytes]:
    """config.json and model.safetensors of a tiny model."""
    folder = fresh("valid-model")
    torch.manual_seed(0)
    SPIGAN(ModelConfig(mapping=mapping, **TINY)).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}


def pixels(height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=fmt, **options)
    return buffer.getvalue()


@cache
def images() -> dict[str, bytes]:
    """Small images of every format, and of what is refused: CMYK, 16 bits, several frames, alpha."""
    rgb = Image.fromarray(pixels())
    frames = [Image.fromarray(pixels(9 + i, 9)) for i in range(3)]
    frames = [frame.resize((8, 8)) for frame in frames]
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {f"{fmt.lower()}-{mode}": encoded(rgb.convert(mode), fmt, **options) for fmt, mode, options in (
        ("PNG", "RGB", {}), ("PNG", "L", {}), ("PNG", "P", {}), ("PNG", "1", {}), ("PNG", "RGBA", {}),
        ("PNG", "LA", {}), ("PNG", "I;16", {}), ("JPEG", "RGB", {"exif": exif}), ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("WEBP", "RGB", {"lossless": True}), ("WEBP", "RGBA", {}), ("BMP", "RGB", {}), ("BMP", "P", {}),
        ("GIF", "P", {}), ("TIFF", "RGB", {}), ("TIFF", "CMYK", {}), ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "F", {}), ("TIFF", "RGB", {"compression": "jpeg"}),
    )}  # fmt: skip
    for fmt in ("GIF", "WEBP", "PNG", "TIFF"):
        found[f"{fmt.lower()}-frames"] = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    found["jpeg-mpo"] = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    return found


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)  # of 1980: the same bytes every time
    return buffer.getvalue()


def tarred(members: dict[str, bytes], layout: int = tarfile.GNU_FORMAT) -> bytes:
    """A .tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parquet_of(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


def image_rows(*values: Any) -> Any:
    """An Arrow column as the hub stores images."""
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = [value if value is None or isinstance(value, dict) else {"bytes": value, "path": None} for value in values]
    return pyarrow.array(rows, type=kind)


@cache
def run_files() -> dict[str, bytes]:
    """A training run that has a checkpoint, by name in its folder."""
    from spigan.training.trainer import Trainer

    config = TrainConfig.model_validate({
        "data": {"source": str(image_folder())}, "model": {**TINY, "img_channels": 3}, "batch": 2, "total_kimg": 0.004,
        "tick_kimg": 0.002, "augment": "ada", "pl_weight": 1.0, "pl_interval": 1, "device": "cpu",
    })  # fmt: skip
    folder = scratch() / "valid-run"
    shutil.rmtree(folder, ignore_errors=True)
    Trainer(config, folder, progress=False).fit()
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")]
    names += [p.relative_to(folder).as_posix() for p in (folder / "checkpoints").iterdir()]
    return {name: (folder / name).read_bytes() for name in sorted(names) if not name.startswith("model/")}


@cache
def image_folder() -> Path:
    """A folder of eight images."""
    folder = fresh("images")
    for index in range(8):
        (folder / f"{index}.png").write_bytes(encoded(Image.fromarray(pixels(8 + index, 8 + index)), "PNG"))
    return folder


@cache
def script() -> bytes:
    """A TorchScript network of two features."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(_Means()), buffer)
    return buffer.getvalue()


class _Means(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3))


@cache
def resnet() -> bytes:
    from safetensors.torch import save

    from spigan.evaluation.resnet56 import ResNet56

    return save({k: torch.rand(v.shape) * 0.1 for k, v in ResNet56().state_dict().items()})


GRID = b"""preset = "digits"
better = "lower"
[base]
total_kimg = 1
[base.model]
ode_steps = 2
[product]
intervals = [1, 2]
"model.ode_layers" = [2, 3]
[arms.mlp]
model = {dim_h = 64}
[arms.plain]
augment = "none"
"""


# ---- Readers ----


def read_images(path: Path, **options: Any) -> None:
    """Open a source of images of any kind, and take all of them."""
    options = {"resolution": 8, "channels": 3} | options
    dataset = open_dataset(DataConfig(source=str(path), **options), progress=False)
    for image in dataset:
        if image.dtype != torch.uint8 or tuple(image.shape) != (dataset.channels, *2 * [dataset.resolution]):
            raise Fault(f"an image of {image.dtype} {list(image.shape)}")


def read_model(folder: Path) -> None:
    """Load a model; make an image."""
    model = SPIGAN.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise Fault(f"{name} of a loaded model is not finite")
    if model.config.ode_solver != "dopri5" or model.config.mapping == "mlp":  # its steps depend on the weights
        model(torch.zeros(1, *model.config.z_shape))


def read_run(folder: Path) -> None:
    """Go on with a run: an iteration of each network, and its statistics."""
    from spigan.training.statistics import StatsLog
    from spigan.training.trainer import Trainer

    trainer = Trainer.resume(folder, progress=False)
    images = torch.zeros(2, 3, trainer.dataset.resolution, trainer.dataset.resolution, dtype=torch.uint8)
    for _ in range(2):
        trainer.train_iteration(images)
    StatsLog(folder, trainer.iteration).close()


def read_lmdb(path: Path) -> None:
    """An LMDB is open once in a process, so that every case is a folder of its own."""
    folder = path.parent.rename(scratch() / f"lmdb-{next(_numbers)}")
    try:
        read_images(folder)
    finally:
        shutil.rmtree(folder)


_numbers = count()


def read_cifar(path: Path) -> None:
    """The archive, of batches of two images."""
    kept, cifar.BATCH_IMAGES = cifar.BATCH_IMAGES, 2
    try:
        read_images(path)
    finally:
        cifar.BATCH_IMAGES = kept


def read_config_option(path: Path) -> None:
    """spigan train --config."""
    from spigan.cli.train import train_config

    train_config("digits", path, None, {}, [])


def read_evaluation(path: Path) -> None:
    """Metrics for a model card."""
    from spigan.models.hub import card, describe

    str(card(model(), "user/name", **describe(model(), metrics=path)))


def read_curves(path: Path) -> None:
    """Metrics of a run, for the table of a study and for its resumption."""
    from spigan.ablation.report import read_curve
    from spigan.training.statistics import StatsLog

    read_curve(path.parent, "FD-ResNet56")
    StatsLog(path.parent, 4).close()


def read_best_record(path: Path) -> None:
    from spigan.runs import read_best
    from spigan.training.measure import keep_best

    best = read_best(path.parent.parent)
    if best is not None:
        best["metric"], best["kimg"], best["iteration"] < 3
    keep_best(path.parent.parent, model(), {"FD-ResNet56": 2.0, "iteration": 4, "kimg": 0.004}, "FD-ResNet56")


def read_cache(path: Path) -> None:
    """Features of reference images: what is damaged is computed again."""
    from spigan.evaluation import cache

    cache.load(path, "key", {"features": (4, 2), "mean": (2,)})


def read_plans(path: Path) -> None:
    """Times of layers: what is damaged is measured again."""
    from spigan.ops import plans

    plans.read_plans(path, {"device": "here"})


def read_script(path: Path) -> None:
    from spigan.evaluation.features import load_features

    load_features(f"Means={path}")


def read_resnet(path: Path) -> None:
    from spigan.evaluation.features import load_features

    load_features(f"cifar10-resnet56={path}")


def read_grid(path: Path) -> None:
    from spigan.ablation.grid import read_grid as read

    read(path)


def read_train_config(path: Path) -> None:
    from spigan.runs import read_config

    read_config(path.parent)


# ---- The registry ----


@dataclass(frozen=True)
class Target:
    """A kind of file that is read.

    Attributes:
        name: of the file, in a folder of its own.
        examples: files that are as they should be.
        read: reads it.
        beside: other files in the same folder.
        names: what an error may name instead of the file.
    """

    name: str
    examples: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    beside: Callable[[], dict[str, bytes]] = dict
    names: tuple[str, ...] = ()


CHECKPOINT = "checkpoints/checkpoint-00000004.safetensors"


def _model(path: Path) -> None:
    read_model(path.parent)


def _run(path: Path) -> None:
    read_run(path.parent if path.parent.name != "checkpoints" else path.parent.parent)


def _folder(path: Path) -> None:
    read_images(path.parent)


def _cifar() -> list[bytes]:
    batch = b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\nq\x01(K\x01K\x02K\x03t\x89T"
    batch += struct.pack("<i", 2 * cifar.IMAGE_VALUES) + bytes(2 * cifar.IMAGE_VALUES) + b"tbu."
    archive = tarred({f"cifar-10-batches-py/data_batch_{i}": batch for i in range(1, 6)})
    return [archive, gzip.compress(archive, mtime=0)]


def _lmdb() -> list[bytes]:
    import lmdb

    found = []
    values = [value for name, value in images().items() if name.endswith(("-RGB", "-L", "-P"))]
    large = encoded(Image.fromarray(pixels(64, 64)), "BMP")  # a value that has pages of its own
    for entries in (values[:4], [large, *values[:12]], values[:12] * 20):  # the last makes a tree of two levels
        folder = fresh("valid-lmdb")
        with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as transaction:
            for index, value in enumerate(entries):
                transaction.put(f"{index:04}".encode(), value)
        found.append((folder / "data.mdb").read_bytes())
    return found


def _tar() -> list[bytes]:
    named = dict(list(_named().items())[:4])
    named["a/" + "long" * 40 + ".png"] = images()["png-RGB"]  # which takes a header of its own
    return [tarred(named, layout) for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


@cache
def model() -> SPIGAN:
    folder = fresh("model")
    for name, content in model_files().items():
        (folder / name).write_bytes(content)
    return SPIGAN.from_pretrained(folder)


@cache
def evaluation() -> bytes:
    """What `spigan evaluate --out` writes, as far as it is read."""
    from spigan.models.pretrained import weights_sha256

    return json.dumps({
        "model": {"sha256": weights_sha256(model())}, "metrics": {"FID": 1.5, "recall": 0.5}, "nfe": 1,
        "samples": {"count": 50_000}, "reference": {"source": "cifar10", "split": "train", "count": 50_000},
        "features": {"name": "Inception"}, "date": "2026-11-25",
    }).encode()  # fmt: skip


@cache
def cached_features() -> bytes:
    from safetensors.torch import save

    return save({"features": torch.zeros(4, 2), "mean": torch.zeros(2)}, {"key": "key"})


@cache
def synthesis() -> bytes:
    """A small synthesis network under the names of StyleGAN2-ADA."""
    from safetensors.torch import save

    from spigan.models.generator import Generator

    return save(Generator(8, 3, dim_h=4, channel_base=16, channel_max=4).state_dict())


BEST = json.dumps({"metric": "FD-ResNet56", "value": 3.0, "iteration": 2, "kimg": 0.002, "FD-ResNet56": 3.0}).encode()
METRICS = b"".join(
    json.dumps({"iteration": i, "kimg": i / 1000, "seconds": 1.0 * i, "FD-ResNet56": 9.0 - i}).encode() + b"\n"
    for i in (2, 4, 6)
)
PLANS = b'{"made_on": {"device": "here"}, "plans": {"a": {"chosen": "b", "milliseconds": {"b": 1.5, "c": null}}}}'
GRID_JSON = b'{"preset": "digits", "base": {"total_kimg": 1}, "arms": {"mlp": {"augment": "none"}}, "better": "lower"}'


TARGETS: dict[str, Target] = {
    "model weights": Target(
        "model.safetensors",
        lambda: [model_files("ode")["model.safetensors"]],
        _model,
        lambda: {"config.json": model_files("ode")["config.json"]},
    ),
    "model config": Target(
        "config.json",
        lambda: [model_files("ode")["config.json"]],
        _model,
        lambda: {"model.safetensors": model_files("ode")["model.safetensors"]},
        ("model.safetensors",),
    ),
    "checkpoint": Target(CHECKPOINT, lambda: [run_files()[CHECKPOINT]], _run, run_files),
    "run config": Target("config.json", lambda: [run_files()["config.json"]], read_train_config),
    "run statistics": Target("stats.jsonl", lambda: [run_files()["stats.jsonl"]], _run, run_files),
    "run data record": Target("data.json", lambda: [run_files()["data.json"]], _run, run_files),
    "image": Target("picture.png", lambda: list(images().values()), _folder),
    "zip": Target("pictures.zip", lambda: [zipped(dict(list(_named().items())[:4]))], read_images),
    "parquet": Target(
        "train.parquet",
        lambda: [
            parquet_of({"image": image_rows(*list(images().values())[:4])}, compression=compression)
            for compression in ("none", "snappy", "zstd")
        ],
        read_images,
    ),
    "cifar archive": Target("cifar-10-python.tar.gz", _cifar, read_cifar),
    "LMDB": Target("data.mdb", _lmdb, read_lmdb, names=("lmdb-",)),
    "tar shard": Target("train-000000.tar", _tar, read_images),
    "config option": Target("train.json", lambda: [run_files()["config.json"]], read_config_option, names=("",)),
    "run metrics": Target("metrics.jsonl", lambda: [METRICS], read_curves),
    "record of the best": Target("best/metrics.json", lambda: [BEST], read_best_record),
    "metrics for a card": Target("metrics.json", lambda: [evaluation()], read_evaluation),
    "cache of features": Target("features.safetensors", lambda: [cached_features()], read_cache),
    "cache of plans": Target("plans.json", lambda: [PLANS], read_plans),
    "grid file, JSON": Target("grid.json", lambda: [GRID_JSON], read_grid),
    "TorchScript network": Target("means.pt", lambda: [script()], read_script),
    "ResNet-56 weights": Target("resnet.safetensors", lambda: [resnet()], read_resnet),
    "grid file": Target("grid.toml", lambda: [GRID], read_grid),
}


def _named() -> dict[str, bytes]:
    return {f"{name}.{name.split('-')[0].replace('tiff', 'tif')}": content for name, content in images().items()}


def try_file(kind: str, content: bytes, timers: bool = True) -> bool:
    """Read `content` as a file of a kind; see `attempt`."""
    target = TARGETS[kind]
    folder = fresh("case")
    for name, other in target.beside().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(other)
    path = folder / target.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return attempt(kind, lambda: target.read(path), target.name, *target.names, timers=timers)


# ---- safetensors, piece by piece ----


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
