"""`spigan bench` and its report: what is timed, the profile, tables made of a run, files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from spigan import SPIGAN, ModelConfig, Sampler
from spigan.bench import markdown, merge, profile_sampler, read_run, time_sampler, write_report


def row(benchmark: str, group: str, name: str, seconds: float, **numbers: Any) -> dict[str, Any]:
    return {"benchmark": benchmark, "group": group, "name": name, "seconds": seconds, "rounds": 3, **numbers}


ROWS = [
    row("bench_rk4_mlp", "rk4, batch 8, float32", "reference", 6e-3, flop=2e8, bytes=3e6, bound="products", limit=0.2),
    row("bench_rk4_mlp", "rk4, batch 8, float32", "cpp", 1.5e-3, flop=2e8, bytes=3e6, bound="products", limit=0.8),
    row("bench_philox_normal", "philox, 4 M", "cpp", 3e-3, flop=0.0, bytes=1e7, bound="copying", limit=0.5),
    row("bench_sampling", "100 images, 3 x 32 x 32", "SPI-GAN, cpp, float32", 1.25, nfe=1, images=100, limit=0.9,
        peak_bytes=2**30, paper_seconds=0.05),
    row("bench_sampling", "100 images, 3 x 32 x 32", "DDPM, bfloat16", 1234.5, nfe=1000, images=100, timed_share=0.01,
        paper_seconds=80.5),
]  # fmt: skip
MACHINE = {
    "device": "Some CPU, AVX512, 2 threads",
    "versions": {"spigan": "0.1.0", "torch": "2.13.0"},
    "float32": {"convolutions": "tf32", "products": "float32"},
    "matrix_rate": {"float32": 2e11, "tf32": 4e11, "bfloat16": 8e11},
    "copy_rate": 2e10,
}


def save(path: Path, rows: list[dict[str, Any]], date: str = "2026-11-25", **machine: Any) -> Path:
    """A run as pytest-benchmark writes it."""
    benchmarks = [{"name": "x", "stats": {"data": [1.0]}, "extra_info": row} for row in rows]
    benchmarks.append({"name": "of another suite", "stats": {}, "extra_info": {}})
    run = {"machine_info": {"spigan": MACHINE | machine}, "datetime": f"{date}T01:02:03", "benchmarks": benchmarks}
    path.write_text(json.dumps(run))
    return path


def test_report(tmp_path: Path) -> None:
    paths = write_report([save(tmp_path / "run.json", ROWS)], tmp_path / "results")
    assert [path.name for path in paths] == [f"some-cpu-avx512-2-threads.{suffix}" for suffix in ("json", "md", "png")]
    text = paths[1].read_text()
    assert (
        "# Some CPU, AVX512, 2 threads" in text
        and "2026-11-25; spigan 0.1.0, torch 2.13.0; float32 convolutions in tf32, products in float32." in text
    )
    assert "| rk4, batch 8, float32 | 6 | **1.5** | 4.00 | 80 % (products) |" in text
    assert "| SPI-GAN, cpp, float32 | 1 | 1.25 s | 80 | 90 % | 1024 MiB | 0.05 s |" in text
    assert "| DDPM, bfloat16 | 1000 | ~ 1,230 s | 0.081 |  |  | 80.5 s |" in text
    assert text.index("## Sampling") < text.index("## rk4_mlp") < text.index("## philox_normal")
    with Image.open(paths[2]) as picture:
        assert picture.format == "PNG" and picture.width > 1000
    # The compact JSON is a run too, and the report of it is the same.
    again = write_report([paths[0]], tmp_path / "again")
    assert [path.read_bytes() for path in again[:2]] == [path.read_bytes() for path in paths[:2]]


def test_later_runs_replace_rows(tmp_path: Path) -> None:
    first = read_run(save(tmp_path / "a.json", ROWS))
    second = read_run(save(tmp_path / "b.json", [ROWS[1] | {"seconds": 1.2e-3}], "2026-11-26"))
    merged = merge([first, second])
    assert len(merged["rows"]) == len(ROWS)
    (cpp,) = [row for row in merged["rows"] if row["benchmark"] == "bench_rk4_mlp" and row["name"] == "cpp"]
    assert cpp["seconds"] == 1.2e-3 and cpp["date"] == "2026-11-26"
    assert "Rows were measured from 2026-11-25 to 2026-11-26." in markdown(merged, "x.png")


def test_refused(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"half\.json is not JSON"):
        read_run(tmp_path / "half.json")
    for content in ("[]", "{}", '{"machine_info": {}, "benchmarks": []}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"other\.json is not a run of the benchmark suite; make one with: pytest benchmarks/"
        ):
            read_run(tmp_path / "other.json")
    runs = [save(tmp_path / "a.json", ROWS), save(tmp_path / "b.json", ROWS, device="Another")]
    with pytest.raises(ValueError, match="the runs come from different devices: Another; Some CPU"):
        write_report(runs, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.fixture(scope="module")
def model() -> SPIGAN:
    torch.manual_seed(0)
    config = ModelConfig(resolution=8, dim_h=16, embed_channels=4, channel_base=64, channel_max=8)
    return SPIGAN(config).eval().requires_grad_(False)


def test_stages_are_timed(model: SPIGAN) -> None:
    times = time_sampler(Sampler(model, batch_size=4), 10, repeats=3)
    assert set(times) == {"first", "total", "noise", "mapping", "synthesis", "convert"}
    assert all(0 < seconds < 10 for seconds in times.values())


def test_profile_shows_the_stages(model: SPIGAN, tmp_path: Path) -> None:
    profile_sampler(Sampler(model, batch_size=4, cuda_graph=False), 8, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    for stage in ("noise", "mapping", "synthesis", "convert"):
        assert names.count(stage) == 2, stage  # two batches
    assert {"spigan::rk4_mlp", "spigan::philox_normal"} <= set(names)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]
