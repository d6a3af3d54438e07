"""Choice by measurement: which of several ways to compute the same is the fastest for a shape on this device.

A plan is made when a shape is first met: each candidate runs for a few milliseconds, and the fastest is kept, in memory
and in a small file of the user's cache. Candidates may round differently. Hence `measures` says when plans are made:
by default only where results already depend on the device's libraries, which is on a GPU, and not in training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spigan._version import __version__
from spigan.files import atomic_path, cache_folder, read_json, shorten
from spigan.ops.timing import seconds_per_call

VARIABLE = "SPIGAN_AUTOTUNE"
ROUNDS, SECONDS_PER_ROUND = 3, 1e-3  # for each candidate, after one call that compiles and one that is timed
MIN_GAIN = 0.05  # a candidate replaces the fixed choice if it is faster by this part: less is noise
MAX_PLANS = 2000  # in a file; the oldest ones go, so that the file stays below the limit for reading it


@dataclass(frozen=True)
class Plan:
    """What was measured and chosen.

    Attributes:
        chosen: name of the candidate.
        milliseconds: time of each candidate by name, the fixed choice first. None if it could not run.
    """

    chosen: str
    milliseconds: dict[str, float | None]


def measures(device: torch.device, kept: bool) -> bool:
    """Return whether plans are made and followed, or the fixed choice is taken.

    The environment variable SPIGAN_AUTOTUNE decides: 1 measures everywhere, 0 nowhere. If it is not set, plans are made
    on a GPU for weights that are kept, that is, for inference. Deterministic algorithms always take the fixed choice.

    Args:
        device: the device.
        kept: whether the weights are frozen, so that later calls use them too. They are not in training, whose resumed
            runs must not depend on the measurements of another process.

    Raises:
        ValueError: if SPIGAN_AUTOTUNE is neither 0 nor 1.
    """
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE} must be 0 (fixed choices) or 1 (measure), got {setting!r}")
    if torch.are_deterministic_algorithms_enabled():
        return False
    return setting == "1" or (setting == "" and kept and device.type == "cuda")


def choose(key: str, device: torch.device, candidates: Mapping[str, Callable[[], Callable[[], object]]]) -> str | None:
    """Return the name of the fastest candidate for `key` on `device`, measured now if it is not known.

    Args:
        key: operation, shape and dtype.
        device: the device of the tensors, and while measuring the current device.
        candidates: by name, the fixed choice first. Each value prepares the candidate and returns the function to time.

    Returns:
        A name. While a CUDA graph is captured, nothing can be timed: None if no plan is known.
    """
    with _lock:
        plans = _plans_of(device)
        plan = plans.get(key)
        if plan is None or plan.milliseconds.keys() != candidates.keys():
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            plan, lasting = _measured(candidates, device)
            plans[key] = plan
            if lasting:
                _save(describe_device(device), key, plan)
    return plan.chosen


def _measured(candidates: Mapping[str, Callable[[], Callable[[], object]]], device: torch.device) -> tuple[Plan, bool]:
    """Return a plan, and whether it holds for other processes: not if memory was short."""
    functions: dict[str, Callable[[], object]] = {}
    calls: dict[str, int] = {}
    lasting = True
    for number, (name, prepare) in enumerate(candidates.items()):
        try:
            function = prepare()
            function()  # compiles, and allocates
            once = seconds_per_call(function, 1, device)
        except Exception as error:  # of a compiler, a library or a lack of memory
            if number == 0:
                raise
            lasting = lasting and not isinstance(error, (torch.OutOfMemoryError, MemoryError))
            continue
        functions[name], calls[name] = function, max(1, min(100, int(SECONDS_PER_ROUND / max(once, 1e-9))))
    times = {name: math.inf for name in functions}
    for _ in range(ROUNDS):  # interleaved, so that a disturbance does not hit one candidate only
        for name, function in functions.items():
            times[name] = min(times[name], seconds_per_call(function, calls[name], device))
    fixed, fastest = next(iter(candidates)), min(times, key=times.__getitem__)
    chosen = fastest if times[fastest] < (1.0 - MIN_GAIN) * times[fixed] else fixed
    return Plan(chosen, {name: 1e3 * times[name] if name in times else None for name in candidates}), lasting


# ---- Kept plans ----

_lock = threading.RLock()
_known: dict[tuple[torch.device, int], dict[str, Plan]] = {}  # by device and number of threads


decisions: dict[Hashable, Any] = {}
"""What was derived from plans, by what it depends on: shortcuts of callers, which are forgotten with the plans."""


def forget() -> None:
    """Forget the plans in memory. Those in files are read again."""
    with _lock:
        _known.clear()
        decisions.clear()


def describe_device(device: torch.device) -> dict[str, str]:
    """Return what a plan depends on besides its key: the device and the versions of what runs on it."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    else:
        name = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "spigan": __version__}


