"""spigan.doctor: its cases cover the operations, and it finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spigan import doctor, ops
from spigan.ops import backends

CPU = torch.device("cpu")


def named(name: str) -> doctor.Case:
    return next(case for case in doctor.cases() if case.name == name)


def test_cases_cover_the_operations() -> None:
    cases = doctor.cases()
    assert len({case.name for case in cases}) == len(cases) == 30
    for dtype in (torch.float32, torch.bfloat16):
        assert {case.op for case in cases if case.dtype == dtype} == set(backends.operations())
        differentiable = {case.op for case in cases if case.gradients and case.dtype == dtype}
        assert differentiable == {"rk4_mlp", "fir_bias_act", "modulated_conv2d"}


@pytest.mark.slow
def test_kernels_are_right() -> None:
    findings = list(doctor.examine(CPU, ["cpp"]))
    assert [finding.case for finding in findings if not finding.passed] == []
    assert len(findings) == 30 and all(finding.allowed > 0 for finding in findings)


def spoil(change: Callable[[Tensor], Tensor]) -> None:
    right: Any = backends.function("rk4_mlp", "reference")
    ops.register_backend("mine", {"rk4_mlp": lambda *args, **options: change(right(*args, **options))})


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (lambda states: states, True),
        (lambda states: states + 1e-3, False),
        (lambda states: torch.where(states == states.max(), torch.nan, states), False),
        (lambda states: states.half().float(), False),
    ],
    ids=["right", "wrong", "NaN", "rounded"],
)
@pytest.mark.usefixtures("added_backends")
def test_what_is_wrong_is_found(change: Callable[[Tensor], Tensor], passed: bool) -> None:
    spoil(change)
    finding = doctor.check(named("rk4_mlp, two times, float32"), "mine", CPU)
    assert finding.passed is passed and finding.failure is None


@pytest.mark.usefixtures("added_backends")
def test_wrong_gradients_are_found() -> None:
    spoil(lambda states: states + 0.1 * (states - states.detach()))
    finding = doctor.check(named("rk4_mlp, gradients, float32"), "mine", CPU)
    assert not finding.passed and finding.error > 10 * finding.allowed


@pytest.mark.usefixtures("added_backends")
def test_what_raises_or_has_another_shape_is_reported() -> None:
    spoil(lambda states: states[:, :1])
    finding = doctor.check(named("rk4_mlp, two times, float32"), "mine", CPU)
    assert finding.failure == "expected shape [2, 3, 48], got [2, 1, 48]" and not finding.passed

    def fail(states: Tensor) -> Tensor:
        raise RuntimeError("out of order")

    spoil(fail)
    finding = doctor.check(named("rk4_mlp, two times, float32"), "mine", CPU)
    assert finding.failure == "RuntimeError: out of order" and not finding.passed


def test_a_backend_that_is_required_and_missing_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    case = named("rk4_mlp, two times, float32")
    monkeypatch.setattr(doctor, "cases", lambda: [case])
    (finding,) = doctor.examine(CPU, ["cuda"])
    assert finding.failure == "it runs on CUDA devices, not on cpu" and not finding.passed


def test_convolutions_are_exact_for_a_while() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    with doctor.exact_convolutions():
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before
