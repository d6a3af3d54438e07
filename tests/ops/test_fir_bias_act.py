"""fir_bias_act against its definition written out, its derivatives against numerical ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from spigan.ops import BACKENDS, BackendUnavailable, fir_bias_act, philox_normal
from spigan.ops.backends import why_unavailable
from spigan.ops.fir_bias_act import downsample2d, upsample2d
from spigan.ops.upfirdn2d import fir_filter

KERNELS = [b for b in BACKENDS[1:] if why_unavailable("fir_bias_act", b, torch.device("cpu")) is None]
RUNNING = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FIR = {
    "none": {},
    "blur": {"filter": fir_filter(), "padding": (2, 2)},
    "up": {"filter": fir_filter(), "up": 2, "padding": (2, 1), "fir_gain": 4.0},
    "down": {"filter": fir_filter(), "down": 2, "padding": (1, 1)},
    "up and down, cropped": {"filter": fir_filter([1.0, 2.0, 5.0]), "up": 2, "down": 2, "padding": (-1, 4)},
    "one tap": {"filter": fir_filter([1.0]), "up": 2, "padding": (0, 0), "fir_gain": 0.5},
    "not separable": {"filter": fir_filter(torch.tensor([[1.0, 5.0], [4.0, -3.0]])), "padding": (0, 3)},
    "eight taps": {"filter": fir_filter(torch.arange(1.0, 9.0)), "down": 2, "padding": (5, 3)},
}
END = {
    "linear": {},
    "lrelu": {"activation": "lrelu", "gain": 2**0.5},
    "clamped": {"activation": "lrelu", "gain": 1.5, "clamp": 0.8},
    "linear, clamped": {"clamp": 0.7},
}


def by_definition(
    x, *, filter=None, up=1, down=1, padding=(0, 0), fir_gain=1.0, factor=None, noise=None, noise_strength=None,
    bias=None, activation="linear", gain=1.0, clamp=None, add=None,
):  # fmt: skip
    """Every value of the result for itself, by Python's floats."""
    n, channels, height, width = x.shape
    before, after = padding
    taps = 1 if filter is None else len(filter)
    rows, columns = ((s * up + before + after - taps) // down + 1 for s in (height, width))
    out = torch.empty(n, channels, rows, columns, dtype=torch.float64)
    for i, c, row, column in itertools.product(*map(range, out.shape)):
        value = 0.0
        for a, b in itertools.product(range(taps), repeat=2):
            y, x_ = row * down + a - before, column * down + b - before
            if y % up == 0 and x_ % up == 0 and 0 <= y < height * up and 0 <= x_ < width * up:
                tap = 1.0 if filter is None else fir_gain * filter[taps - 1 - a, taps - 1 - b].item()
                value += tap * x[i, c, y // up, x_ // up].item()
        value *= 1.0 if factor is None else factor[i, c].item()
        if noise is not None:
            strength = 1.0 if noise_strength is None else noise_strength.item()
            value += strength * noise[i if len(noise) > 1 else 0, 0, row, column].item()
        if bias is not None:
            value += bias[i, c].item() if bias.ndim == 2 else bias[c].item()
        value *= gain * (0.2 if activation == "lrelu" and value < 0 else 1.0)
        value = value if clamp is None else min(max(value, -clamp), clamp)
        out[i, c, row, column] = value + (0.0 if add is None else add[i, c, row, column].item())
    return out


def size_after(fir, height, width):
    taps = len(fir["filter"]) if fir else 1
    up, down, padding = fir.get("up", 1), fir.get("down", 1), fir.get("padding", (0, 0))
    return tuple((s * up + sum(padding) - taps) // down + 1 for s in (height, width))


def problem(fir, n=2, channels=5, height=6, width=7, dtype=torch.float64, noise_rows=2, bias_rows=0, seed=0):
    """x and the tensors of all options, factors and the like in float32 at least."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    small = torch.promote_types(dtype, torch.float32)
    size = size_after(fir, height, width)
    return {
        "x": draw(n, channels, height, width).to(dtype),
        "factor": draw(n, channels).to(small),
        "noise": draw(noise_rows, 1, *size).to(small),
        "noise_strength": draw().to(small),
        "bias": draw(*([bias_rows] if bias_rows else []), channels).to(small),
        "add": draw(n, channels, *size).to(dtype),
    }


def doubled(arguments):
    return {name: v.double() if torch.is_tensor(v) else v for name, v in arguments.items()}


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("fir", FIR.values(), ids=FIR)
@pytest.mark.parametrize("end", END.values(), ids=END)
def test_equals_its_definition(end, fir, backend, poisoned_memory):
    for options in ({}, {"noise_rows": 1, "bias_rows": 2}):
        arguments = problem(fir, **options)
        for left_out in ([], ["factor", "add"], ["noise", "noise_strength"], ["bias", "noise_strength"]):
            given_ones = {name: value for name, value in arguments.items() if name not in left_out} | fir | end
            actual = fir_bias_act(**given_ones, backend=backend)
            torch.testing.assert_close(actual, by_definition(**given_ones), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", RUNNING)
@settings(max_examples=40)
@given(data=st.data())
def test_any_sizes_and_options(backend, data):
    sizes = st.integers(1, 9)
    height, width, channels = data.draw(sizes), data.draw(sizes), data.draw(st.integers(1, 19))
    fir = {}
    if data.draw(st.booleans()):
        taps = data.draw(st.integers(1, 8))
        padding = data.draw(st.tuples(st.integers(-2, 9), st.integers(-2, 9)))
        fir = {"filter": torch.rand(taps, taps), "up": data.draw(st.sampled_from([1, 2])), "padding": padding}
        fir["down"] = data.draw(st.sampled_from([1, 2]))
        if min(size_after(fir, height, width)) < 1:
            return
    rows = data.draw(st.integers(1, 3))
    noise_rows, bias_rows = data.draw(st.sampled_from([1, rows])), data.draw(st.sampled_from([0, rows]))
    arguments = problem(fir, rows, channels, height, width, torch.float32, noise_rows, bias_rows)
    present = data.draw(st.sets(st.sampled_from(["factor", "noise", "bias", "add"])))
    arguments = {name: v for name, v in arguments.items() if name in present or name == "x"} | fir
    arguments |= data.draw(st.sampled_from(list(END.values())))
    exact = fir_bias_act(**doubled(arguments), backend="reference")
    actual = fir_bias_act(**arguments, backend=backend)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fir", FIR.values(), ids=FIR)
@pytest.mark.parametrize("channels", [1, 3, 16, 37, 64])
def test_accuracy(channels, fir, dtype, backend, assert_accurate, poisoned_memory):
    arguments = problem(fir, 3, channels, 9, 11, dtype, noise_rows=3) | fir
    del arguments["add"]
    for end in END.values():
        exact = fir_bias_act(**doubled(arguments), **end, backend="reference")
        plain = fir_bias_act(**arguments, **end, backend="reference")
        actual = fir_bias_act(**arguments, **end, backend=backend)
        assert actual.is_contiguous(memory_format=torch.channels_last)
        assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("fir", FIR.values(), ids=FIR)
@pytest.mark.parametrize("end", END.values(), ids=END)
def test_derivatives(end, fir, backend):
    for rows in ({"noise_rows": 2, "bias_rows": 0}, {"noise_rows": 1, "bias_rows": 2}):
        arguments = problem(fir, 2, 2, 3, 4, **rows)
        if end:
            del arguments["add"]
        names = list(arguments)

        def run(*values, names=names):
            return fir_bias_act(**dict(zip(names, values, strict=True)), **fir, **end, backend=backend)

        inputs = [value.requires_grad_() for value in arguments.values()]
        assert gradcheck(run, inputs)
        assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fir", ["none", "blur", "up", "down"])
@pytest.mark.parametrize("channels", [3, 48])
def test_accuracy_of_derivatives(channels, fir, dtype, backend, assert_accurate):
    fir, end = FIR[fir], END["clamped"]
    arguments = problem(fir, 2, channels, 20, 17, dtype, noise_rows=2)
    del arguments["add"]

    def gradients(backend, cast=lambda v: v):
        # The noise moves every value away from the kinks, where rounding would decide on the derivative.
        inputs = {name: cast(v.detach()).requires_grad_() for name, v in arguments.items()}
        with torch.no_grad():
            probe = fir_bias_act(**inputs, **fir, **end, backend=backend)
        return torch.autograd.grad(
            fir_bias_act(**inputs, **fir, **end, backend=backend), list(inputs.values()), torch.ones_like(probe)
        )

    with torch.no_grad():
        v = fir_bias_act(**doubled(arguments), **fir, backend="reference")
        pre = 1.5 * torch.where(v > 0, v, 0.2 * v)
        near = (v.abs() < 0.05) | ((pre.abs() - 0.8).abs() < 0.05)
        # A pixel with a value near a kink gets so much noise that all of its values are clamped.
        strength = arguments["noise_strength"].item()
        arguments["noise"] += near.any(1, keepdim=True) * (60.0 / strength)
    exact = gradients("reference", torch.Tensor.double)
    plain, actual = gradients("reference"), gradients(backend)
    for a, p, e in zip(actual, plain, exact, strict=True):
        # Sums come in float32, but of values that were rounded to `dtype`.
        assert_accurate(a.to(dtype), p.to(dtype), e, slack=4.0)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("seed", [5, torch.tensor(2**40 + 3)])
def test_noise_is_drawn_from_the_stream_of_its_seed(seed, backend):
    x = torch.randn(3, 5, 6, 7)
    strength = torch.tensor(0.7, requires_grad=True)
    for fir in (FIR["none"], FIR["up"]):
        size = size_after(fir, 6, 7)
        noise = philox_normal((3, 1, *size), seed=int(seed))
        options = {"noise_strength": strength, "backend": backend, "activation": "lrelu"} | fir
        drawn, given_one = fir_bias_act(x, noise_seed=seed, **options), fir_bias_act(x, noise=noise, **options)
        torch.testing.assert_close(drawn, given_one, rtol=0, atol=2e-5)
        gradients = [torch.autograd.grad(y.square().sum(), strength)[0] for y in (drawn, given_one)]
        torch.testing.assert_close(*gradients)
        torch.testing.assert_close(
            fir_bias_act(x[:2], noise_seed=seed, **options), drawn[:2]
        )  # an image's noise does not depend on the number of images


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("fir", ["none", "up", "down"])
def test_any_layout_and_empty_batches(fir, backend):
    fir = FIR[fir]
    arguments = {name: v.float() for name, v in problem(fir, 3, 6, 5, 7, noise_rows=3).items()}
    expected = fir_bias_act(**arguments, **fir, backend=backend)
    views = {name: v.mT.contiguous().mT if v.ndim > 1 else v for name, v in arguments.items()}
    views["x"] = torch.full((9, 2, 6, 7, 5), torch.nan).permute(0, 2, 4, 3, 1)[::3, ..., 0].copy_(arguments["x"])
    for layout in (views, {n: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for n, v in views.items()}):
        before = {name: v.clone() for name, v in layout.items()}
        actual = fir_bias_act(**layout, **fir, backend=backend)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
        assert all(torch.equal(before[name], layout[name]) for name in before)
    empty = {name: v[:0] if v.ndim > 1 else v for name, v in arguments.items()}
    del empty["noise"]
    empty["x"].requires_grad_()
    result = fir_bias_act(**empty, **fir, backend=backend)
    assert result.shape == (0, 6, *size_after(fir, 5, 7))
    assert torch.autograd.grad(result.sum(), empty["x"])[0].shape == (0, 6, 5, 7)


@pytest.mark.parametrize("backend", RUNNING)
def test_nan_and_infinity_stay_where_they_are(backend):
    x = torch.zeros(2, 4, 5, 5)
    x[0, 1, 2, 3], x[1, 3, 0, 0] = torch.nan, torch.inf
    y = fir_bias_act(x, activation="lrelu", bias=torch.ones(4), backend=backend)
    assert y[0, 1, 2, 3].isnan() and y[1, 3, 0, 0] == torch.inf
    assert (y.nan_to_num(1.0, 1.0) == 1.0).all()
    assert fir_bias_act(x, clamp=2.0, backend=backend).isnan().sum() == 1


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_upsampling_and_downsampling_keep_a_constant_image(channels, backend):
    from spigan.ops import use_backend

    x = torch.full((2, channels, 12, 12), 0.7)
    with use_backend(backend):
        up, down = upsample2d(x, fir_filter()), downsample2d(x, fir_filter())
        assert up.shape == (2, channels, 24, 24) and down.shape == (2, channels, 6, 6)
        torch.testing.assert_close(up[..., 2:-2, 2:-2], torch.full((2, channels, 20, 20), 0.7))
        torch.testing.assert_close(down[..., 1:-1, 1:-1], torch.full((2, channels, 4, 4), 0.7))
        torch.testing.assert_close(upsample2d(x, fir_filter(), add=up), 2 * up)


ERRORS = [
    ({"x": None}, TypeError, r"x must be a torch.Tensor \[N, C, H, W\], got NoneType"),
    ({"x": torch.zeros(2, 5, 6).long()}, TypeError, "x must have dtype"),
    ({"up": 2}, ValueError, "up=2, down=1 and padding=.* need a filter"),
    ({"filter": torch.ones(2, 2), "up": 3}, ValueError, "up and down must be 1 or 2, got up=3 and down=1"),
    ({"filter": torch.ones(2, 3)}, ValueError, r"filter must be square and not empty, got \[2, 3\]"),
    ({"filter": torch.ones(8, 8)}, ValueError, "x of 6x7 is too small for a filter of 8 taps"),
    ({"factor": torch.ones(2, 4)}, ValueError, r"factor must have shape \[N, C\] = \[2, 5\], got \[2, 4\]"),
    ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \[C\] = \[5\], got \[4\]"),
    ({"bias": torch.ones(1, 5)}, ValueError, r"bias must have shape \[N, C\] = \[2, 5\], got \[1, 5\]"),
    ({"add": torch.ones(2, 5, 6, 6)}, ValueError, r"add must have shape .* = \[2, 5, 6, 7\], got \[2, 5, 6, 6\]"),
    ({"noise": torch.ones(3, 1, 6, 7)}, ValueError, r"noise must have shape .* = \[2, 1, 6, 7\], got \[3, 1, 6, 7\]"),
    ({"noise": torch.ones(2, 1, 6, 7), "noise_seed": 1}, ValueError, "noise and noise_seed exclude each other"),
    ({"noise_seed": torch.ones(2).long()}, ValueError, r"noise_seed must have shape \[\]"),
    ({"noise_seed": -1}, ValueError, "noise_seed must be in"),
    ({"noise_strength": 1.0}, TypeError, r"noise_strength must be a torch.Tensor \[\], got float"),
    ({"activation": "relu"}, ValueError, 'activation must be "linear" or "lrelu"'),
    ({"clamp": 0.0}, ValueError, "clamp must be positive or None, got 0.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[" ".join(change) for change, _, _ in ERRORS])
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        fir_bias_act(**{"x": torch.zeros(2, 5, 6, 7)} | change)


def test_what_kernels_do_not_take():
    x = torch.randn(2, 3, 12, 12, requires_grad=True)
    with pytest.raises(ValueError, match='add has gradients only with activation="linear" and clamp=None'):
        fir_bias_act(x, add=torch.zeros(2, 3, 12, 12), clamp=1.0)
    for options, cause in (
        ({"filter": torch.ones(9, 9)}, "filters of at most 8 taps, got 9"),
        ({"filter": torch.ones(2, 2, requires_grad=True)}, "no derivative with respect to the filter"),
        ({"gain": -1.0}, "derivatives only for a positive gain, got -1.0"),
    ):
        torch.testing.assert_close(fir_bias_act(x, **options), fir_bias_act(x, **options, backend="reference"))
        for backend in KERNELS:
            with pytest.raises(BackendUnavailable, match=cause):
                fir_bias_act(x, **options, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("fir", ["none", "up"])
def test_operators_are_well_behaved(fir, backend):
    fir = FIR[fir]
    a = {name: v.float().requires_grad_() for name, v in problem(fir, 2, 4, 5, 6).items()}
    size = list(size_after(fir, 5, 6))
    resampling = (size, fir.get("up", 1), 1, fir.get("padding", (0,))[0], True, 1.0)
    tensors = (a["x"], fir.get("filter"), a["factor"], a["noise"], a["noise_strength"], None, a["bias"], a["add"])
    operator = torch.ops.spigan.fir_bias_act.default
    torch.library.opcheck(operator, (*tensors, *resampling, "linear", 1.4, None, backend))
    torch.library.opcheck(operator, (*tensors[:7], None, *resampling, "lrelu", 1.4, 0.5, backend))
    grad = torch.randn(2, 4, 5, 6)
    for wanted in itertools.product([False, True], repeat=4):
        arguments = (grad, grad, grad, torch.randn(2, 4), *wanted, "lrelu", 1.4, 0.5, backend)
        torch.library.opcheck(torch.ops.spigan.bias_act_backward.default, arguments)


@pytest.mark.parametrize("backend", RUNNING)
def test_stays_whole_under_compile_and_export(backend):
    arguments = {name: v.float() for name, v in problem(FIR["up"], 2, 4, 5, 6).items()}
    del arguments["add"]

    class End(torch.nn.Module):
        def forward(self, x, factor, noise, noise_strength, bias):
            options = {"noise": noise, "noise_strength": noise_strength, "bias": bias, **END["clamped"]}
            return 2 * fir_bias_act(x, factor=factor, **options, **FIR["up"], backend=backend)

    def gradients(function):
        leaves = {name: v.clone().requires_grad_() for name, v in arguments.items()}
        y = function(**leaves)
        return y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))

    compiled = torch.compile(End(), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(gradients(compiled), gradients(End()), strict=True):
        torch.testing.assert_close(actual, expected)
    exported = torch.export.export(End(), (), kwargs=arguments).module()
    torch.testing.assert_close(exported(**arguments), End()(**arguments))


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_does_not_reach_the_kernel(backend):
    x, bias = torch.randn(2, 4, 5, 6), torch.randn(4, requires_grad=True)
    expected = fir_bias_act(x, bias=bias, activation="lrelu", backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fir_bias_act(x, bias=bias, activation="lrelu", backend=backend)
        torch.autograd.backward(actual.sum())
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("create_graph", [False, True])  # True: by PyTorch
def test_clamped_values_have_no_gradient(create_graph, dtype, backend):
    # 0.9 is rounded down in bfloat16 and float16: a clamped result is then below the bound.
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0]).view(1, 1, 2, 2).to(dtype).requires_grad_()
    y = fir_bias_act(x, clamp=0.9, backend=backend)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    assert grad.flatten().tolist() == [0.0, 1.0, 1.0, 0.0]
