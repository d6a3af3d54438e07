"""Ablation studies (the paper's section 4.4): training runs from one file, their table (Table 5) and curves (Fig. 8).

A study is a folder: a run folder for each arm, with finished.json where it has ended; `ARM.error.txt` where one failed;
the report: table.md, table.json, curve.png. It can be stopped at any moment; `run` takes up what is there.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spigan.config import TrainConfig, describe_problems
from spigan.files import atomic_path, read_json, read_text, shorten, write_text
from spigan.presets import preset
from spigan.runs import read_config, read_rows
from spigan.training.checkpoint import checkpoints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUILT_IN = Path(__file__).parents[1] / "assets" / "grids"
"""The grid files that come with the package: the paper's Table 5, and a small one of digits."""

MAX_ARMS = 1000  # of a study: each is a training run

Curve = list[tuple[float, float, float]]  # (kimg, hours of training, metric)

# ---- The grid file ----


class GridFile(BaseModel):
    """What a grid file may say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = Field("digits", description="where every arm starts")
    base: dict[str, Any] = Field({}, description="fields of TrainConfig that all arms share")
    arms: dict[str, dict[str, Any]] = Field({}, description="fields of TrainConfig of each arm, by its name")
    product: dict[str, list[Any]] = Field(
        {},
        description='values of fields ("intervals", "model.ode_steps"): every combination, of every arm if there are',
    )
    metric: str = Field("FD-ResNet56", description="column of metrics.jsonl, else of stats.jsonl")
    better: Literal["lower", "higher"] | None = Field(
        None, description="which values of the metric are better; None: neither, as with a loss"
    )


@dataclass(frozen=True)
class Study:
    """A grid file, read.

    Attributes:
        preset: where the arms start.
        arms: configurations by name.
        metric: column of metrics.jsonl or stats.jsonl that table and curve show.
        better: "lower", "higher", or None where neither is.
    """

    preset: str
    arms: dict[str, TrainConfig]
    metric: str
    better: Literal["lower", "higher"] | None


def grid_path(grid: str) -> Path:
    """The file that a path or the name of a built-in grid means.

    Raises:
        FileNotFoundError: there is none.
    """
    names = sorted(path.stem for path in BUILT_IN.glob("*.toml"))
    if grid in names and not Path(grid).is_file():
        return BUILT_IN / f"{grid}.toml"
    if not Path(grid).is_file():
        raise FileNotFoundError(f"{grid} is no grid file, and none of those that come with spigan: {', '.join(names)}")
    return Path(grid)


def read_grid(path: Path) -> Study:
    """Read a grid file, TOML or (.json) JSON, which unlike TOML can say null.

    Raises:
        ValueError: it is neither, or describes no study; the arm and its field are named.
    """
    try:
        return _study(path, read_json(path) if path.suffix.lower() == ".json" else _toml(path))
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None


def _toml(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _study(path: Path, content: dict[str, Any]) -> Study:
    try:
        file = GridFile.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {describe_problems(error)}") from error
    count = max(1, len(file.arms)) * math.prod(map(len, file.product.values()))
    if count > MAX_ARMS:
        raise ValueError(f"{path} has {shorten(count)} arms; at most {MAX_ARMS} are taken")
    changes = _combinations(file)
    if not changes:
        raise ValueError(f"{path} has no arms: add [arms.NAME] tables or a [product]")
    arms = {}
    for name, fields in changes.items():
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=,+-]{0,199}", name):
            what = "at most 200 letters, digits and . _ - = , +"
            raise ValueError(f"{path}: {shorten(repr(name))} cannot name a folder: take {what}")
        try:
            arms[name] = preset(file.preset, **_merged(file.base, fields))
        except ValidationError as error:
            raise ValueError(f"{path}: arm {name}: {describe_problems(error)}") from error
        except ValueError as error:
            raise ValueError(f"{path}: arm {name}: {error}") from error
    return Study(file.preset, arms, file.metric, file.better)


def _combinations(file: GridFile) -> dict[str, dict[str, Any]]:
    """The changes of each arm: every arm of `arms` with every combination of `product`."""
    changes = {}
    for name, fields in (file.arms or ({"": {}} if file.product else {})).items():
        for values in product(*file.product.values()):
            parts = [name] if name else []
            arm = fields
            for field, value in zip(file.product, values, strict=True):
                nested: Any = value
                for key in reversed(field.split(".")):
                    nested = {key: nested}
                arm = _merged(arm, nested)
                parts.append(f"{field.rpartition('.')[2]}={str(value).lower()}")
            changes["_".join(parts)] = arm
    return changes


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """`first` with the values of `second`, tables (model, data) field by field."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


