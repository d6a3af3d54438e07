"""Shared by all benchmarks: rows that are checked and timed, and the final table.

pytest benchmarks/ --benchmark-only --benchmark-json run.json && spigan bench report run.json
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spigan.ops import fir_bias_act
from spigan.ops.timing import without_launches
from spigan.ops.upfirdn2d import fir_filter, upfirdn2d

from . import measuring
from .measuring import DEVICE, copy_rate, device_name, matrix_rate, peak_memory, synchronize, versions

_rows: list[dict[str, Any]] = []


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
            some time at `matrix_rate` of their precision and `copy_rate()`; the longer of the two times is the limit.
        dtype: dtype of the matrix products.
        products: how they are computed, "convolution" or "matrix", on which the precision of float32 depends on a GPU.
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
        dtype: torch.dtype = torch.float32,
        products: str = "convolution",
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
        # takes seconds is warm after the first one and varies little, but for a GPU, where it compiled or captured.
        rounds, slow = 1, first_seconds > 2.5 and "compile" not in name and DEVICE.type == "cpu"
        if not slow:
            if DEVICE.type == "cuda":
                synchronized()  # a sampler captures its graph in the second call
            start = time.perf_counter()
            synchronized()
            rounds = max(3, min(200, int(0.3 / (time.perf_counter() - start))))
        benchmark.group = group
        benchmark.pedantic(synchronized, rounds=rounds)
        seconds = without_launches(function, benchmark.stats.stats.median, DEVICE) / share
        numbers: dict[str, Any] = {
            "benchmark": request.module.__name__.rpartition(".")[2],
            "group": group,
            "name": name,
            "seconds": seconds,
            "rounds": rounds,
        }
        if flop or moved:
            precision = measuring.precision_of(dtype, products)
            limits = {"products": flop / matrix_rate(precision), "copying": moved / copy_rate()}
            bound = max(limits, key=limits.__getitem__)
            numbers |= {
                "flop": flop / share,
                "bytes": moved / share,
                "precision": precision,
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
        "matrix_rate": {precision: matrix_rate(precision) for precision in measuring.PRECISIONS},
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
