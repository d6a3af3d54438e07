"""spigan.ops.backends: who decides which backend runs, and what happens when it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

from spigan import ops
from spigan.ops import BACKENDS, BackendUnavailable, backends, use_backend
from spigan.ops.backends import Implementation

CPU = torch.device("cpu")
OP = "philox_normal"  # it has two backends on the CPU


@pytest.fixture(autouse=True)
def _no_request(monkeypatch):
    monkeypatch.delenv("SPIGAN_BACKEND", raising=False)


def test_the_four_operations_are_registered_with_a_reference():
    assert set(backends.operations()) >= {"modulated_conv2d", "path_interpolate", "philox_normal", "rk4_mlp"}
    for op in backends.operations():
        assert backends.why_unavailable(op, "reference", CPU) is None
        assert backends.why_unavailable(op, "reference", torch.device("cuda")) is None


def test_auto_takes_the_first_that_can_run():
    assert backends.requested() == ("auto", "default")
    assert backends.choose(OP, None, CPU) == "cpp"
    assert backends.choose(OP, None, torch.device("meta")) == "reference"


def test_auto_goes_down_the_order(monkeypatch):
    monkeypatch.setattr(backends, "implementations", {})
    reasons = {"cuda": "no driver", "triton": "no compiler", "reference": None}
    for backend in reasons:
        backends.register("op", backend, lambda device, backend=backend: reasons[backend])
    cuda = torch.device("cuda")
    assert backends.choose("op", None, cuda) == "reference"
    reasons["triton"] = None
    assert backends.choose("op", None, cuda) == "triton"
    reasons["cuda"] = None
    assert backends.choose("op", None, cuda) == "cuda"
    assert backends.choose("op", "auto", cuda) == "cuda"
    assert backends.choose("op", None, CPU) == "reference"


def test_argument_then_context_then_environment_then_auto(monkeypatch):
    monkeypatch.setenv("SPIGAN_BACKEND", "reference")
    assert backends.requested() == ("reference", "SPIGAN_BACKEND")
    assert backends.choose(OP, None, CPU) == "reference"
    with use_backend("cpp"):
        assert backends.requested() == ("cpp", "use_backend")
        assert backends.choose(OP, None, CPU) == "cpp"
        assert backends.requested("reference") == ("reference", "the argument backend=")
        assert backends.choose(OP, "reference", CPU) == "reference"
    with use_backend("auto"):
        assert backends.choose(OP, None, CPU) == "cpp"
    assert backends.choose(OP, "auto", CPU) == "cpp"
    monkeypatch.setenv("SPIGAN_BACKEND", "")
    assert backends.requested() == ("auto", "default")


def test_contexts_nest_and_an_exception_restores():
    with use_backend("cpp"):
        with use_backend("reference"):
            assert backends.requested()[0] == "reference"
        assert backends.requested()[0] == "cpp"
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert backends.requested()[0] == "cpp"
        with pytest.raises(ValueError, match="use_backend names"), use_backend("nonsense"):
            pass
        assert backends.requested()[0] == "cpp"
    assert backends.requested() == ("auto", "default")


def test_a_context_holds_in_other_threads():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.choose(OP, None, CPU)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["nonsense", "CPP", "cpu", " "])
def test_unknown_names(name, monkeypatch):
    expected = "expected one of auto, reference, cpp, triton, cuda"
    with pytest.raises(ValueError, match=f"backend= names the backend '{name}'; {expected}"):
        backends.choose(OP, name, CPU)
    with pytest.raises(ValueError, match=f"use_backend names the backend '{name}'; {expected}"), use_backend(name):
        pass
    monkeypatch.setenv("SPIGAN_BACKEND", name)
    with pytest.raises(ValueError, match=f"SPIGAN_BACKEND names the backend '{name}'; {expected}"):
        ops.philox_normal((3,), seed=0)


def _call(op: str, backend: str | None) -> None:
    ones = torch.ones
    if op == "philox_normal":
        ops.philox_normal((3,), seed=0, backend=backend)
    elif op == "rk4_mlp":
        ops.rk4_mlp(ones(1, 2), ones(1, 2, 2), ones(1, 2), ones(1, 2), [1.0], backend=backend)
    elif op == "path_interpolate":
        ops.path_interpolate(ones(1, 1, 2, 2), [1.0], seed=0, backend=backend)
    elif op == "fir_bias_act":
        ops.fir_bias_act(ones(1, 1, 2, 2), backend=backend)
    else:
        ops.modulated_conv2d(ones(1, 1, 2, 2), ones(1, 1, 1, 1), ones(1, 1), backend=backend)


@pytest.mark.parametrize("op", backends.operations())
def test_a_backend_asked_for_by_name_runs_or_raises(op, monkeypatch):
    for backend in BACKENDS:
        cause = backends.why_unavailable(op, backend, CPU)
        if cause is None:
            _call(op, backend)
            continue
        assert len(cause) > 20
        for source, request in {
            "the argument backend=": lambda backend=backend: _call(op, backend),
            "use_backend": lambda backend=backend: _within(backend, op),
        }.items():
            with pytest.raises(BackendUnavailable) as error:
                request()
            assert str(error.value) == f"{op}: backend {backend!r} (requested by {source}) cannot run on cpu: {cause}"
        monkeypatch.setenv("SPIGAN_BACKEND", backend)
        with pytest.raises(BackendUnavailable, match="requested by SPIGAN_BACKEND"):
            _call(op, None)
        monkeypatch.delenv("SPIGAN_BACKEND")


def _within(backend: str, op: str) -> None:
    with use_backend(backend):
        _call(op, None)


def test_cause_of_a_backend_without_implementation(monkeypatch):
    monkeypatch.setattr(backends, "implementations", {"op": {"reference": Implementation(backends.always_available)}})
    with pytest.raises(BackendUnavailable, match=r"no triton implementation of op \(it has: reference\)"):
        backends.choose("op", "triton", CPU)


def test_cpp_is_for_the_cpu_alone():
    with pytest.raises(BackendUnavailable, match="it runs on the CPU, not on meta"):
        ops.philox_normal((3,), seed=0, device="meta", backend="cpp")


# ---- Limits of the kernels: refused by name, left to the reference by "auto" ----


class _Chosen(Exception):
    pass


@pytest.fixture
def everywhere(monkeypatch):
    """Let every backend run on the CPU, as far as `choose` can tell, cuda first; calls end with the choice."""
    for op in ("philox_normal", "path_interpolate", "rk4_mlp"):
        for backend in ("triton", "cuda"):
            monkeypatch.setitem(backends.implementations[op], backend, Implementation(backends.always_available))
    monkeypatch.setitem(backends.auto_order, "cpu", ("cuda", "triton", "cpp", "reference"))
    choose = backends.choose

    def stop(*args):
        raise _Chosen(choose(*args))

    monkeypatch.setattr(backends, "choose", stop)


def _mlp(dim=16, layers=2, times=1, dtype=torch.float32, **options):
    zeros = [torch.zeros(shape, dtype=dtype) for shape in ((2, dim), (layers, dim, dim), (layers, dim), (layers, dim))]
    ops.rk4_mlp(*zeros, [(k + 1) / times for k in range(times)], **options)


def _path(times=1, x0_dtype=torch.float32, dtype=torch.float32, noise_dtype=None, **options):
    x0 = torch.zeros(2, 1, 2, 2).to(x0_dtype)
    noise = None if noise_dtype is None else torch.zeros(2, 1, 2, 2, dtype=noise_dtype)
    ops.path_interpolate(x0, [(k + 1) / times for k in range(times)], seed=0, noise=noise, dtype=dtype, **options)


def _normal(dtype, **options):
    ops.philox_normal((3,), seed=0, dtype=dtype, **options)


FLOAT64 = "it accepts float32, bfloat16 and float16, not float64"
WIDTH = "it accepts D that is a multiple of 16 up to 1024 and up to 8 layers, got D = {} and {} layers"
PATH_FLOAT64 = "it computes in float32; only the reference accepts float64 images or results"
# (call, what "auto" falls back to, backends that refuse, cause)
BEYOND = [
    (lambda **o: _normal(torch.float64, **o), "cuda", ["triton"], "it draws float32, bfloat16 or float16, not float64"),
    (lambda **o: _path(9, **o), "reference", ["cpp", "triton", "cuda"], "it accepts at most 8 times, got 9"),
    (lambda **o: _path(x0_dtype=torch.float64, **o), "reference", ["cpp", "triton", "cuda"], PATH_FLOAT64),
    (lambda **o: _path(dtype=torch.float64, **o), "reference", ["cpp", "triton", "cuda"], PATH_FLOAT64),
    (lambda **o: _mlp(24, **o), "cpp", ["triton", "cuda"], WIDTH.format(24, 2)),
    (lambda **o: _mlp(8, **o), "cpp", ["triton", "cuda"], WIDTH.format(8, 2)),
    (lambda **o: _mlp(0, **o), "cpp", ["triton", "cuda"], WIDTH.format(0, 2)),
    (lambda **o: _mlp(1040, 1, **o), "cpp", ["triton", "cuda"], WIDTH.format(1040, 1)),
    (lambda **o: _mlp(16, 9, **o), "cpp", ["triton", "cuda"], WIDTH.format(16, 9)),
    (lambda **o: _mlp(times=65, **o), "cpp", ["triton", "cuda"], "it accepts at most 64 times, got 65"),
    (lambda **o: _mlp(dtype=torch.float64, **o), "cpp", ["triton", "cuda"], FLOAT64),
]
WITHIN = [
    *(lambda dtype=dtype, **o: _normal(dtype, **o) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    *(lambda dtype=dtype, **o: _mlp(dtype=dtype, **o) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    lambda **o: _mlp(1024, 1, **o),
    lambda **o: _mlp(16, 8, **o),
    lambda **o: _mlp(times=64, **o),
    lambda **o: _path(8, **o),
    lambda **o: _path(x0_dtype=torch.uint8, dtype=torch.bfloat16, noise_dtype=torch.float64, **o),
]


@pytest.mark.parametrize(("call", "fallback", "refusing", "cause"), BEYOND)
def test_beyond_a_limit(call, fallback, refusing, cause, everywhere):
    with pytest.raises(_Chosen, match=f"^{fallback}$"):
        call()
    for backend in refusing:
        message = rf"backend '{backend}' \(requested by use_backend\) cannot run on cpu: {re.escape(cause)}"
        with pytest.raises(BackendUnavailable, match=message), use_backend(backend):
            call()
    for backend in set(BACKENDS) - set(refusing):
        with pytest.raises(_Chosen, match=f"^{backend}$"):
            call(backend=backend)


@pytest.mark.parametrize("call", WITHIN)
def test_within_all_limits(call, everywhere):
    with pytest.raises(_Chosen, match=r"^cuda$"):
        call()
    for backend in BACKENDS:
        with pytest.raises(_Chosen, match=f"^{backend}$"):
            call(backend=backend)


def test_what_no_kernel_takes_is_computed_by_the_reference(noted_kernels):
    x0, times = torch.rand(2, 1, 3, 3), [k / 9 for k in range(1, 10)]
    with noted_kernels:
        ops.path_interpolate(x0, times[:8], noise=torch.randn_like(x0))
        assert noted_kernels.calls == [("path_interpolate", "cpp")]
        noted_kernels.calls.clear()
        x_T, i = ops.path_interpolate(x0, times, seed=3, offset=5)
        results = ops.path_interpolate(x0.double(), [0.5], noise=torch.randn_like(x0))
    assert noted_kernels.calls == []
    assert i.shape == (9, *x0.shape) and results[0].dtype == torch.float32
    torch.testing.assert_close(i, torch.stack([t * x0 + (1 - t) * x_T for t in times]), rtol=0, atol=1e-6)


def test_describe(monkeypatch):
    entry = backends.describe(CPU)[OP]
    assert entry["chosen"] == "cpp" and entry["why"] == "auto: first that runs on cpu"
    assert entry["not_chosen"] == ["reference"]
    for op, entry in backends.describe(CPU).items():
        chosen = [entry["chosen"]] if entry["chosen"] else []
        everything = [*chosen, *entry["not_chosen"], *entry["cannot_run"], *entry["not_implemented"]]
        assert sorted(everything) == sorted(BACKENDS), op
    monkeypatch.setenv("SPIGAN_BACKEND", "reference")
    assert backends.describe(CPU)[OP]["why"] == "requested by SPIGAN_BACKEND"
    monkeypatch.setattr(
        backends, "implementations", {"op": {"reference": Implementation(lambda device: "out of order")}}
    )
    entry = backends.describe(CPU)["op"]
    assert entry["chosen"] is None and entry["cannot_run"] == {"reference": "out of order"}
    assert entry["why"] == "reference was requested by SPIGAN_BACKEND: out of order"
    assert entry["not_implemented"] == ["cpp", "triton", "cuda"]


# ---- Backends of others ----


def test_a_backend_of_ones_own_gets_checked_arguments_with_defaults(added_backends):
    seen = []

    def draw(seeds, row_numel, offset):
        seen.append((seeds.tolist(), row_numel, offset))
        return torch.full((seeds.shape[0], row_numel), 7.0)

    ops.register_backend("seven", {OP: draw})
    assert backends.choose(OP, None, CPU) == "cpp", "not automatic unless it says so"
    assert ops.philox_normal((2, 3), seed=5, dtype=torch.float16, backend="seven").tolist() == [[7.0] * 3] * 2
    assert seen == [([5], 6, 0)]
    with use_backend("seven"), pytest.raises(ValueError, match="seed must be"):
        ops.philox_normal((2, 3), seed=-1)
    with pytest.raises(BackendUnavailable, match="has no seven implementation of rk4_mlp"):
        _mlp(backend="seven")
    assert "seven" not in BACKENDS
    assert backends.describe(CPU)[OP]["not_chosen"] == ["reference", "seven"]


def test_every_operation_hands_a_backend_what_its_reference_takes(added_backends):
    """Each one's reference, registered again under another name, gives the reference's bits."""
    functions = {op: backends.function(op, "reference") for op in backends.operations()}
    calls = []

    def noting(op):
        def call(*args, **kwargs):
            calls.append(op)
            return functions[op](*args, **kwargs)

        return call

    ops.register_backend("again", {op: noting(op) for op in functions})
    x = torch.randn(2, 3, 4, 4)
    operations = {
        "philox_normal": lambda: ops.philox_normal((3, 5), seed=1),
        "path_interpolate": lambda: ops.path_interpolate(x, [0.5, 1.0], seed=1)[1],
        "rk4_mlp": lambda: ops.rk4_mlp(x[0, 0], x[1], x[0, :, 0], x[0, :, 1], [0.5, 1.0]),
        "modulated_conv2d": lambda: ops.modulated_conv2d(x, x.new_ones(2, 3, 3, 3), x[:, :, 0, 0], up=2, noise_seed=3),
        "fir_bias_act": lambda: ops.fir_bias_act(x, bias=x[0, :, 0, 0], activation="lrelu"),
    }
    assert set(operations) == set(functions)
    for op, call in operations.items():
        with use_backend("reference"):
            expected = call()
        assert calls == []
        with use_backend("again"):
            assert torch.equal(call(), expected), op
        assert calls.count(op) == 1, calls  # noise of a seed is an operation of its own
        calls.clear()


def test_automatic_where_it_says_so(added_backends):
    down = []
    functions = {"rk4_mlp": lambda *args: torch.zeros(1)}
    ops.register_backend("mine", functions, auto=["cpu", "xpu"], unavailable=lambda device: down[0] if down else None)
    assert backends.choose("rk4_mlp", None, CPU) == "mine"
    assert backends.choose("rk4_mlp", None, torch.device("xpu")) == "mine"
    assert backends.choose("rk4_mlp", None, torch.device("meta")) == "reference"
    assert backends.choose(OP, None, CPU) == "cpp", "it does not implement this one"
    down.append("its licence has expired")
    assert backends.choose("rk4_mlp", None, CPU) == "cpp"
    with pytest.raises(BackendUnavailable, match="its licence has expired"):
        backends.choose("rk4_mlp", "mine", CPU)
    ops.register_backend("mine", {OP: functions["rk4_mlp"]})  # again: nothing of the first is left
    assert backends.choose("rk4_mlp", None, CPU) == "cpp"
    assert backends.function("rk4_mlp", "mine") is None and backends.function(OP, "mine") is not None
    assert backends.auto_order["cpu"] == ("cpp", "reference")


def test_the_generator_without_gradients_calls_it(added_backends):
    """Without gradients the generator has passes of its own for kernels, but not for what it does not know."""
    from spigan import Generator
    from spigan.ops.modulated_conv2d import modulated_conv2d_reference

    calls = []
    generator = Generator(8, 1, dim_h=4, channel_base=32, channel_max=4).eval().requires_grad_(False)
    h = torch.randn(2, 4)
    expected = generator(h)

    def convolve(*args, **kwargs):
        calls.append(1)
        return modulated_conv2d_reference(*args, **kwargs)

    ops.register_backend("mine", {"modulated_conv2d": convolve}, auto=["cpu"])
    torch.testing.assert_close(generator(h), expected)
    assert len(calls) == 5  # three layers, two ToRGB


@pytest.mark.parametrize(
    ("name", "functions", "error", "message"),
    [
        ("cpp", {OP: print}, ValueError, "'cpp' is one of spigan's own backends"),
        ("auto", {OP: print}, ValueError, "'auto' is one of spigan's own backends"),
        ("", {OP: print}, ValueError, "must be an identifier, got ''"),
        ("mine", {}, ValueError, "must implement at least one operation: "),
        ("mine", {"philox": print}, ValueError, "unknown operation 'philox'; expected one of "),
        ("mine", {OP: "print"}, TypeError, "needs a function for philox_normal, got str"),
    ],
)
def test_backends_that_are_refused(name, functions, error, message, added_backends):
    with pytest.raises(error, match=re.escape(message)):
        ops.register_backend(name, functions)
    with pytest.raises(ValueError, match=r"'mine'; expected one of auto, reference, cpp, triton, cuda$"):
        ops.philox_normal((1,), seed=0, backend="mine")


@pytest.mark.parametrize("auto", ["cpu", ["cuda:0"], [torch.device("cpu")]])
def test_automatic_on_what_is_no_type_of_device(auto, added_backends):
    """As a list, "cpu" would be the devices c, p and u, which are never met."""
    before = dict(backends.auto_order)
    with pytest.raises(ValueError, match="auto must be a list of device types"):
        ops.register_backend("mine", {OP: print}, auto=auto)
    assert backends.auto_order == before and backends.function(OP, "mine") is None


SABOTAGE = {
    "missing": "import sys; sys.modules['spigan._C'] = None",
    "damaged": """
        import sys
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "spigan._C":
                    raise OSError("undefined symbol: some_function")
        sys.meta_path.insert(0, Finder())
    """,
}


@pytest.mark.parametrize(
    ("sabotage", "cause"),
    [("missing", "ModuleNotFoundError: import of spigan._C halted"), ("damaged", "OSError: undefined symbol: some_f")],
)
def test_without_the_extension(sabotage, cause, tmp_path):
    """auto falls back to the reference; cpp, requested by name, raises with the import's own error."""
    program = textwrap.dedent(SABOTAGE[sabotage]) + textwrap.dedent("""
        import torch
        from spigan import ops
        from spigan.ops import backends
        automatic = ops.philox_normal((2, 5), seed=3)
        assert torch.equal(automatic, ops.philox_normal((2, 5), seed=3, backend="reference"))
        assert backends.choose("philox_normal", None, torch.device("cpu")) == "reference"
        for call in (lambda: ops.philox_normal((2,), seed=3, backend="cpp"), backends.extension):
            try:
                call()
            except ops.BackendUnavailable as error:
                print(error)
            else:
                raise SystemExit("it ran")
    """)
    environment = {name: value for name, value in os.environ.items() if name != "SPIGAN_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    for line in done.stdout.splitlines():
        assert f"the compiled extension spigan._C does not load ({cause}" in line


def _compiled_backends(function, *arguments):
    """Compile with fullgraph=True, run once, and return what the graph calls for the noise."""
    found = []

    def record(graph_module, inputs):
        targets = [str(node.target) for node in graph_module.graph.nodes]
        found.append("cpp" if any("spigan.philox_normal" in target for target in targets) else "reference")
        return graph_module.forward

    torch.compile(function, backend=record, fullgraph=True)(*arguments)
    return found


def test_choosing_does_not_break_a_compiled_graph(monkeypatch):
    def draw(x):
        return x + ops.philox_normal((3, 5), seed=7)

    x = torch.zeros(3, 5)
    assert _compiled_backends(draw, x) == ["cpp"]
    torch.compiler.reset()
    with use_backend("reference"):
        assert _compiled_backends(draw, x) == ["reference"]
    torch.compiler.reset()
    monkeypatch.setenv("SPIGAN_BACKEND", "reference")
    assert _compiled_backends(draw, x) == ["reference"]

    def draw_within(x):
        with use_backend("cpp"):
            return x + ops.philox_normal((3, 5), seed=7)

    assert _compiled_backends(draw_within, x) == ["cpp"]
    assert _compiled_backends(lambda x: x + ops.philox_normal((3, 5), seed=7, backend="cpp"), x) == ["cpp"]


def test_a_compiled_function_follows_a_later_use_backend():
    graphs = []

    def record(graph_module, inputs):
        graphs.append(any("spigan.philox_normal" in str(node.target) for node in graph_module.graph.nodes))
        return graph_module.forward

    draw = torch.compile(lambda x: x + ops.philox_normal((2,), seed=7), backend=record, fullgraph=True)
    draw(torch.zeros(2))
    with use_backend("reference"):
        draw(torch.zeros(2))
    draw(torch.zeros(2))
    assert graphs == [True, False]
