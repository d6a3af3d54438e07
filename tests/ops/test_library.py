"""spigan.ops.library: operators as PyTorch sees them, and NVTX ranges that cost nothing when off."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from spigan import _C
from spigan.ops import backends, library, rk4_mlp

OPERATORS = ["path_interpolate", "philox_normal", "rk4_mlp", "rk4_mlp_backward"]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_for_both_devices_and_compilers(name):
    for key in ("CPU", "CUDA", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"spigan::{name}", key)


def test_numbers_of_dtypes_and_activations_are_those_of_the_extension():
    assert _C.DTYPES == ("float32", "bfloat16", "float16", "float64", "uint8")
    for name in _C.DTYPES:
        assert _C.DTYPES[library.dtype_number(getattr(torch, name))] == name
    with pytest.raises(ValueError, match="not in tuple"):
        library.dtype_number(torch.int32)
    from spigan.ops.rk4_mlp import ACTIVATIONS

    assert set(_C.ACTIVATIONS) == set(ACTIVATIONS)


def test_launch_passes_addresses_numbers_and_threads(set_threads, monkeypatch):
    calls = []
    extension = SimpleNamespace(DTYPES=_C.DTYPES, kernel=lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(backends, "extension", lambda: extension)
    x = torch.zeros(3)
    for threads in (1, 2):
        set_threads(threads)
        library.launch("cpp", "kernel", x[1:], None, 3, True, 0.5, [4], torch.float16, other=x, nothing=None)
        args, kwargs = calls.pop()
        assert args == (x.data_ptr() + 4, 0, 3, True, 0.5, [4], 2, threads)
        assert kwargs == {"other": x.data_ptr(), "nothing": 0}


def test_launch_on_a_gpu_passes_the_current_stream(monkeypatch):
    calls = []
    cuda = SimpleNamespace(kernel=lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(backends, "extension", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    library.launch("cuda", "kernel", 5)
    assert calls == [((5, 77), {})]


@pytest.fixture
def ranges(monkeypatch):
    """Names of the NVTX ranges as they begin, and None as one ends."""
    calls = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append(None))
    return calls


def double(x, *, fail=False):
    if fail:
        raise KeyError("from inside")
    return 2 * x


def test_annotate_that_is_off_returns_the_very_function(ranges, monkeypatch):
    monkeypatch.delenv("SPIGAN_NVTX", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert library.annotate("name")(double) is double
    assert library.annotate("name", enabled=False)(double) is double
    monkeypatch.setenv("SPIGAN_NVTX", "0")
    assert library.annotate("name")(double) is double
    monkeypatch.setenv("SPIGAN_NVTX", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # NVTX of a torch without CUDA raises
    assert library.annotate("name")(double) is double
    assert ranges == []


def test_annotate_pushes_and_pops_also_when_the_function_raises(ranges, monkeypatch):
    annotated = library.annotate("spigan::double", enabled=True)(double)
    assert annotated(3) == 6 and ranges == ["spigan::double", None]
    with pytest.raises(KeyError, match="from inside"):
        annotated(3, fail=True)
    assert ranges == ["spigan::double", None] * 2
    monkeypatch.setenv("SPIGAN_NVTX", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    outer = library.annotate("outer")(lambda x: annotated(x) + 1)
    assert outer(1) == 3 and ranges[4:] == ["outer", "spigan::double", None, None]


def test_stages_are_ranges_too(ranges, monkeypatch):
    monkeypatch.delenv("SPIGAN_NVTX", raising=False)
    with library.stage("mapping"):
        assert ranges == []
    monkeypatch.setenv("SPIGAN_NVTX", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with library.stage("mapping"):
        assert ranges == ["mapping"]
    assert ranges == ["mapping", None]


def test_kernels_have_no_ranges_unless_they_are_asked_for(ranges):
    rk4_mlp(torch.ones(1, 2), torch.ones(1, 2, 2), torch.ones(1, 2), torch.ones(1, 2), [1.0], backend="cpp")
    assert ranges == []


def test_environment_variable_turns_the_ranges_of_all_kernels_on(tmp_path):
    program = """
import torch
calls = []
torch.cuda.is_available = lambda: True
torch.cuda.nvtx.range_push, torch.cuda.nvtx.range_pop = calls.append, lambda: calls.append("end")
from spigan import ops
x = torch.ones(1, 2, requires_grad=True)
ops.rk4_mlp(x, torch.ones(1, 2, 2), torch.ones(1, 2), torch.ones(1, 2), [1.0], backend="cpp").sum().backward()
ops.path_interpolate(ops.philox_normal((1, 1, 2, 2), seed=0, backend="cpp"), [1.0], seed=0, backend="cpp")
print(*calls)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "SPIGAN_NVTX": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    names = ["rk4_mlp", "rk4_mlp_backward", "philox_normal", "path_interpolate"]
    assert done.stdout.split() == [word for name in names for word in (f"spigan::{name}", "end")]
