"""`spigan doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spigan.cli.errors import fail
from spigan.cli.options import Backend


def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Check the GPU; without one, this is an error.")] = False,
    backend: Backend = None,
    speed: Annotated[bool, typer.Option(help="Also time five calls.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file, after each of them.")] = None,
) -> None:
    """Check that every operation is right here, and how fast it is.

    Compares 30 small cases on every backend that runs here with the reference, then times five calls. Takes about two
    minutes on a GPU. The exit status is 1 if a result is wrong, or if --backend cannot run.

    \b
    Examples:
      spigan doctor
      spigan doctor --gpu
      spigan doctor --gpu --backend cuda --no-speed
    """
    import json

    import torch

    from spigan.doctor import examine, speeds
    from spigan.files import atomic_path

    if gpu and not torch.cuda.is_available():
        fail("--gpu needs a CUDA device, and torch finds none; `spigan info` shows how torch was built")
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else "cpu"
    results: dict[str, list[dict[str, object]]] = {"findings": [], "speeds": []}

    def save(part: str, result: dict[str, object]) -> None:
        results[part].append(result)
        if out is not None:
            with atomic_path(out) as scratch:
                scratch.write_text(json.dumps({"device": name, **results}, indent=1) + "\n", encoding="utf-8")

    checked: dict[str, int] = {}
    wrong = 0
    for finding in examine(device, None if backend is None else [backend]):
        save("findings", asdict(finding))
        checked[finding.backend] = checked.get(finding.backend, 0) + 1
        if not finding.passed:
            wrong += 1
            reason = finding.failure or f"error {finding.error:.3g}, allowed {finding.allowed:.3g}"
            typer.echo(f"WRONG  {finding.backend}: {finding.case}: {reason}")
    summary = ", ".join(f"{count} on {name}" for name, count in checked.items())
    typer.echo(f"{name}: {sum(checked.values()) - wrong} of {sum(checked.values())} cases are right ({summary})")
    if not checked:
        fail("no kernel runs on this device; `spigan info` shows why")
    for row in speeds(device) if speed else ():
        save("speeds", asdict(row))
        share = "" if row.copy_share is None else f", {100 * row.copy_share:.0f} % of a copy"
        ratio = row.reference / row.seconds
        typer.echo(f"  {row.name}: {1e3 * row.seconds:.4g} ms, {ratio:.3g} times as fast as the reference{share}")
    if wrong:
        raise typer.Exit(1)
