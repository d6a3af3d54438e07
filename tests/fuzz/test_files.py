"""Files of every kind, damaged byte by byte, and models, checkpoints and configurations that lie."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fuzz_strategies import bombs, cases, damaged, lying_json, lying_safetensors, wrong_tensors
from fuzz_targets import (
    BEST,
    CHECKPOINT,
    GRID,
    METRICS,
    TARGETS,
    TINY,
    attempt,
    cached_features,
    evaluation,
    fresh,
    join_safetensors,
    model_files,
    read_model,
    resnet,
    run_files,
    script,
    split_safetensors,
    synthesis,
    try_file,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from spigan.interop import stylegan2_synthesis

WEIGHTS = {kind: 6 for kind in TARGETS} | {
    "image": 40, "model weights": 12, "checkpoint": 8, "TorchScript network": 4, "LMDB": 10, "tar shard": 10, "zip": 10,
    "parquet": 12, "cache of features": 4, "record of the best": 4, "metrics for a card": 4, "config option": 4,
    "cache of plans": 4,
}  # fmt: skip


def sound_weights() -> bytes:
    return model_files()["model.safetensors"]


def sound_checkpoint() -> bytes:
    return run_files()[CHECKPOINT]


@pytest.mark.parametrize("kind", TARGETS)
def test_examples_are_read(kind: str) -> None:
    """Else the damaged ones would say nothing."""
    accepted = [try_file(kind, data) for data in TARGETS[kind].examples()]
    assert any(accepted) and (kind == "image" or all(accepted))


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_file(kind: str) -> None:
    examples = TARGETS[kind].examples()

    @cases(WEIGHTS[kind])
    @given(damaged(examples))
    def check(data: bytes) -> None:
        try_file(kind, data)

    check()


@cases(25)
@given(st.one_of(lying_safetensors(sound_weights), wrong_tensors(sound_weights)))
def test_weights_that_lie(data: bytes) -> None:
    try_file("model weights", data)


@cases(30)
@given(lying_json(lambda: model_files()["config.json"]), st.sampled_from(["ode", "mlp"]))
def test_model_config_that_lies(data: bytes, mapping: str) -> None:
    try_file("model config", data.replace(b'"mapping": "ode"', f'"mapping": "{mapping}"'.encode()))


@cases(10)
@given(
    st.dictionaries(
        st.sampled_from(["dim_h", "embed_channels", "channel_base", "channel_max", "mlp_layers", "ode_steps"]),
        st.sampled_from([1, 64, 1000, 4096, 16_384, 65_536, 10**6, 2**31, 2**62]),
        min_size=1,
    ),
    st.sampled_from([8, 64, 1024]),
    st.sampled_from(["ode", "mlp"]),
)
def test_model_that_asks_for_terabytes(sizes: dict[str, int], resolution: int, mapping: str) -> None:
    """Configuration and header agree on sizes that the file does not hold."""
    files = model_files(mapping)
    config = json.loads(files["config.json"]) | TINY | {"mapping": mapping, "resolution": resolution} | sizes
    header, data = split_safetensors(files["model.safetensors"])
    wide = max(sizes.values())
    for entry in header.values():
        if "shape" in entry:
            entry["shape"] = [wide if size == 4 else size for size in entry["shape"]]
    folder = fresh("case")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(join_safetensors(header, data))
    attempt("model, terabytes", lambda: read_model(folder), str(folder))


@cases(10)
@given(st.one_of(lying_safetensors(resnet), wrong_tensors(resnet)))
def test_weights_of_a_feature_network_that_lie(data: bytes) -> None:
    try_file("ResNet-56 weights", data)


@cases(6)
@given(st.one_of(lying_safetensors(cached_features), wrong_tensors(cached_features)))
def test_cache_that_lies(data: bytes) -> None:
    assert try_file("cache of features", data)  # it is computed again


@pytest.mark.parametrize("kind", ["model weights", "checkpoint", "ResNet-56 weights", "cache of features"])
def test_a_header_of_one_long_string(kind: str) -> None:
    """Which the library's error repeats whole."""
    try_file(kind, join_safetensors("x" * 2**20, b""))


def test_a_cache_of_a_dtype_that_has_no_isfinite() -> None:
    tensors = load(cached_features())
    tensors["mean"] = tensors["mean"].to(torch.float8_e4m3fn)
    assert try_file("cache of features", save(tensors, {"key": "key"}))


@cases(25)
@given(wrong_tensors(synthesis))
def test_stylegan2_of_other_tensors(data: bytes) -> None:
    """What a user has loaded, of whatever names, shapes and dtypes."""
    attempt("StyleGAN2 weights", lambda: stylegan2_synthesis(load(data)), "")


