"""Report on this installation: versions, devices, the extension, and which backend each operation uses and why.

Run `spigan info` or `python -m spigan.info`. Each part is collected separately. If a part is broken, the report shows
its error, and the other parts still work.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

PACKAGES = ("torch", "numpy", "triton", "safetensors", "huggingface_hub", "datasets", "torchdiffeq")


def _attempt(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _versions() -> dict[str, str]:
    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    from spigan._version import __version__

    return {"spigan": __version__, "python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def _devices() -> dict[str, Any]:
    import torch

    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    devices: dict[str, Any] = {"cpu": cpu}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            devices[f"cuda:{i}"] = (
                f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            )
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        devices["cuda"] = f"none (torch is {built})"
    return devices


def _extension() -> dict[str, Any]:
    import spigan._C as extension

    return dict(extension.build_info())


def _backends() -> dict[str, Any]:
    import torch

    from spigan.ops import backends

    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {kind: backends.describe(torch.device(kind)) for kind in kinds}


def collect() -> dict[str, Any]:
    """Return the whole report as nested dictionaries for JSON. A part that fails is {"error": why}."""
    return {
        "versions": _attempt(_versions),
        "system": platform.platform(),
        "devices": _attempt(_devices),
        "extension": _attempt(_extension),
        "SPIGAN_BACKEND": os.environ.get("SPIGAN_BACKEND", "not set"),
        "backends": _attempt(_backends),
    }


def _lines(value: Any, indent: int = 0) -> list[str]:
    pad = "  " * indent
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [f"{pad}{key}:", *_lines(item, indent + 1)]
        else:
            lines.append(f"{pad}{key}: {item}")
    return lines


def _backend_lines(operations: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each operation, then its backends that cannot run, and finally those not in this version."""
    lines = []
    missing: dict[str, list[str]] = {}
    width = max(map(len, operations), default=0)
    for op, entry in operations.items():
        lines.append(f"  {op:{width}}  {entry['chosen'] or 'NONE':9}  ({entry['why']})")
        lines += [f"    {backend} cannot run: {cause}" for backend, cause in entry["cannot_run"].items()]
        for backend in entry["not_implemented"]:
            missing.setdefault(backend, []).append(op)
    if missing:
        parts = [
            backend if len(ops) == len(operations) else f"{backend} ({', '.join(ops)})"
            for backend, ops in missing.items()
        ]
        lines.append(f"  not in this version: {', '.join(parts)}")
    return lines


def report() -> str:
    """Return the report as text."""
    info = collect()
    backends = info.pop("backends")
    lines = _lines(info)
    if "error" in backends:
        return "\n".join([*lines, "backends:", f"  error: {backends['error']}"])
    for device, operations in backends.items():
        lines += [f"backends on {device}:", *_backend_lines(operations)]
    return "\n".join(lines)


def main(as_json: bool = False) -> None:
    """Print the report as text or JSON."""
    print(json.dumps(collect(), indent=2) if as_json else report())


if __name__ == "__main__":
    main(as_json="--json" in sys.argv[1:])
