"""Measure how many images per second the loader reads from each kind of source.

python benchmarks/data_loader.py PHOTOGRAPHS [--count 4096]

Makes `count` images of 256 x 256 from crops and reflections of the photographs in a folder, and stores them in every
layout: files, LSUN's LMDB, tar shards, parquet as on the Hub (100 images per row group), and parquet from
`spigan data convert`. Batches of 64 are loaded in the shuffled order of training. No decoded image is kept, parquet is
read in place, and the files are in the system's cache. Each row shows medians over three epochs: first in CPU time of
one process, then in wall-clock time with worker processes.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import lmdb
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from spigan.data import DataConfig, ImageDataset, limits, loader, open_dataset
from spigan.data.convert import convert
from spigan.data.decode import IMAGE_SUFFIXES
from spigan.data.workers import available_cores

FORMATS = {"webp": 75, "jpeg": 90}  # and their qualities
BATCH = 64


def picture(files: list[Path], number: int) -> Image.Image:
    """Make a 256 x 256 crop of one of the photographs, different for each number."""
    rng = random.Random(number)
    image = Image.open(files[number % len(files)]).convert("RGB")
    side = rng.randint(min(image.size) * 3 // 4, min(image.size))
    left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    image = image.resize((256, 256), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def write_sets(root: Path, images: list[bytes], kind: str) -> dict[str, Path]:
    """Write the same encoded images in every layout, and return the paths by layout."""
    sets = {name: root / name for name in ("files", "lmdb", "tar", "hub", "converted")}
    for name in ("files", "tar", "hub"):
        sets[name].mkdir(parents=True)
    with lmdb.open(str(sets["lmdb"]), map_size=1 << 34) as environment, environment.begin(write=True) as transaction:
        for number, data in enumerate(images):
            (sets["files"] / f"{number:06}.{kind}").write_bytes(data)
            transaction.put(b"%040x" % number, data)
    for start in range(0, len(images), 1000):
        with tarfile.open(sets["tar"] / f"train-{start // 1000:06}.tar", "w") as archive:
            for number, data in enumerate(images[start : start + 1000], start):
                member = tarfile.TarInfo(f"{number:06}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    table = pyarrow.table({"image": pyarrow.array([{"bytes": data, "path": None} for data in images])})
    pyarrow.parquet.write_table(table, sets["hub"] / "train-00000-of-00001.parquet", row_group_size=100)
    config = DataConfig(source=str(sets["files"]), resolution=256, channels=3)
    convert(config, sets["converted"], image_format=kind, quality=FORMATS[kind], progress=False)  # type: ignore[arg-type]
    return sets


def rates(dataset: ImageDataset, workers: int) -> tuple[float, float]:
    """Return images per second of this process's CPU time and of wall-clock time, medians over three epochs."""
    measured = []
    for epoch in range(3):
        batches = loader(dataset, batch_size=BATCH, seed=epoch, num_workers=workers)
        next(batches)  # starts the workers
        busy, began = time.process_time(), time.perf_counter()
        for _ in range(len(dataset) // BATCH):
            next(batches)
        count = len(dataset) // BATCH * BATCH
        measured.append((count / (time.process_time() - busy), count / (time.perf_counter() - began)))
    return statistics.median(rate for rate, _ in measured), statistics.median(rate for _, rate in measured)


def main() -> None:
    """Measure all layouts and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=available_cores())
    arguments = parser.parse_args()
    files = sorted(file for file in arguments.photographs.iterdir() if file.suffix in IMAGE_SUFFIXES)
    torch.set_num_threads(1)
    limits.CACHE_BYTES = limits.ENCODED_CACHE_BYTES = 0
    print(f"| images | source | open, s | a core, images/s | {arguments.workers} workers, images/s |")
    print("| --- " * 5 + "|")
    for kind, quality in FORMATS.items():
        images = []
        for number in range(arguments.count):
            buffer = io.BytesIO()
            picture(files, number).save(buffer, kind, quality=quality)
            images.append(buffer.getvalue())
        size = sum(map(len, images)) / len(images) / 1000
        with tempfile.TemporaryDirectory() as root:
            for name, path in write_sets(Path(root), images, kind).items():
                began = time.perf_counter()
                dataset = open_dataset(DataConfig(source=str(path)), progress=False)
                opening = time.perf_counter() - began
                core, clock = rates(dataset, 0)[0], rates(dataset, arguments.workers)[1]
                print(f"| {kind}, {size:.1f} kB | {name} | {opening:.2f} | {core:.0f} | {clock:.0f} |", flush=True)


if __name__ == "__main__":
    main()
