"""What all benchmarks share: the device, its limits measured in the same run, checked and timed rows, one table.

pytest benchmarks/ --benchmark-only
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

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
    """FLOP/s of a large square matrix product in `dtype`, measured in this process."""
    size = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b)


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
    ) -> None:
        result = function()
        if check is not None:
            check(result)
        else:
            assert expected is not None, "a time is worth nothing where the result is not checked"
            torch.testing.assert_close(result.double(), expected.double(), atol=tolerance, rtol=0)

        def synchronized() -> None:
            function()
            synchronize()

        benchmark.group = group
        benchmark(synchronized)
        seconds = benchmark.stats.stats.median
        numbers: dict[str, Any] = {"group": group, "name": name, "milliseconds": 1e3 * seconds}
        if flop is not None:
            numbers |= {"rate": f"{flop / seconds / 1e9:.0f} GFLOP/s", "limit": flop / seconds / matrix_rate(dtype)}
        if moved is not None:
            numbers |= {"rate": f"{moved / seconds / 1e9:.1f} GB/s", "limit": moved / seconds / copy_rate()}
        benchmark.extra_info |= numbers | {"device": device_name()}
        _rows.append(numbers)

    return measure


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The rows as one table; the ratio is to the group's row "reference"."""
    if not _rows:
        return
    terminalreporter.section(device_name())
    terminalreporter.write_line(
        "Medians. x: times the speed of the reference. %: of a large matrix product's or a large copy's rate."
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
            )
