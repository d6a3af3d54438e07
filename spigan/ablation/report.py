"""The report of an ablation study: a table (the paper's Table 5) and curves (Fig. 8)."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spigan.ablation.grid import Study
from spigan.config import TrainConfig
from spigan.files import atomic_path, read_json, write_text
from spigan.runs import METRICS_FILE, STATS_FILE, read_rows
from spigan.training.checkpoint import checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[float, float, float]]  # (kimg, hours of training, metric)

_STATISTICS = (METRICS_FILE, STATS_FILE)


def has_ended(folder: Path, config: TrainConfig) -> bool:
    """Return whether a run is finished: it has trained to its full length, and the model is exported."""
    file = end_file(folder)
    if not file.is_file():
        return False
    record = read_json(file)
    seconds = record.get("total_seconds") or 0.0
    return record.get("total_kimg") == config.total_kimg and seconds >= (config.total_seconds or 0.0)


def end_file(folder: Path) -> Path:
    """Return the file that marks a finished run."""
    return folder / "finished.json"


def error_file(out: Path, name: str) -> Path:
    """Return the file for the traceback of a run that failed."""
    return out / f"{name}.error.txt"


def write_report(study: Study, out: Path) -> list[Path]:
    """Write table.md, table.json and, once there are points to draw, curve.png.

    Args:
        study: the study.
        out: folder of the study. It may contain any number of runs, finished or not.

    Returns:
        The paths of the files.

    Raises:
        ImportError: if matplotlib, for the curve, is not installed.
    """
    require_matplotlib()
    curves = {name: read_curve(out / name, study.metric) for name in study.runs}
    rows = [_row(study, out, name, curves[name]) for name in study.runs]
    missing = _missing(study, out, curves)
    head = {"preset": study.preset, "metric": study.metric, "better": study.better}
    arms = _arm_rows(study, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.json", json.dumps({**head, "arms": arms, "rows": rows}, indent=1) + "\n")
    write_text(out / "table.md", _markdown(study, arms, rows, missing))
    if any(curves.values()):
        with atomic_path(out / "curve.png") as scratch:
            curve_figure(study, curves).savefig(scratch, format="png", dpi=110)
    return [path for name in ("table.md", "table.json", "curve.png") if (path := out / name).is_file()]


def last_value(study: Study, out: Path, arm: str) -> float | None:
    """Return the mean of an arm's last values of the metric over its seeds. None if a run has none."""
    curves = [read_curve(out / name, study.metric) for name in study.arms[arm]]
    return statistics.fmean(curve[-1][2] for curve in curves) if all(curves) else None


def read_curve(folder: Path, metric: str) -> Curve:
    """Read the curve of a metric.

    Args:
        folder: the run folder.
        metric: a column of metrics.jsonl, or of stats.jsonl if metrics.jsonl does not have it.

    Returns:
        The points (kimg, hours of training, metric). Empty if neither file has the metric.
    """
    for file in _STATISTICS:
        points = [
            (row["kimg"], row["seconds"] / 3600, row[metric])
            for row in read_rows(folder / file, "kimg", "seconds")
            if isinstance(row.get(metric), (int, float))
        ]
        if points:
            return points
    return []


def _row(study: Study, out: Path, name: str, curve: Curve) -> dict[str, Any]:
    """Return a row of the table."""
    config, folder = study.runs[name], out / name
    stats = read_rows(folder / STATS_FILE, "kimg", "seconds", "images_per_sec")
    measured = read_rows(folder / METRICS_FILE, "kimg", "seconds")
    reached = (stats or measured or [{"kimg": 0.0, "seconds": 0.0}])[-1]
    best = None
    if study.better is not None:
        best = (min if study.better == "lower" else max)(curve, key=lambda point: point[2], default=None)
    if has_ended(folder, config):
        state = "ended"
    elif error_file(out, name).is_file():
        state = f"failed: {error_file(out, name).read_text(encoding='utf-8').splitlines()[0]}"
    else:
        begun = reached["kimg"] > 0 or checkpoints(folder)
        length = f"{config.total_kimg:g} kimg" if config.total_seconds is None else f"{config.total_seconds:g} s"
        state = f"at {reached['kimg']:g} of {length}" if begun else "not started"
        if config.total_seconds is not None and begun:
            state = f"at {reached['seconds']:.0f} of {length}"
    return {
        "arm": name,
        "intervals": config.intervals,
        "fixed_t": config.fixed_t,
        "mapping": config.model.mapping,
        "updates": config.updates,
        "kimg": reached["kimg"],
        "last": curve[-1][2] if curve else None,
        "best": best[2] if best else None,
        "best_kimg": best[0] if best else None,
        "seconds": reached["seconds"],
        # The median, because some ticks include a checkpoint or an evaluation.
        "images_per_sec": statistics.median(row["images_per_sec"] for row in stats) if stats else None,
        "state": state,
    }


def _missing(study: Study, out: Path, curves: dict[str, Curve]) -> str:
    """Return a note if no run has the metric, but some runs have others. Otherwise return an empty text."""
    names = {
        key
        for arm in study.runs
        for file in _STATISTICS
        for row in read_rows(out / arm / file)
        for key in row
        if key not in ("iteration", "kimg", "seconds")
    }
    if any(curves.values()) or not names:
        return ""
    return f"No run has measured {study.metric}; available: {', '.join(sorted(names))}."


