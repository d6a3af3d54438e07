#!/usr/bin/env python3
"""Check the speeds that .ci/gpu measured: python .ci/floors.py doctor.json benchmarks.json

Ratios hold on every GPU; the times are those of an H100 or H200, and are only printed on others.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COPY_SHARE = 0.8  # of path_interpolate
MILLISECONDS = {"rk4_mlp, batch 100, float32": 0.25, "100 images, cifar10, bfloat16": 2.5}
TRAINING_RATIO = 1.3  # of generator and discriminator, against torch.compile of the reference


def check(doctor: dict[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return (what was measured and required, whether it holds) for each floor."""
    speeds = {speed["name"]: speed for speed in doctor["speeds"]}
    share = speeds["path_interpolate, bytes to float32"]["copy_share"]
    checks = [(f"path_interpolate: {share:.0%} of a copy, at least {COPY_SHARE:.0%}", share >= COPY_SHARE)]
    known = any(name in doctor["device"] for name in ("H100", "H200"))
    for name, limit in MILLISECONDS.items():
        found = 1e3 * speeds[name]["seconds"]
        checks.append((f"{name}: {found:.3g} ms, at most {limit} ms on an H100", not known or found <= limit))
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["group"].startswith("generator and discriminator"):
            groups.setdefault(row["group"], {})[row["name"]] = row["seconds"]
    if not groups:
        checks.append(("generator and discriminator: no row was measured", False))
    for group, seconds in groups.items():
        kernels = [seconds[name] for name in ("cuda", "triton") if name in seconds]
        if not kernels or "torch.compile" not in seconds:
            checks.append((f"{group}: rows of a kernel and of torch.compile are needed", False))
            continue
        ratio = seconds["torch.compile"] / min(kernels)
        checks.append((f"{group}: {ratio:.2f} times torch.compile, at least {TRAINING_RATIO}", ratio >= TRAINING_RATIO))
    return checks


def main(doctor: Path, benchmarks: Path) -> int:
    """Print every floor; return 1 if one of them does not hold."""
    rows = [row["extra_info"] for row in json.loads(benchmarks.read_text())["benchmarks"]]
    checks = check(json.loads(doctor.read_text()), [row for row in rows if "group" in row])
    for text, holds in checks:
        print(f"{'ok' if holds else 'TOO SLOW':9}{text}")
    return 0 if all(holds for _, holds in checks) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
