"""What all benchmarks share: the device, its limits measured in the same run, checked and timed rows, one table.

pytest benchmarks/ --benchmark-only
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
from torch import Tensor
from torch.nn import functional as F

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
    """Device, threads and versions that a number belongs to."""
    if DEVICE.type == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"CPU {platform.machine()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


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
def row(benchmark: Any) -> Callable[..., None]:
    """row(group, name, function, expected=..., ...): check the result of `function`, then time it.

    Args:
        group: what is compared: operation, sizes, dtype.
        name: which implementation.
        function: no arguments; its result is compared with `expected` before anything is timed.
        expected: what it must return, or None where `check` tells.
        tolerance: greatest absolute difference.
        check: called with the result instead; raises when it is wrong.
        flop: floating-point operations of one call, for the rate and the percentage of `matrix_rate(dtype)`.
        moved: bytes that one call must read and write, for the rate and the percentage of `copy_rate()`.
        dtype: dtype of the matrix products.
        layer_bytes: input and output of the largest layer, with which the call's peak memory is compared.
    """

    def measure(
        group: str,
        name: str,
        function: Callable[[], Any],
        *,
        expected: Tensor | None = None,
        tolerance: float = 0.0,
        check: Callable[[Any], None] | None = None,
        flop: float | None = None,
        moved: float | None = None,
        dtype: torch.dtype = torch.float32,
        layer_bytes: int | None = None,
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

        def synchronized() -> None:
            function()
            synchronize()

        benchmark.group = group
        if first_seconds < 1.0 or DEVICE.type == "cuda":
            benchmark(synchronized)
        else:
            benchmark.pedantic(synchronized, rounds=1 if first_seconds > 5.0 else 2)
        seconds = benchmark.stats.stats.median
        numbers: dict[str, Any] = {"group": group, "name": name, "milliseconds": 1e3 * seconds}
        if flop is not None:
            numbers |= {"rate": f"{flop / seconds / 1e9:.0f} GFLOP/s", "limit": flop / seconds / matrix_rate(dtype)}
        if moved is not None:
            numbers |= {"rate": f"{moved / seconds / 1e9:.1f} GB/s", "limit": moved / seconds / copy_rate()}
        if layer_bytes is not None:
            numbers["memory"] = f"{peak_memory(function) / layer_bytes:.2f} in + out"
        benchmark.extra_info |= numbers | {"device": device_name()}
        _rows.append(numbers)

    return measure


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The rows as one table; the ratio is to the group's row "reference"."""
    if not _rows:
        return
    terminalreporter.section(device_name())
    terminalreporter.write_line(
        "Medians. x: times the speed of the reference. %: of a large matrix product's or a large copy's rate. "
        "in + out: peak memory over the largest layer's input and output."
    )
    for group in dict.fromkeys(row["group"] for row in _rows):
        rows = [row for row in _rows if row["group"] == group]
        reference = next((row["milliseconds"] for row in rows if row["name"] == "reference"), None)
        terminalreporter.write_line(group)
        for row in sorted(rows, key=lambda row: row["milliseconds"]):
            ratio = "" if reference is None else f"{reference / row['milliseconds']:.2f} x"
            limit = f"{100 * row['limit']:.0f} %" if "limit" in row else ""
            terminalreporter.write_line(
                f"  {row['name']:<28}{row['milliseconds']:>12.3f} ms{ratio:>12}{row.get('rate', ''):>16}{limit:>8}"
                f"{row.get('memory', ''):>18}"
            )
