"""Measure speed on this machine: `spigan bench`, its profile, and reports of the benchmark suite."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spigan.files import atomic_path

if TYPE_CHECKING:
    from spigan.models import SPIGAN
    from spigan.sampling import Sampler

# ---- This machine, now ----


def random_model(preset: str, device: str | None = None) -> SPIGAN:
    """Return the network of a preset with random weights, which is as slow as a trained one."""
    import torch

    from spigan.config import ModelConfig
    from spigan.models import SPIGAN
    from spigan.models.load import resolve_device
    from spigan.presets import preset_fields

    torch.manual_seed(0)
    config = ModelConfig.model_validate(preset_fields(preset)["model"])
    return SPIGAN(config).eval().requires_grad_(False).to(resolve_device(device))


def time_sampler(sampler: Sampler, n: int, repeats: int = 7) -> dict[str, float]:
    """Time `n` images and the stages of one batch.

    Args:
        sampler: the sampler to time.
        n: number of images, with seeds 0 to n - 1.
        repeats: number of timed calls.

    Returns:
        Times in seconds. "first": the first call, including its preparations. "total": the median of `repeats` calls.
        "noise", "mapping", "synthesis" and "convert": medians for the stages of a batch of min(n, batch_size) images.
        On a GPU, those of short stages leave out the time of the launch.
    """
    import torch

    from spigan.images import to_uint8
    from spigan.ops import philox_normal, use_backend
    from spigan.ops.timing import without_launches

    model, device = sampler.model, sampler.device

    def seconds(function: Callable[[], Any]) -> float:
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    def median(function: Callable[[], Any]) -> float:
        seconds(function)
        return statistics.median(seconds(function) for _ in range(repeats))

    def stage(function: Callable[[], Any]) -> float:
        return without_launches(function, median(function), device)

    times = {"first": seconds(lambda: sampler(range(n)))}
    times["total"] = median(lambda: sampler(range(n)))
    seeds = torch.arange(min(n, sampler.batch_size), device=device)
    with torch.inference_mode(), use_backend(sampler.backend):
        z = philox_normal((len(seeds), *model.config.z_shape), seed=seeds)
        h = model.mapping(z)

        def synthesize() -> Any:
            with torch.autocast(device.type, sampler.dtype, enabled=sampler.dtype != torch.float32):
                return model.generator(h, "const")

        images = synthesize()
        times["noise"] = stage(lambda: philox_normal(z.shape, seed=seeds))
        times["mapping"] = stage(lambda: model.mapping(z))
        times["synthesis"] = stage(synthesize)
        times["convert"] = stage(lambda: to_uint8(images))
    return times


def profile_sampler(sampler: Sampler, n: int, path: Path) -> None:
    """Write a Chrome trace of `n` images, with a range for each stage and operation.

    Args:
        sampler: a sampler without CUDA graphs, because the profiler does not see the stages inside a graph.
        n: number of images.
        path: JSON file to write, for chrome://tracing or ui.perfetto.dev.
    """
    from torch.profiler import ProfilerActivity, profile

    sampler(range(n))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if sampler.device.type == "cuda" else [])
    with profile(activities=activities) as profiler:
        sampler(range(n))
    with atomic_path(path) as scratch:
        profiler.export_chrome_trace(str(scratch))


# ---- Report of a run of the suite ----

_TITLES = {  # in this order
    "bench_sampling": "Sampling",
    "bench_synthesis": "Synthesis network",
    "bench_modulated_conv2d": "modulated_conv2d",
    "bench_rk4_mlp": "rk4_mlp",
    "bench_path_interpolate": "path_interpolate",
    "bench_philox_normal": "philox_normal",
    "bench_training": "Training",
}
_KERNELS = ("cpp", "triton", "cuda")
_KERNEL_TITLES = ("kernel, x", "kernel, images/s", "kernel, of the limit", "kernel's peak memory, in + out")


def write_report(runs: Sequence[Path], out: Path) -> list[Path]:
    """Write tables, a plot and compact JSON for runs of `pytest benchmarks/ --benchmark-only --benchmark-json RUN`.

    Args:
        runs: JSON files from the same device. If several contain the same row, the last file counts.
        out: folder of the report.

    Returns:
        The paths of <device>.json, <device>.md and <device>.png.

    Raises:
        ValueError: if a file is not such a run, or the runs come from different devices.
        ImportError: if matplotlib, for the plot, is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - before anything is written
    except ImportError as error:
        raise ImportError('the plot needs matplotlib: pip install "spigan[bench]"') from error
    report = merge([read_run(path) for path in runs])
    name = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    paths = [out / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    with atomic_path(paths[0]) as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with atomic_path(paths[1]) as scratch:
        scratch.write_text(markdown(report, paths[2].name), encoding="utf-8")
    with atomic_path(paths[2]) as scratch:
        plot(report, scratch)
    return paths


def read_run(path: Path) -> dict[str, Any]:
    """Read a run and reduce it to what the report shows. The JSON of a report is also accepted.

    Returns:
        {"device", "date", "versions", "matrix_rate", "copy_rate", "rows": [...]}.

    Raises:
        ValueError: if the file is not a run of the benchmark suite.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if isinstance(run, dict) and {"device", "date", "rows"} <= run.keys():
        return run
    try:
        machine = run["machine_info"]["spigan"]
        rows = [benchmark["extra_info"] for benchmark in run["benchmarks"]]
        return {**machine, "date": run["datetime"][:10], "rows": [row for row in rows if "group" in row]}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a run of the benchmark suite; make one with: "
            f"pytest benchmarks/ --benchmark-only --benchmark-json {path.name}"
        ) from error


def merge(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merge runs from the same device into one. Each row keeps the date of its run.

    Raises:
        ValueError: if the runs come from different devices.
    """
    if len(devices := {run["device"] for run in runs}) != 1:
        raise ValueError(f"the runs come from different devices: {'; '.join(sorted(devices))}")
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for run in runs:
        for row in run["rows"]:
            rows[row["benchmark"], row["group"], row["name"]] = {"date": run["date"], **row}
    order = list(_TITLES)
    known = {key: order.index(key[0]) if key[0] in order else len(order) for key in rows}
    newest = max(runs, key=lambda run: run["date"])
    return {**newest, "rows": [rows[key] for key in sorted(rows, key=known.__getitem__)]}


def markdown(report: dict[str, Any], picture: str) -> str:
    """Return the tables of a report in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in report["matrix_rate"].items())
    lines = [
        f"# {report['device']}",
        "",
        f"{report['date']}; {versions}. A large matrix product: {rates}; a large copy: "
        f"{report['copy_rate'] / 1e9:.3g} GB/s. Written by `spigan bench report`; how to read a row: "
        "[docs/benchmarks.md](../../docs/benchmarks.md).",
        "",
        f"![Times, roofline, bandwidth]({picture})",
    ]
    for benchmark in dict.fromkeys(row["benchmark"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["benchmark"] == benchmark]
        lines += ["", f"## {_TITLES.get(benchmark, benchmark)}"]
        lines += _sampling_tables(rows) if any("nfe" in row for row in rows) else _comparison(rows)
    if len(dates := {row["date"] for row in report["rows"]}) > 1:
        lines += ["", f"Rows were measured from {min(dates)} to {max(dates)}."]
    return "\n".join(lines) + "\n"


def _sampling_tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        cells = [
            [
                row["name"],
                str(row.get("nfe", "")),
                _duration(row),
                f"{row['images'] / row['seconds']:.3g}" if "images" in row else "",
                f"{100 * row['limit']:.0f} %" if "limit" in row else "",
                f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else "",
                f"{row['paper_seconds']:g} s" if "paper_seconds" in row else "",
            ]
            for row in sorted((row for row in rows if row["group"] == group), key=lambda row: row["seconds"])
        ]
        titles = ["", "NFE", "time", "images/s", "of the limit", "peak memory", "the paper's time"]
        lines += ["", f"**{group}**", "", *_table(titles, cells)]
    if any("timed_share" in row for row in rows):
        lines += ["", "~ Extrapolated: only some evaluations of the chain, or some images of the batch, were timed."]
    return lines


def _comparison(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of milliseconds, with a row per group, a column per implementation, and the best kernel's gain."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = []
    for group in dict.fromkeys(row["group"] for row in rows):
        found = {row["name"]: row for row in rows if row["group"] == group}
        fastest = min(row["seconds"] for row in found.values())
        line = [group]
        for name in names:
            text = f"{1e3 * found[name]['seconds']:.4g}" if name in found else ""
            line.append(f"**{text}**" if text and found[name]["seconds"] == fastest else text)
        kernels = [found[name] for name in _KERNELS if name in found]
        best = min(kernels, key=lambda row: row["seconds"], default={})
        ratio = found["reference"]["seconds"] / best["seconds"] if best and "reference" in found else None
        line.append("" if ratio is None else f"{ratio:.2f}")
        line.append(f"{best['images'] / best['seconds']:.3g}" if "images" in best else "")
        line.append(f"{100 * best['limit']:.0f} % ({best['bound']})" if "limit" in best else "")
        line.append(f"{best['peak_bytes'] / best['layer_bytes']:.2f}" if "layer_bytes" in best else "")
        cells.append(line)
    return ["", *_table(["ms", *names, *_KERNEL_TITLES], cells)]


def _duration(row: dict[str, Any]) -> str:
    seconds = float(f"{row['seconds']:.3g}")  # three digits
    text = f"{1e3 * seconds:g} ms" if seconds < 1 else f"{seconds:,.6g} s"
    return f"~ {text}" if "timed_share" in row else text


def _table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table without its empty columns."""
    used = [i for i in range(len(titles)) if i == 0 or any(line[i] for line in cells)]
    lines = [[line[i] for i in used] for line in (titles, ["---"] * len(titles), *cells)]
    return [f"| {' | '.join(line)} |" for line in lines]


def plot(report: dict[str, Any], path: Path) -> None:
    """Write a PNG with three plots: times of 100 images, kernels under the roofline, bandwidths of other kernels."""
    from matplotlib.figure import Figure

    rows = report["rows"]
    figure = Figure(figsize=(15, 5.5), layout="constrained")
    figure.suptitle(f"{report['device']}, {report['date']}, torch {report['versions']['torch']}")
    times, roofline, bandwidth = figure.subplots(1, 3, width_ratios=[1.5, 1.2, 1.0])
    _plot_times(times, [row for row in rows if row["group"].startswith("100 images") and "nfe" in row])
    _plot_roofline(roofline, report)
    _plot_bandwidth(bandwidth, report)
    figure.savefig(path, format="png", dpi=110)


def _plot_times(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: -row["seconds"])
    colours = ["tab:blue" if row["name"].startswith("SPI-GAN") else "lightgray" for row in rows]
    axes.barh(range(len(rows)), [row["seconds"] for row in rows], color=colours)
    for y, row in enumerate(rows):
        axes.text(row["seconds"], y, f" {_duration(row)}", va="center", fontsize=8)
    quoted = [(row["paper_seconds"], y) for y, row in enumerate(rows) if "paper_seconds" in row]
    if quoted:
        axes.plot(*zip(*quoted, strict=True), "D", mfc="none", color="tab:red", label="the paper's own time, its GPU")
        axes.legend(fontsize=8, loc="upper right")
    axes.set_yticks(range(len(rows)), [f"{row['name']} (NFE {row['nfe']})" for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set(xlabel="seconds", title="100 images, 3 x 32 x 32\n(random weights; ~ timed in part)")


def _plot_roofline(axes: Any, report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row.get("flop") and row.get("bytes") and row["name"] in _KERNELS]
    if not rows:
        return axes.set_axis_off()
    intensity = [row["flop"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(intensity) * 2
    for dtype, rate in report["matrix_rate"].items():
        knee = rate / report["copy_rate"]
        line = axes.plot([low, knee, max(high, knee)], [low * report["copy_rate"] / 1e9, rate / 1e9, rate / 1e9])[0]
        axes.text(knee, rate / 1e9, dtype, ha="center", va="bottom", color=line.get_color(), fontsize=8)
    for benchmark, marker in zip(dict.fromkeys(row["benchmark"] for row in rows), "osv^D", strict=False):
        for dtype, line in zip(report["matrix_rate"], axes.get_lines(), strict=False):
            # Rows state their precision since float32 may be TF32.
            some = [row for row in rows if row["benchmark"] == benchmark and _in_precision(row, dtype)]
            axes.plot(
                [row["flop"] / row["bytes"] for row in some],
                [row["flop"] / row["seconds"] / 1e9 for row in some],
                marker,
                color=line.get_color(),
                mfc="none",
                label=f"{_TITLES.get(benchmark, benchmark)}, {dtype}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize=7, loc="lower right")
    return axes.set(xlabel="FLOP / byte", ylabel="GFLOP/s", title="Kernels that multiply,\nunder the measured roofline")


def _in_precision(row: dict[str, Any], precision: str) -> bool:
    return row["precision"] == precision if "precision" in row else precision in row["group"]


def _plot_bandwidth(axes: Any, report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if row.get("bytes") and not row.get("flop") and row["name"] in _KERNELS]
    if not rows:
        return axes.set_axis_off()
    axes.barh(range(len(rows)), [row["bytes"] / row["seconds"] / 1e9 for row in rows], color="tab:blue")
    axes.axvline(report["copy_rate"] / 1e9, color="black", linestyle="--", label="large copy")
    axes.set_yticks(range(len(rows)), [f"{row['group'].replace(', ', chr(10), 2)}, {row['name']}" for row in rows])
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=8)
    return axes.set(xlabel="GB/s", title="Kernels that draw noise and write it\n(arithmetic may bound them)")