def _arm_rows(study: Study, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and the standard deviation over the seeds for each arm; empty if the arms have no seeds."""
    if all(len(names) == 1 for names in study.arms.values()):
        return []
    by_name = {row["arm"]: row for row in rows}
    arms = []
    for arm, names in study.arms.items():
        runs = [by_name[name] for name in names]
        last = [row["last"] for row in runs if row["last"] is not None]
        arms.append(
            {
                "arm": arm,
                "seeds": len(last),
                "mean": statistics.fmean(last) if last else None,
                "std": statistics.stdev(last) if len(last) > 1 else None,
                "kimg": statistics.fmean(row["kimg"] for row in runs),
                "seconds": statistics.fmean(row["seconds"] for row in runs),
            }
        )
    return arms


def _arms_markdown(study: Study, arms: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of arms, best first."""
    sign = -1 if study.better == "higher" else 1
    order = sorted(arms, key=lambda arm: (arm["mean"] is None, sign * (arm["mean"] or 0.0)))
    lines = [f"| arm | {study.metric} (mean) | standard deviation | seeds | kimg | seconds |", "|" + " --- |" * 6]
    for arm in order if study.better else arms:
        mean, std = ("" if arm[key] is None else f"{arm[key]:.4g}" for key in ("mean", "std"))
        lines.append(f"| {arm['arm']} | {mean} | {std} | {arm['seeds']} | {arm['kimg']:.4g} | {arm['seconds']:.0f} |")
    return [*lines, ""]


def _markdown(study: Study, arms: list[dict[str, Any]], rows: list[dict[str, Any]], missing: str) -> str:
    titles = ["arm", "K", "fixed t", "mapping", "updates", "kimg", f"last {study.metric}"]
    titles += [f"best {study.metric} (at kimg)", "seconds", "images/s", "state"]
    cells = [
        [
            row["arm"],
            str(row["intervals"]),
            "yes" if row["fixed_t"] else "no",
            row["mapping"],
            row["updates"],
            f"{row['kimg']:g}",
            "" if row["last"] is None else f"{row['last']:.4g}",
            "" if row["best"] is None else f"{row['best']:.4g} ({row['best_kimg']:g})",
            f"{row['seconds']:.0f}",
            "" if row["images_per_sec"] is None else f"{row['images_per_sec']:.3g}",
            row["state"].replace("|", "\\|"),
        ]
        for row in rows
    ]
    lines = [titles, ["---"] * len(titles), *cells]
    if study.better is None:
        lines = [[cell for i, cell in enumerate(line) if i != 7] for line in lines]
    table = [f"| {' | '.join(line)} |" for line in lines]
    better = f" ({study.better} is better)" if study.better else ""
    title = f"Preset `{study.preset}`, {study.metric}{better}. Written by `spigan ablate`."
    by_arm = _arms_markdown(study, arms) if arms else []
    return "\n".join([title, "", *([missing, ""] if missing else []), *by_arm, *table]) + "\n"


def curve_figure(study: Study, curves: dict[str, Curve]) -> Figure:
    """Draw the curves of the metric.

    The panels show the metric against images seen, for random and fixed t with the same K (Fig. 8) and for all arms,
    and against hours of training for all arms.
    """
    from matplotlib.figure import Figure

    pairs = _fixed_pairs(study)
    panels = 2 + bool(pairs)
    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    *fig8, images, hours = figure.subplots(1, panels)
    looks = {}  # an arm looks the same in all panels
    for (random, fixed), style in zip(pairs, ["-", "--", ":", "-."] * len(pairs), strict=False):
        k = study.runs[random].intervals
        for name, kind, colour in ((random, "random", "tab:blue"), (fixed, "fixed", "tab:orange")):
            looks[name] = {"color": colour, "linestyle": style}
            _draw(fig8[0], curves[name], 0, f"{kind} t, K = {k} ({name})", looks[name])
        fig8[0].set_title("Random against fixed t (the paper's Fig. 8)")
    others = [name for name in curves if name not in looks]
    for name, curve in curves.items():
        look = looks.get(name) or {"color": f"C{2 + others.index(name) % 8}"}
        _draw(images, curve, 0, name, look)
        _draw(hours, curve, 1, name, look)
    images.set_title("All arms against images")
    hours.set_title("All arms against time")
    for ax in figure.axes:
        ax.set(xlabel="hours of training" if ax is hours else "images seen, thousands", ylabel=study.metric)
        ax.legend(fontsize=8)
    return figure


def _draw(ax: Axes, curve: Curve, x: Literal[0, 1], label: str, look: dict[str, Any]) -> None:
    """Draw a curve against its column `x`, unless it is empty."""
    if curve:
        ax.plot([point[x] for point in curve], [point[2] for point in curve], marker=".", label=label, **look)


def _fixed_pairs(study: Study) -> list[tuple[str, str]]:
    """Return pairs (random, fixed) of arms that differ only in fixed_t."""
    names = {config.model_dump_json(): name for name, config in study.runs.items()}
    found = []
    for name, config in study.runs.items():
        random = names.get(config.model_copy(update={"fixed_t": False}).model_dump_json())
        if config.fixed_t and random is not None:
            found.append((random, name))
    return found


def require_matplotlib() -> None:
    """Raise ImportError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401 - before anything is trained or written
    except ImportError as error:
        raise ImportError('the curve needs matplotlib: pip install "spigan[bench]"') from error
