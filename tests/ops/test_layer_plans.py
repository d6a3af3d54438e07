"""spigan.ops.layer_plans: the candidates of each layer, and layers and networks that follow a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan.models.generator import Generator
from spigan.ops import backends, layer_plans, modulated_conv2d, plans, use_backend
from spigan.ops.layer_end import LayerEnd
from spigan.ops.layer_plans import LayerCall, LayerPlan, layer_plan
from spigan.ops.layer_weights import LayerWeight, prepare_weight
from spigan.ops.upfirdn2d import fir_filter

Wish = Callable[[list[str]], str]


class Choices:
    """Stands in for `plans.choose`: notes the candidates by key, and chooses by a wish instead of measuring.

    Every candidate is prepared and run once, as if it were measured.
    """

    def __init__(self) -> None:
        self.candidates: dict[str, list[str]] = {}
        self.wish: Wish = lambda names: names[0]
        self.runs = True

    def choose(self, key: str, device: torch.device, candidates: Mapping[str, Callable[[], Callable[[], Any]]]) -> str:
        self.candidates[key] = [*candidates]
        if self.runs:
            for prepare in candidates.values():
                prepare()()
        return self.wish([*candidates])


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> Choices:
    """Plans are made everywhere, by `Choices`."""
    found = Choices()
    monkeypatch.setenv("SPIGAN_AUTOTUNE", "1")
    monkeypatch.setattr(plans, "choose", found.choose)
    monkeypatch.setattr(plans, "decisions", {})
    return found


def of_form(form: str) -> Wish:
    return lambda names: next((name for name in names if form in name), names[0])


def call_of(
    n: int = 2, channels: int = 8, size: int = 6, up: int = 1, dtype: Any = torch.float32, **changes: Any
) -> Any:
    device = changes.pop("device", "cpu")
    options: dict[str, Any] = {
        "x": torch.ones(n, size, size, channels, dtype=dtype, device=device),
        "end": LayerEnd(),
        "style": None,
        "up": up,
        "padding": 1,
        "filter": fir_filter(),
        "shape": torch.Size((channels, channels, 3, 3)),
        "kept": True,
    }
    return LayerCall(**options | changes)


def pack(plan: LayerPlan) -> LayerWeight:
    return prepare_weight(torch.ones(8, 8, 3, 3), plan.form, torch.float32, plan.backend)


# ---- The default ----


def network() -> Generator:
    torch.manual_seed(0)
    return Generator(16, 3, dim_h=8, channel_base=256, channel_max=16).eval().requires_grad_(False)


def images(generator: Generator, backend: str | None = None, n: int = 3) -> Tensor:
    h = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_backend(backend or "auto"):
        return generator(h)


@pytest.mark.parametrize("setting", [None, "0"])
def test_the_cpu_measures_nothing_by_default(
    setting: str | None, choices: Choices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Forms round differently, and images of a seed must not depend on how busy a machine was."""
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path))
    monkeypatch.delenv("SPIGAN_AUTOTUNE")
    if setting is not None:
        monkeypatch.setenv("SPIGAN_AUTOTUNE", setting)
    images(network())
    modulated_conv2d(torch.ones(2, 8, 6, 6), torch.ones(8, 8, 3, 3), torch.ones(2, 8))
    assert not choices.candidates and not [*tmp_path.iterdir()]


# ---- Candidates ----


def candidates_of(choices: Choices, backend: str, call: LayerCall, others: bool = False) -> list[str] | None:
    choices.candidates.clear()
    plans.decisions.clear()
    layer_plan(backend, call, pack, others=others)
    assert len(choices.candidates) <= 1
    return next(iter(choices.candidates.values()), None)


def test_candidates_on_a_cpu(choices: Choices) -> None:
    # The fixed choice comes first.
    assert candidates_of(choices, "cpp", call_of()) == ["cpp direct", "cpp winograd"]
    assert candidates_of(choices, "cpp", call_of(up=2)) == ["cpp products", "cpp direct"]
    choices.runs = False  # only the name counts
    assert candidates_of(choices, "cpp", call_of(n=64, channels=128)) == ["cpp winograd", "cpp direct"]
    assert candidates_of(choices, "cpp", call_of(dtype=torch.bfloat16)) is None
    assert candidates_of(choices, "cpp", call_of(dtype=torch.float64, up=2)) is None
    assert candidates_of(choices, "cpp", call_of(n=0)) is None
    inseparable = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) / 2
    assert candidates_of(choices, "cpp", call_of(up=2, filter=inseparable)) is None
    few_outputs = call_of(shape=torch.Size((3, 8, 1, 1)), padding=0)
    assert candidates_of(choices, "cpp", few_outputs) is None


