"""What all benchmarks share: the device, its limits measured in the same run, checked and timed rows, one table.

pytest benchmarks/ --benchmark-only --benchmark-json run.json && spigan bench report run.json
"""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable
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
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_rows: list[dict[str, Any]] = []


def synchronize() -> None:
    """Wait until the device has done what it was given."""
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


@cache
def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product in `dtype`, measured in this process.

    As a product and as a 1x1 convolution, of which the faster counts: on a CPU they are two libraries, MKL and oneDNN.
    """
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    image, weight = a.view(1, size, 1, size).permute(0, 3, 1, 2), b[:, :, None, None]
    return 2 * size**3 / min(_median_seconds(lambda: a @ b), _median_seconds(lambda: F.conv2d(image, weight)))


@cache
def copy_rate() -> float:
    """Bytes/s read and written by a large copy, measured in this process."""
    source = torch.ones((1 << 30) if DEVICE.type == "cuda" else (1 << 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_seconds(lambda: target.copy_(source))


def device_name() -> str:
    """The device that a number belongs to."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = get_cpu_info()
    bfloat16 = " BF16" if "avx512_bf16" in cpu.get("flags", ()) else ""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu.get('brand_raw', platform.machine())}, {capability}{bfloat16}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of what a number depends on."""
    found = {"spigan": spigan.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return found | ({"cuda": str(torch.version.cuda)} if DEVICE.type == "cuda" else {})


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes that `function` takes at most beside what there is before: of tensors on a GPU, of the process on a CPU."""
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
    library.mallopt(mmap_threshold, 1 << 20)  # what is freed goes back to the system and does not count
    function()
    gc.collect()
    library.malloc_trim(0)
    reset.write_text("5")  # the peak begins anew
    before = kibibytes("VmRSS:")
    function()
    peak = kibibytes("VmHWM:") - before
    library.mallopt(mmap_threshold, 32 << 20)  # as it becomes where such sizes are allocated and freed
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
    """A rival of `modulated_conv2d`: weights for each image, and one group for each image in one convolution."""
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
        group: what is compared: operation, sizes, dtype.
        name: which implementation.
        function: no arguments; its result is compared with `expected` before anything is timed.
        expected: what it must return, or None where `check` tells.
        tolerance: greatest absolute difference.
        check: called with the result instead; raises when it is wrong.
        flop, moved: floating-point operations and bytes read and written that one call cannot do without; its limit is
            the time of the larger part at `matrix_rate(dtype)` and `copy_rate()`.
        dtype: dtype of the matrix products.
        layer_bytes: input and output of the largest layer, with which the call's peak memory is compared.
        memory: measure the call's peak memory.
        images: that one call makes or trains on.
        nfe: network evaluations for an image.
        share: part of the whole that `function` does; the time is divided by it and marked.
        paper_seconds: what the paper says of the whole.
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
        dtype: torch.dtype = torch.float32,
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
            assert expected is not None, "a time is worth nothing where the result is not checked"
            torch.testing.assert_close(result.double(), expected.double(), atol=tolerance, rtol=0)
        del result

        def synchronized() -> None:
            function()
            synchronize()

        # About a third of a second a row, so that the whole suite stays within ten minutes; what takes seconds is warm
        # after its first call and varies little.
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
        limits = {"products": flop / matrix_rate(dtype), "copying": moved / copy_rate()} if flop or moved else {}
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
    """What `spigan bench report` says of the run, in the JSON beside the rows."""
    machine_info["spigan"] = {
        "device": device_name(),
        "versions": versions(),
        "matrix_rate": {str(dtype)[6:]: matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)},
        "copy_rate": copy_rate(),
    }


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The rows as one table; the ratio is to the group's row "reference"."""
    if not _rows:
        return
    terminalreporter.section(f"{device_name()}, {', '.join(f'{k} {v}' for k, v in versions().items())}")
    terminalreporter.write_line(
        "Medians. x: times the speed of the reference. %: of the limit, the larger of flop / rate of a large matrix "
        "product and bytes / rate of a large copy. in + out: peak memory over the largest layer's input and output. "
        "~: multiplied from a part."
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
