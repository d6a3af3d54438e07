"""The device of the benchmarks, its measured limits, and how times and memory are measured on it."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from cpuinfo import get_cpu_info
from torch.nn import functional as F

import spigan
from spigan.ops.timing import seconds_per_call

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

PRECISIONS = ("float32", "TF32", "bfloat16") if DEVICE.type == "cuda" else ("float32", "bfloat16")
"""Precisions of products whose rates are reported. On a GPU, float32 is IEEE's, without TF32."""


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _median_seconds(function: Callable[[], object], repeats: int = 9) -> float:
    for _ in range(3):
        function()
    synchronize()
    return statistics.median(seconds_per_call(function, 1, DEVICE) for _ in range(repeats))


def precision_of(dtype: torch.dtype, products: str) -> str:
    """Return the precision in which the device computes products of `dtype` now, one of `PRECISIONS` or float16.

    Args:
        dtype: dtype of the factors.
        products: "convolution" or "matrix".
    """
    if DEVICE.type == "cuda" and dtype == torch.float32:
        settings = torch.backends.cudnn.conv if products == "convolution" else torch.backends.cuda.matmul
        return "TF32" if settings.fp32_precision == "tf32" else "float32"
    return str(dtype).removeprefix("torch.")


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@cache
def matrix_rate(precision: str) -> float:
    """Measure the FLOP/s of a large square matrix product.

    The faster of a product and a 1x1 convolution counts; on a CPU, they use two libraries, MKL and oneDNN.

    Args:
        precision: see `precision_of`. The settings for TF32 do not matter.
    """
    size = 8192 if DEVICE.type == "cuda" else 2048
    dtype = torch.float32 if precision == "TF32" else getattr(torch, precision)
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    image, weight = a.view(1, size, 1, size).permute(0, 3, 1, 2), b[:, :, None, None]
    with _tf32(precision == "TF32"):
        return 2 * size**3 / min(_median_seconds(lambda: a @ b), _median_seconds(lambda: F.conv2d(image, weight)))


@cache
def copy_rate() -> float:
    """Measure how many bytes/s a large copy reads and writes."""
    source = torch.ones((1 << 30) if DEVICE.type == "cuda" else (1 << 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))


def device_name() -> str:
    """Return the name of the device, under which results are reported."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = get_cpu_info()
    bfloat16 = " BF16" if "avx512_bf16" in cpu.get("flags", ()) else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu.get('brand_raw', platform.machine())}, {capability}{bfloat16}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Return the versions of everything that affects a result."""
    found = {"spigan": spigan.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"cuda": str(torch.version.cuda)} if DEVICE.type == "cuda" else {})


def graph_pool_bytes() -> int:
    """Return the memory of all CUDA graphs. It stays with them, but is allocated only while they are captured."""
    return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0))


def peak_memory(function: Callable[[], object]) -> int:
    """Measure the peak bytes that `function` adds.

    On a GPU, that is the peak of the tensors, and the memory in which its CUDA graphs compute. On a CPU, it is that of
    the process.
    """
    synchronize()
    if DEVICE.type == "cuda":
        gc.collect()  # samplers of other rows, with their graphs
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before + graph_pool_bytes()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kibibytes(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    library, mmap_threshold = ctypes.CDLL(None), -3  # of glibc's mallopt
    library.mallopt(mmap_threshold, 1 << 20)  # freed memory returns to the system and does not count
    function()
    gc.collect()
    library.malloc_trim(0)
    reset.write_text("5")  # reset the peak
    before = kibibytes("VmRSS:")
    function()
    peak = kibibytes("VmHWM:") - before
    library.mallopt(mmap_threshold, 32 << 20)  # the value that glibc itself reaches after such sizes
    return 1024 * peak