@pytest.mark.parametrize("error", [IndexError("at() was not in the map"), RuntimeError(""), ValueError("utf-8")])
def test_errors_of_torch_jit_load(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(torch.jit, "load", load)
    assert not try_file("TorchScript network", script())


def test_stylegan2_of_no_values() -> None:
    tensors = load(synthesis())
    empty = {name: torch.zeros(0, *tensor.shape[1:]) for name, tensor in tensors.items()}
    assert not attempt("StyleGAN2 weights", lambda: stylegan2_synthesis(empty), "has no values")


@cases(10)
@given(lying_json(evaluation))
def test_metrics_for_a_card_that_lie(data: bytes) -> None:
    try_file("metrics for a card", data)


@cases(10)
@given(lying_json(lambda: BEST))
def test_record_of_the_best_that_lies(data: bytes) -> None:
    assert try_file("record of the best", data)  # a model is the best where there is no record


@cases(10)
@given(lying_json(lambda: run_files()["config.json"]))
def test_config_option_that_lies(data: bytes) -> None:
    try_file("config option", data)


@cases(10)
@given(st.lists(st.one_of(lying_json(lambda: METRICS.splitlines()[0]), bombs("kimg")), max_size=3))
def test_metrics_that_lie(lines: list[bytes]) -> None:
    try_file("run metrics", b"\n".join([*lines, METRICS]))


@cases(25)
@given(st.one_of(lying_safetensors(sound_checkpoint), wrong_tensors(sound_checkpoint)))
def test_checkpoint_that_lies(data: bytes) -> None:
    try_file("checkpoint", data)


def sound_state() -> bytes:
    state: str = split_safetensors(sound_checkpoint())[0]["__metadata__"]["state"]
    return state.encode()


@cases(12)
@given(st.one_of(lying_json(sound_state), bombs("iteration")))
def test_checkpoint_counters_that_lie(state: bytes) -> None:
    header, data = split_safetensors(sound_checkpoint())
    header["__metadata__"]["state"] = state.decode("utf-8", "replace")
    try_file("checkpoint", join_safetensors(header, data))


@cases(20)
@given(lying_json(lambda: run_files()["config.json"]))
def test_run_config_that_lies(data: bytes) -> None:
    try_file("run config", data)


@cases(10)
@given(lying_json(lambda: run_files()["data.json"]))
def test_data_record_that_lies(data: bytes) -> None:
    try_file("run data record", data)


@cases(12)
@given(
    st.lists(st.one_of(lying_json(lambda: run_files()["stats.jsonl"].splitlines()[0]), bombs("iteration")), max_size=3)
)
def test_statistics_that_lie(lines: list[bytes]) -> None:
    try_file("run statistics", b"\n".join([*lines, *run_files()["stats.jsonl"].splitlines()]))


def toml(value: Any) -> str:
    """A value as TOML, as far as it can say it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return "true" if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@cases(20)
@given(st.data())
def test_grid_that_lies(draws: st.DataObject) -> None:
    from fuzz_strategies import texts, values

    table = st.dictionaries(
        st.one_of(texts, st.sampled_from(["model", "data", "batch", "intervals", "name", "model.dim_h"])), values
    )
    content = {
        "preset": draws.draw(st.sampled_from(["digits", "cifar10", "church256", "", "x"])),
        "base": draws.draw(table),
        "arms": draws.draw(st.dictionaries(texts, table, max_size=3)),
        "product": draws.draw(
            st.one_of(
                st.dictionaries(texts, st.lists(values, max_size=3), max_size=3),
                st.just({f"f{i}": list(range(10)) for i in range(30)}),
                st.just({".".join("a" * 5000): [1, 2]}),
            )
        ),
    }
    kept = draws.draw(st.sets(st.sampled_from(sorted(content)), min_size=1))
    try_file("grid file", "\n".join(f"{key} = {toml(content[key])}" for key in sorted(kept)).encode("utf-8", "replace"))


@cases(4)
@given(
    st.sampled_from(
        [
            b"a = " + b"[" * 100_000,
            b"a = " + b"{a = " * 50_000,
            b"a." * 20_000 + b"a = 1",
            b"base." + b"a." * 5000 + b"a = 1",
            b"[" + b"arms." + b"a." * 20_000 + b"a]",
            GRID + b"base = 1",
            b"a = " + b"1" * 100_000,
        ]
    )
)
def test_grid_bombs(data: bytes) -> None:
    try_file("grid file", data)