# ---- Running ----


def run(
    study: Study, out: Path, *, progress: bool = True, say: Callable[[str], object] = print
) -> tuple[list[str], bool]:
    """Train the arms one after the other, and write the report after each that was trained.

    Arms that have ended are kept, one with a checkpoint goes on exactly from it, others start. An arm that fails leaves
    its traceback in `ARM.error.txt`, and the next one runs.

    Args:
        study: what to run.
        out: folder of the study.
        progress: show a progress bar for each arm.
        say: takes a line of text when an arm begins, is kept, or fails.

    Returns:
        Names of the arms that failed, and whether Ctrl-C or SIGTERM stopped the study.

    Raises:
        ValueError: a folder holds a run of another configuration than the grid says now; nothing has been touched.
        ImportError: the curve needs matplotlib.
    """
    _require_matplotlib()
    _check_folders(study, out)
    failed: list[str] = []
    for number, (name, config) in enumerate(study.arms.items(), 1):
        title = f"{name} ({number} of {len(study.arms)})"
        if _has_ended(out / name, config):
            say(f"{title}: has ended before, kept")
            continue
        say(f"{title}: {config.total_kimg:g} kimg, K = {config.intervals}")
        error_file = _error_file(out, name)
        error_file.unlink(missing_ok=True)
        interrupted = False
        try:
            interrupted = _train(out, name, config, progress)
        except Exception as error:  # whatever it is, the arms after it have their turn
            failed.append(name)
            out.mkdir(parents=True, exist_ok=True)
            write_text(error_file, f"{_first_line(error)}\n\n{traceback.format_exc()}")
            say(f"{title}: failed: {_first_line(error)} (traceback: {error_file})")
        write_report(study, out)
        if interrupted:
            return failed, True
    return failed, False


def _train(out: Path, name: str, config: TrainConfig, progress: bool) -> bool:
    """Train an arm from where it stands; whether a signal stopped it."""
    from spigan.training.trainer import Trainer

    folder = out / name
    if checkpoints(folder):
        trainer = Trainer.resume(folder, progress=progress)
    else:
        if folder.exists():
            shutil.rmtree(folder)  # `_check_folders` has seen what is in it
        trainer = Trainer(config, folder, progress=progress)
    trainer.fit()
    if not trainer.interrupted:
        # The last checkpoint alone does not tell it: a kill may have come before the model was exported.
        write_text(_end_file(folder), json.dumps({"total_kimg": config.total_kimg}) + "\n")
    return trainer.interrupted


def _has_ended(folder: Path, config: TrainConfig) -> bool:
    file = _end_file(folder)
    return file.is_file() and read_json(file).get("total_kimg") == config.total_kimg


def _end_file(folder: Path) -> Path:
    return folder / "finished.json"


def _error_file(out: Path, name: str) -> Path:
    return out / f"{name}.error.txt"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# What a run leaves that was killed before its first checkpoint; names that begin with a dot are half-written files.
_BEFORE_CHECKPOINT = {"config.json", "data.json", "reals.png", "checkpoints"}