def test_candidates_on_a_gpu(choices: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.runs = False
    here = {"cuda", "triton"}
    monkeypatch.setattr(backends, "why_unavailable", lambda op, name, device: None if name in here else "no")
    large = {"n": 64, "channels": 512, "size": 16, "dtype": torch.bfloat16, "device": "meta"}

    def found(backend: str, others: bool = True, **changes: Any) -> list[str] | None:
        return candidates_of(choices, backend, call_of(**large | changes), others)

    assert found("cuda") == ["cuda direct", "triton taps"]
    in_parts = ["cuda transposed", "cuda transposed 32 MiB at a time"]
    assert found("cuda", up=2) == [*in_parts, "triton taps", "triton taps 32 MiB at a time"]
    assert found("cuda", up=2, n=1) == ["cuda transposed", "triton taps"]
    # 33 images share the plan of 64, and so must have its candidates, though their result is smaller than 32 MiB.
    assert found("cuda", up=2, n=33, channels=384) == found("cuda", up=2, n=64, channels=384) == found("cuda", up=2)
    # The last layer only keeps its RGB images; Triton never writes its result.
    assert found("cuda", keep=False) is not None
    assert found("cuda", keep=False, n=256) == ["cuda direct", "cuda direct 32 MiB at a time", "triton taps"]
    # A backend that was asked for by name is the only one.
    assert found("cuda", others=False, up=2) == in_parts
    assert found("cuda", others=False) is None
    # Without the CUDA part of the extension, Triton's passes follow the library's convolution.
    here = {"triton"}
    assert found("triton") == ["triton taps", "triton direct"]
    assert found("triton", up=2, n=1) == ["triton taps", "triton transposed"]


def test_a_gpu_is_asked_once_for_each_layer(choices: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    choices.runs, asked = False, []
    answers = iter([None, "cuda direct", "triton taps", "triton taps"])

    def choose(*arguments: Any) -> str | None:
        asked.append(arguments[0])
        return next(answers)

    monkeypatch.setattr(backends, "why_unavailable", lambda op, name, device: None)
    monkeypatch.setattr(plans, "choose", choose)
    call = call_of(device="meta")

    def found(call: LayerCall) -> str:
        return str(layer_plan("cuda", call, pack, others=True))

    assert found(call) == "cuda direct"  # the fixed choice: nothing is known while a graph is captured
    assert found(call) == found(call) == "cuda direct"  # measured, and then known
    assert found(call_of(device="meta", n=3)) == "triton taps" and len(asked) == 3
    plans.forget()
    assert found(call) == "triton taps"


def test_keys_tell_layers_apart() -> None:
    style, rgb = torch.ones(2, 8), LayerEnd(rgb_weight=torch.ones(2, 3, 8))
    calls = [
        call_of(), call_of(n=3), call_of(channels=9), call_of(size=7), call_of(up=2), call_of(dtype=torch.bfloat16),
        call_of(kept=False), call_of(style=style), call_of(end=rgb), call_of(end=rgb, keep=False),
        call_of(shape=torch.Size((9, 8, 3, 3))), call_of(shape=torch.Size((8, 8, 5, 5)), padding=2),
        call_of(up=2, filter=torch.ones(2, 2) / 4),
    ]  # fmt: skip
    keys = [call.key(("cpp",)) for call in calls]
    assert len(set(keys)) == len({call.signature for call in calls}) == len(calls)
    assert calls[0].key(("cuda",)) != calls[0].key(("cuda", "triton"))
    # Batches count up to the next power of two.
    by_n = [call_of(n=n).key(("cpp",)) for n in (1, 2, 3, 4, 5, 8, 9)]
    assert by_n[2] == by_n[3] and by_n[4] == by_n[5] and len(set(by_n)) == 5


# ---- Layers that follow a plan ----


@pytest.mark.parametrize("form", ["direct", "winograd", "products"])
def test_a_network_follows_its_plans(form: str, choices: Choices) -> None:
    generator = network()
    choices.wish = of_form(form)
    torch.testing.assert_close(images(generator), images(generator, "reference"), rtol=0, atol=1e-4)
    forms = {key[1] for key in generator.prepared.weights}
    assert form in forms
    # The first block has one layer, the two others an upsampling one too; the last one only keeps its RGB image.
    assert sorted(map(len, choices.candidates.values())) == [2] * 5
    assert forms - {form} <= {"direct", "products"}  # of the layers to which the form does not apply


@pytest.mark.parametrize("form", ["direct", "winograd", "products"])
@pytest.mark.parametrize("up", [1, 2])
def test_the_operation_follows_its_plans(up: int, form: str, choices: Choices) -> None:
    choices.wish = of_form(form)
    x, weight, style = torch.randn(3, 8, 7, 7), torch.randn(8, 8, 3, 3), torch.randn(3, 8)
    actual, expected = (modulated_conv2d(x, weight, style, up=up, backend=name) for name in ("cpp", "reference"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    ((key, names),) = choices.candidates.items()
    assert "weights not kept" in key and "styled" in key and len(names) == 2


def test_weights_that_are_not_kept_are_packed_in_each_timed_call() -> None:
    packed: list[str] = []

    def noted(plan: LayerPlan) -> LayerWeight:
        packed.append(plan.form)
        return pack(plan)

    def time_twice(key: str, device: torch.device, candidates: Any) -> str:
        for prepare in candidates.values():
            function = prepare()
            function()
            function()
        return next(iter(candidates))

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIGAN_AUTOTUNE", "1")
        patch.setattr(layer_plans.plans, "choose", time_twice)
        layer_plan("cpp", call_of(kept=True), noted)
        assert packed == ["direct", "winograd"]
        packed.clear()
        layer_plan("cpp", call_of(kept=False), noted)
        assert packed == ["direct", "direct", "winograd", "winograd"]


def test_measured_and_kept_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once through everything: times, plans in memory and in the file, and the same images in the next process."""
    monkeypatch.setenv("SPIGAN_AUTOTUNE", "1")
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path))
    plans.forget()
    try:
        first = images(network())
        torch.testing.assert_close(first, images(network(), "reference"), rtol=0, atol=1e-4)
        saved = plans.saved_plans(torch.device("cpu"))[1]
        assert len(saved) == 5
        assert all(time is not None and time > 0 for plan in saved.values() for time in plan.milliseconds.values())
        plans.forget()
        monkeypatch.setattr(plans, "seconds_per_call", None)  # nothing is measured again
        assert torch.equal(images(network()), first)
        assert torch.equal(images(network(), n=4), images(network(), n=4))
    finally:
        plans.forget()
