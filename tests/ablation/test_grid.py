"""Grid files: the bundled ones, products, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spigan.ablation.grid import MAX_RUNS, grid_path, read_grid


def test_built_in_grids() -> None:
    table5 = read_grid(grid_path("table5"))
    assert table5.preset == "cifar10" and table5.metric == "FD-ResNet56"
    arms = {
        name: (config.intervals, config.fixed_t, config.model.mapping, config.updates)
        for name, config in table5.runs.items()
    }
    assert arms == {
        **{f"k{k}": (k, False, "ode", "sequential") for k in range(1, 6)},
        "k2-fixed": (2, True, "ode", "sequential"),
        "mlp": (1, False, "mlp", "sequential"),
        **{f"k{k}-joint": (k, False, "ode", "joint") for k in range(2, 6)},
        "k2-fixed-joint": (2, True, "ode", "joint"),
    }
    # Nothing else differs, so that nothing else can be what makes the difference.
    same = {"intervals": 2, "fixed_t": False, "updates": "sequential", "model": table5.runs["k1"].model}
    assert len({config.model_copy(update=same).model_dump_json() for config in table5.runs.values()}) == 1
    assert list(read_grid(grid_path("digits")).arms) == ["k1", "k2", "k2-fixed", "mlp"]


def test_products(tmp_path: Path, grid: Any, grid_text: str) -> None:
    text = grid_text.partition("[arms.k2]")[0] + '[product]\nintervals = [1, 3]\n"model.ode_steps" = [4, 8]\n'
    arms = read_grid(grid(tmp_path, text)).runs
    assert {name: (config.intervals, config.model.ode_steps) for name, config in arms.items()} == {
        f"intervals={k}_ode_steps={steps}": (k, steps) for k in (1, 3) for steps in (4, 8)
    }
    text = 'preset = "digits"\n[arms.a]\nseed = 1\n[arms.b]\nseed = 2\n[product]\nfixed_t = [false, true]\n'
    arms = read_grid(grid(tmp_path, text)).runs
    assert {name: (config.seed, config.fixed_t) for name, config in arms.items()} == {
        "a_fixed_t=false": (1, False), "a_fixed_t=true": (1, True),
        "b_fixed_t=false": (2, False), "b_fixed_t=true": (2, True),
    }  # fmt: skip


def test_json_can_say_null(tmp_path: Path) -> None:
    (tmp_path / "grid.json").write_text('{"preset": "cifar10", "arms": {"a": {"ema_rampup": null}}}')
    assert read_grid(tmp_path / "grid.json").runs["a"].ema_rampup is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset = ", "grid.toml is not TOML"),
        ('preset = "digits"', "grid.toml has no arms: add [arms.NAME] tables or a [product]"),
        ('preset = "mnist"\n[arms.a]', "arm a: there is no preset 'mnist'"),
        ('preset = "church256"\n[arms.a]', "arm a: the preset 'church256' needs images"),
        ("[arms.a]\nintervals = 0", "arm a: intervals: Input should be greater than or equal to 1, got 0"),
        ("[arms.a]\nmodel.colour = 1", "arm a: model.colour: there is no such field, got 1"),
        ('[arms.a]\nmodel.mapping = "mlp"', 'arm a: mapping="mlp" has no time'),
        ("colour = 1\n[arms.a]", "grid.toml: colour: there is no such field, got 1"),
        ("arms = 1", "grid.toml: arms: Input should be a valid dictionary, got 1"),
        ('better = "no"\n[arms.a]', "grid.toml: better: Input should be 'lower' or 'higher', got 'no'"),
        ('[arms."../a"]', "'../a' cannot be the name of a folder"),
    ],
)
def test_grid_files_refused(tmp_path: Path, text: str, message: str, grid: Any) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_grid(grid(tmp_path, text))
    assert message in str(caught.value)


def test_the_number_of_arms_is_limited(tmp_path: Path, grid: Any) -> None:
    for count in (MAX_RUNS, MAX_RUNS + 1):
        path = grid(tmp_path, f"[product]\nseed = {list(range(count))}\n")
        if count == MAX_RUNS:
            assert len(read_grid(path).arms) == count
        else:
            with pytest.raises(ValueError, match=r"grid\.toml has 1001 runs; at most 1000 are allowed"):
                read_grid(path)