def _check_folders(study: Study, out: Path) -> None:
    """Raise ValueError unless every arm's folder is a run of its configuration, or free to become one."""
    for name, config in study.arms.items():
        folder = out / name
        found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} if folder.is_dir() else set()
        if not found:
            continue
        if "config.json" not in found or (not checkpoints(folder) and found - _BEFORE_CHECKPOINT):
            raise ValueError(f"{folder} is not empty and no run that can go on: take another --out, or remove it")
        if changed := _differences(read_config(folder).model_dump(), config.model_dump()):
            what = ", ".join(f"{field} {old!r} (the grid now says {new!r})" for field, old, new in changed)
            advice = (
                "undo the change in the grid file, or give the arm another name, or remove the folder to train anew"
            )
            if [field for field, _, _ in changed] == ["total_kimg"]:
                advice += f"; a run is lengthened by `spigan train --resume {folder} --kimg {config.total_kimg:g}`"
            raise ValueError(f"{folder} holds a run with {what}: {advice}")


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Fields whose values differ: (name, old, new)."""
    found = []
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict):
            found += _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            found.append((prefix + key, old.get(key), new[key]))
    return found


# ---- The report ----


def write_report(study: Study, out: Path) -> list[Path]:
    """Write table.md, table.json and, as soon as there is a point to draw, curve.png, of what the folder holds now.

    Returns:
        The files.

    Raises:
        ImportError: the curve needs matplotlib.
    """
    _require_matplotlib()
    curves = {name: read_curve(out / name, study.metric) for name in study.arms}
    rows = [_row(study, out, name, curves[name]) for name in study.arms]
    missing = _missing(study, out, curves)
    head = {"preset": study.preset, "metric": study.metric, "better": study.better}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.json", json.dumps({**head, "rows": rows}, indent=1) + "\n")
    write_text(out / "table.md", _markdown(study, rows, missing))
    if any(curves.values()):
        with atomic_path(out / "curve.png") as scratch:
            curve_figure(study, curves).savefig(scratch, format="png", dpi=110)
    return [path for name in ("table.md", "table.json", "curve.png") if (path := out / name).is_file()]


def read_curve(folder: Path, metric: str) -> Curve:
    """Points of a run, from metrics.jsonl or, where that lacks the metric, from stats.jsonl; [] where both do."""
    for file in _STATISTICS:
        points = [
            (row["kimg"], row["seconds"] / 3600, row[metric])
            for row in read_rows(folder / file, "kimg", "seconds")
            if isinstance(row.get(metric), (int, float))
        ]
        if points:
            return points
    return []


_STATISTICS = ("metrics.jsonl", "stats.jsonl")


def _row(study: Study, out: Path, name: str, curve: Curve) -> dict[str, Any]:
    """A line of the table."""
    config, folder = study.arms[name], out / name
    stats = read_rows(folder / "stats.jsonl", "kimg", "seconds", "images_per_sec")
    measured = read_rows(folder / "metrics.jsonl", "kimg", "seconds")
    reached = (stats or measured or [{"kimg": 0.0, "seconds": 0.0}])[-1]
    best = None
    if study.better is not None:
        best = (min if study.better == "lower" else max)(curve, key=lambda point: point[2], default=None)
    if _has_ended(folder, config):
        state = "ended"
    elif _error_file(out, name).is_file():
        state = f"failed: {_error_file(out, name).read_text(encoding='utf-8').splitlines()[0]}"
    else:
        begun = reached["kimg"] > 0 or checkpoints(folder)
        state = f"at {reached['kimg']:g} of {config.total_kimg:g} kimg" if begun else "not started"
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
        # The median, because some ticks hold a checkpoint or a measurement.
        "images_per_sec": statistics.median(row["images_per_sec"] for row in stats) if stats else None,
        "state": state,
    }


def _missing(study: Study, out: Path, curves: dict[str, Curve]) -> str:
    """What to say where no run has the metric, though some have others."""
    names = {
        key
        for arm in study.arms
        for file in _STATISTICS
        for row in read_rows(out / arm / file)
        for key in row
        if key not in ("iteration", "kimg", "seconds")
    }
    if any(curves.values()) or not names:
        return ""
    return f"No run has measured {study.metric}; there are: {', '.join(sorted(names))}."


def _markdown(study: Study, rows: list[dict[str, Any]], missing: str) -> str:
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
    return "\n".join([title, "", *([missing, ""] if missing else []), *table]) + "\n"


def curve_figure(study: Study, curves: dict[str, Curve]) -> Figure:
    """Metric against thousands of images seen: random beside fixed t of the same K (Fig. 8), and all arms; then all
    arms against hours."""
    from matplotlib.figure import Figure

    pairs = _fixed_pairs(study)
    panels = 2 + bool(pairs)
    figure = Figure(figsize=(5.5 * panels, 4.5), layout="constrained")
    *fig8, images, hours = figure.subplots(1, panels)
    looks = {}  # an arm looks alike in all panels
    for (random, fixed), style in zip(pairs, ["-", "--", ":", "-."] * len(pairs), strict=False):
        k = study.arms[random].intervals
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
    """Draw a curve against its column `x`, where it has a point."""
    if curve:
        ax.plot([point[x] for point in curve], [point[2] for point in curve], marker=".", label=label, **look)


def _fixed_pairs(study: Study) -> list[tuple[str, str]]:
    """(random, fixed): arms that differ in fixed_t alone."""
    names = {config.model_dump_json(): name for name, config in study.arms.items()}
    found = []
    for name, config in study.arms.items():
        random = names.get(config.model_copy(update={"fixed_t": False}).model_dump_json())
        if config.fixed_t and random is not None:
            found.append((random, name))
    return found


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401 - before anything is trained or written
    except ImportError as error:
        raise ImportError('the curve needs matplotlib: pip install "spigan[bench]"') from error