def _processor() -> str:
    global _processor_name
    if _processor_name is None:
        _processor_name = platform.processor() or platform.machine()
        try:
            found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
            _processor_name = found[1] if found else _processor_name
        except OSError:  # not Linux
            pass
    return _processor_name


_processor_name: str | None = None


def plan_file(identity: dict[str, str]) -> Path:
    """Return the file with the plans of a device and its versions, in the folder `plans` of the user's cache."""
    slug = re.sub(r"[^a-z0-9]+", "-", identity["device"].lower()).strip("-")[:80]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "plans" / f"{slug}-{digest}.json"


def saved_plans(device: torch.device) -> tuple[Path, dict[str, Plan]]:
    """Return the file of a device and the plans in it, by key."""
    identity = describe_device(device)
    path = plan_file(identity)
    return path, read_plans(path, identity)


def _plans_of(device: torch.device) -> dict[str, Plan]:
    here = (device, torch.get_num_threads() if device.type == "cpu" else 0)
    if here not in _known:
        _known[here] = saved_plans(device)[1]
    return _known[here]


def read_plans(path: Path, identity: dict[str, str]) -> dict[str, Plan]:
    """Return the plans in a file. A damaged file, or one of another device or version, only causes a warning."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        if content.get("made_on") != identity:
            raise ValueError(f"it was made on {content.get('made_on')}, this is {identity}")
        found = content.get("plans")
        if not isinstance(found, dict):
            raise ValueError("it has no plans")
        return {key: _checked(plan) for key, plan in found.items()}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is ignored ({shorten(error)}): the fastest ways are measured again", stacklevel=2)
        return {}


def _checked(plan: Any) -> Plan:
    if not isinstance(plan, dict) or not isinstance(plan.get("milliseconds"), dict):
        raise ValueError("a plan must have times")
    times = plan["milliseconds"]
    numbers = [time for time in times.values() if time is not None]
    if not all(isinstance(time, float) and math.isfinite(time) and time >= 0.0 for time in numbers):
        raise ValueError("times must be finite numbers")
    if not isinstance(plan.get("chosen"), str) or times.get(plan["chosen"]) is None:
        raise ValueError("a plan must choose what it has measured")
    return Plan(plan["chosen"], times)


def _save(identity: dict[str, str], key: str, plan: Plan) -> None:
    """Add a plan to its file. A file that cannot be written only costs time, so it only causes a warning."""
    path = plan_file(identity)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged file has been reported
        plans = read_plans(path, identity)  # with what other processes have added
    plans.pop(key, None)
    plans[key] = plan
    youngest = [*plans.items()][-MAX_PLANS:]
    content = {"made_on": identity, "plans": {name: vars(plan) for name, plan in youngest}}
    try:
        with atomic_path(path, durable=False) as scratch:
            scratch.write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error}), so the next process measures again: set SPIGAN_CACHE to a folder "
            f"that you may write to, or {VARIABLE}=0",
            stacklevel=2,
        )


def describe() -> dict[str, dict[str, Any]]:
    """Return {device: {"file": path, "plans": {key: {"chosen": name, "milliseconds": {name: time or None}}}}}."""
    found: dict[str, dict[str, Any]] = {}
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        path, plans = saved_plans(torch.device(device))
        found[device] = {"file": str(path), "plans": {key: vars(plan) for key, plan in plans.items()}}
    return found


def report() -> str:
    """Return the saved plans of all devices as text, with the time of every candidate and a star at the chosen one."""
    lines = []
    for device, entry in describe().items():
        lines.append(f"plans on {device} ({entry['file']}):")
        for key, plan in entry["plans"].items():
            lines.append(f"  {key}")
            for name, time in plan["milliseconds"].items():
                shown = "cannot run" if time is None else f"{time:.4g} ms"
                lines.append(f"    {'*' if name == plan['chosen'] else ' '} {name:<32}{shown}")
        if not entry["plans"]:
            when = f"if {VARIABLE}=1" if device == "cpu" else f"unless {VARIABLE}=0"
            lines.append(f"  none yet: sampling makes them {when}")
    return "\n".join(lines)
