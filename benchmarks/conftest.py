"""Shared by all benchmarks: the device and its measured limits, rows that are checked and timed, and the final table.

pytest benchmarks/ --benchmark-only --benchmark-json run.json && spigan bench report run.json
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cpuinfo import get_cpu_info
from torch import Tensor
from torch.nn import functional as F

import spigan
from spigan.ops import fir_bias_act
from spigan.ops.convolution import allows_tf32
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_rows: list[dict[str, Any]] = []


def synchronize() -> None:
    """Wait until the device has finished its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def _median_seconds(function: Callable[[], object], repeats: int = 9) -> float:
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@contextmanager
def convolutions_in(precision: str) -> Iterator[None]:
    """Convolve float32 on a GPU in "tf32" or "ieee" precision inside the `with` block."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def convolution_precision(dtype: torch.dtype) -> str:
    """Return the precision in which every backend convolves `dtype` here: "tf32", which is PyTorch's default for
    float32 on a GPU, or the name of the dtype."""
    return "tf32" if allows_tf32(torch.empty(0, device=DEVICE, dtype=dtype)) else str(dtype)[6:]


def convolution_tolerance(dtype: torch.dtype, exact: float, bfloat16: float) -> float:
    """Return the tolerance of results whose convolutions are compared with exact ones.

    Args:
        dtype: Of the images.
        exact: The tolerance for float32 that is not rounded to TF32.
        bfloat16: The tolerance for bfloat16. TF32 keeps 3 bits more, so that its tolerance is an eighth.
    """
    return {"bfloat16": bfloat16, "tf32": bfloat16 / 8}.get(convolution_precision(dtype), exact)


@cache
def matrix_rate(precision: str) -> float:
    """Measure the FLOP/s of a large square matrix product in "float32", "tf32" or "bfloat16".

    The faster of a product and a 1x1 convolution counts; on a CPU, they use two libraries, MKL and oneDNN.
    """
    size = 8192 if DEVICE.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    image, weight = a.view(1, size, 1, size).permute(0, 3, 1, 2), b[:, :, None, None]
    with convolutions_in("tf32" if precision == "tf32" else "ieee"):
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


def peak_memory(function: Callable[[], object]) -> int:
    """Measure the peak bytes that `function` adds: to the tensors on a GPU, to the process on a CPU."""
    synchronize()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
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


def grouped_modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    style: Tensor,
    *,
    demodulate: bool = True,
    up: int = 1,
    resample_filter: Tensor | None = None,
    **end: Any,
) -> Tensor:
    """An alternative to `modulated_conv2d`: a convolution with one group, and its own weights, for each image."""
    n, channels_in, height, width = x.shape
    channels_out, _, kernel, _ = weight.shape
    weights = weight[None] * style[:, None, :, None, None]
    if demodulate:
        weights = weights * (weights.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    weights = weights.to(x.dtype)
    x = x.reshape(1, n * channels_in, height, width)
    if up == 2:
        x = F.conv_transpose2d(x, weights.transpose(1, 2).flatten(0, 1), stride=2, groups=n)
    else:
        x = F.conv2d(x, weights.flatten(0, 1), padding=kernel // 2, groups=n)
    x = x.view(n, channels_out, *x.shape[2:])
    if up == 2:
        filter = fir_filter(device=x.device) if resample_filter is None else resample_filter
        x = upfirdn2d(x, filter, padding=(1, 1), gain=4.0)
    return fir_bias_act(x, **end, backend="reference")


@pytest.fixture
def row(benchmark: Any, request: Any) -> Callable[..., None]:
    """row(group, name, function, expected=..., ...): check the result of `function`, then time it.

    Args:
        group: what is compared: the operation, its sizes and dtype.
        name: the implementation.
        function: takes no arguments; its result is compared with `expected` before anything is timed.
        expected: the right result, or None if `check` is given.
        tolerance: the largest absolute difference allowed.
        check: called with the result instead of a comparison; raises if the result is wrong.
        flop, moved: floating-point operations, and bytes read and written, that one call needs at least. They take
            some time at `matrix_rate(precision)` and `copy_rate()`; the longer of the two times is the limit.
        precision: of the matrix products; for those of convolutions, `convolution_precision(dtype)`.
        layer_bytes: size of the largest layer's input and output, with which the call's peak memory is compared.
        memory: whether to measure the call's peak memory.
        images: number of images that one call makes or trains on.
        nfe: number of network evaluations per image.
        share: the part of the whole work that `function` does; the time is divided by it and marked.
        paper_seconds: the time of the whole in the paper.
    """

    def measure(
        group: str,
        name: str,
        function: Callable[[], Any],
        *,
        expected: Tensor | None = None,
        tolerance: float = 0.0,
        check: Callable[[Any], None] | None = None,
        flop: float = 0.0,
        moved: float = 0.0,
        precision: str = "float32",
        layer_bytes: int | None = None,
        memory: bool = False,
        images: int | None = None,
        nfe: int | None = None,
        share: float = 1.0,
        paper_seconds: float | None = None,
    ) -> None:
        start = time.perf_counter()
        result = function()
        synchronize()
        first_seconds = time.perf_counter() - start
        if check is not None:
            check(result)
        else:
            assert expected is not None, "pass `expected` or `check`: the time of an unchecked result is worthless"
            torch.testing.assert_close(result.double(), expected.double(), atol=tolerance, rtol=0)
        del result

        def synchronized() -> None:
            function()
            synchronize()

        # Spend about a third of a second on each row, so that the whole suite takes less than ten minutes. A call that
        # takes seconds is warm after the first one and varies little.
        rounds, slow = 1, first_seconds > 2.5 and "compile" not in name
        if not slow:
            start = time.perf_counter()
            synchronized()
            rounds = max(3, min(200, int(0.3 / (time.perf_counter() - start))))
        benchmark.group = group
        benchmark.pedantic(synchronized, rounds=rounds)
        seconds = benchmark.stats.stats.median / share
        numbers: dict[str, Any] = {
            "benchmark": request.module.__name__.rpartition(".")[2],
            "group": group,
            "name": name,
            "seconds": seconds,
            "rounds": rounds,
        }
        limits = {"products": flop / matrix_rate(precision), "copying": moved / copy_rate()} if flop or moved else {}
        if limits:
            bound = max(limits, key=limits.__getitem__)
            numbers |= {
                "flop": flop / share,
                "bytes": moved / share,
                "bound": bound,
                "limit": limits[bound] / share / seconds,
            }
        if (layer_bytes is not None or memory) and seconds < 5.0:
            numbers |= {"peak_bytes": peak_memory(function)}
            numbers |= {} if layer_bytes is None else {"layer_bytes": layer_bytes}
        if images is not None:
            numbers |= {"images": images}
        if nfe is not None:
            numbers |= {"nfe": nfe}
        if share != 1.0:
            numbers |= {"timed_share": share}
        if paper_seconds is not None:
            numbers |= {"paper_seconds": paper_seconds}
        benchmark.extra_info |= numbers
        _rows.append(numbers)

    return measure


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Add to the JSON file what `spigan bench report` states about the run."""
    machine_info["spigan"] = {
        "device": device_name(),
        "versions": versions(),
        "float32": {
            "convolutions": convolution_precision(torch.float32),
            "products": "tf32" if DEVICE.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "float32",
        },
        "matrix_rate": {
            precision: matrix_rate(precision)
            for precision in dict.fromkeys(("float32", convolution_precision(torch.float32), "bfloat16"))
        },
        "copy_rate": copy_rate(),
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the rows as a table; ratios are to the row "reference" of the same group."""
    if not _rows:
        return
    terminalreporter.section(f"{device_name()}, {', '.join(f'{k} {v}' for k, v in versions().items())}")
    terminalreporter.write_line(
        "Times are medians. x: speedup over the reference. %: share of the limit, the larger of FLOP / rate of a large "
        "matrix product and bytes / rate of a large copy. in + out: peak memory divided by the size of the largest "
        "layer's input and output. ~: extrapolated from a part."
    )
    for group in dict.fromkeys(row["group"] for row in _rows):
        rows = [row for row in _rows if row["group"] == group]
        reference = next((row["seconds"] for row in rows if row["name"] == "reference"), None)
        terminalreporter.write_line(group)
        for row in sorted(rows, key=lambda row: row["seconds"]):
            terminalreporter.write_line(f"  {row['name']:<28}{'  '.join(_cells(row, reference))}")


def _cells(row: dict[str, Any], reference: float | None) -> list[str]:
    seconds = row["seconds"]
    cells = [f"{'~' if 'timed_share' in row else ''}{1e3 * seconds:.3f} ms".rjust(16)]
    cells.append("" if reference is None else f"{reference / seconds:.2f} x")
    cells.append(f"{row['flop'] / seconds / 1e9:.0f} GFLOP/s" if row.get("flop") else "")
    cells.append(f"{row['bytes'] / seconds / 1e9:.1f} GB/s" if row.get("bound") == "copying" else "")
    cells.append(f"{100 * row['limit']:.0f} %" if "limit" in row else "")
    cells.append(f"{row['images'] / seconds:.1f} images/s" if "images" in row else "")
    cells.append(f"NFE {row['nfe']}" if "nfe" in row else "")
    if "layer_bytes" in row:
        cells.append(f"{row['peak_bytes'] / row['layer_bytes']:.2f} in + out")
    elif "peak_bytes" in row:
        cells.append(f"{row['peak_bytes'] / 2**20:.0f} MiB")
    cells.append(f"paper: {row['paper_seconds']:g} s" if "paper_seconds" in row else "")
    return [cell for cell in cells if cell]
