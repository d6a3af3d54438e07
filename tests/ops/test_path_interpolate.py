"""path_interpolate against eq. 7 in numpy float64; its noise against philox_normal."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from spigan import VPSDE
from spigan.ops import BACKENDS, path_interpolate, philox_normal, use_backend
from spigan.ops.backends import why_unavailable

RUNNING = [b for b in BACKENDS if why_unavailable("path_interpolate", b, torch.device("cpu")) is None]
KERNELS = [b for b in RUNNING if b != "reference"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (backend, dtype of x0, dtype of the results): float64 is for the reference alone.
CASES = [
    (backend, x0_dtype, dtype)
    for backend in RUNNING
    for x0_dtype in (torch.uint8, *FLOATS)
    for dtype in FLOATS
    if backend == "reference" or torch.float64 not in (x0_dtype, dtype)
]
over_cases = pytest.mark.parametrize(("backend", "x0_dtype", "dtype"), CASES)
TIMES = {
    1: [0.4],
    2: [0.123, 1.0],
    3: [0.25, 0.5, 1.0],
    5: [1e-6, 0.2, 0.4, 0.999, 1.0],
    8: [k / 8 for k in range(1, 9)],
}


def images(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def mirror(x0, flips):
    """x0 with each image mirrored where `flips` says so."""
    return torch.stack([image.flip(2) if flip else image for image, flip in zip(x0, flips, strict=True)])


def eq7(x0, noise, times, beta_min=0.1, beta_max=20.0):
    """x_T and i in numpy float64."""
    clean = x0.double().numpy() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.double().numpy()
    a = math.exp(-(beta_max - beta_min) / 4 - beta_min / 2)
    x_T = a * clean + math.sqrt(1 - a * a) * noise.double().numpy()
    t = np.array(times).reshape(-1, 1, 1, 1, 1)
    return torch.from_numpy(x_T), torch.from_numpy(t * clean + (1 - t) * x_T)


def eager(x0, noise, times, dtype):
    """The same in plain PyTorch, float32 (float64 for float64 images) until the last cast."""
    compute = torch.float64 if x0.dtype == torch.float64 else torch.float32
    clean = x0.to(compute) / 127.5 - 1 if x0.dtype == torch.uint8 else x0.to(compute)
    a, s = VPSDE().marginal(1.0)
    x_T = a * clean + s * noise.to(compute)
    t = torch.tensor(times, dtype=compute).view(-1, 1, 1, 1, 1)
    return x_T.to(dtype), (t * clean + (1 - t) * x_T).to(dtype)


@over_cases
@pytest.mark.parametrize("k", TIMES)
@pytest.mark.parametrize("flipped", [False, True])
def test_values(backend, x0_dtype, dtype, k, flipped, assert_accurate, poisoned_memory):
    x0, times = images(3, 2, 5, 7, dtype=x0_dtype), TIMES[k]
    flips = torch.tensor([True, False, True]) if flipped else None
    noise = philox_normal(x0.shape, seed=9, offset=4, backend="reference")
    results = path_interpolate(x0, times, seed=9, offset=4, flips=flips, dtype=dtype, backend=backend)
    assert results[0].shape == x0.shape and results[1].shape == (k, *x0.shape)
    clean = mirror(x0, flips) if flipped else x0
    for actual, plain, exact in zip(results, eager(clean, noise, times, dtype), eq7(clean, noise, times), strict=True):
        # 1e-5: the noise of two backends may differ by so much.
        slack = 2.0 if dtype in (torch.bfloat16, torch.float16) else 2.0 + 1e-5 / torch.finfo(dtype).eps
        assert_accurate(actual, plain, exact, slack)


@over_cases
def test_values_with_given_noise(backend, x0_dtype, dtype, assert_accurate, poisoned_memory):
    x0, times, flips = images(3, 3, 4, 5, dtype=x0_dtype), [0.123, 0.7, 1.0], torch.tensor([False, True, True])
    for noise_dtype in FLOATS:
        noise = torch.randn(x0.shape).to(noise_dtype)
        for mask, clean in ((None, x0), (flips, mirror(x0, flips))):
            results = path_interpolate(x0, times, noise=noise, flips=mask, dtype=dtype, backend=backend)
            plain, exact = eager(clean, noise, times, dtype), eq7(clean, noise, times)
            for arguments in zip(results, plain, exact, strict=True):
                assert_accurate(*arguments)


@pytest.mark.parametrize("backend", RUNNING)
@settings(max_examples=60)
@given(data=st.data())
def test_values_at_any_shape_and_times(backend, data):
    shape = data.draw(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 5), st.integers(0, 33)), "shape")
    times = data.draw(st.sets(st.floats(1e-6, 1), min_size=1, max_size=8).map(sorted), "times")
    x0_dtype = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]), "x0 dtype")
    offset = data.draw(st.one_of(st.integers(0, 7), st.integers(2**32 - 9, 2**32 + 9), st.integers(0, 2**62)), "offset")
    flips = data.draw(st.none() | st.lists(st.booleans(), min_size=shape[0], max_size=shape[0]), "flips")
    x0 = images(*shape, dtype=x0_dtype)
    noise = philox_normal(shape, seed=3, offset=offset, backend="reference")
    flips = None if flips is None else torch.tensor(flips, dtype=torch.bool)
    results = path_interpolate(x0, times, seed=3, offset=offset, flips=flips, backend=backend)
    clean = x0 if flips is None or x0.shape[0] == 0 else mirror(x0, flips)
    for actual, exact in zip(results, eq7(clean, noise, times), strict=True):
        assert actual.shape == exact.shape
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1.2e-5)


@over_cases
def test_the_path_ends_in_the_clean_image_exactly(backend, x0_dtype, dtype):
    x0 = images(2, 3, 8, 8, dtype=x0_dtype)
    if x0_dtype == torch.uint8:
        x0.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
        clean = x0.float() / 127.5 - 1
    else:
        clean = x0.double() if x0_dtype == torch.float64 else x0.float()
    _, i = path_interpolate(x0, [0.5, 1.0], seed=0, dtype=dtype, backend=backend)
    if x0_dtype == torch.uint8 and backend != "reference":
        # A kernel computes (2 v - 255) / 255, the reference v / 127.5 - 1, which rounds once more near 0.
        clean = (x0.double() / 127.5 - 1).float()
        one_unit = torch.finfo(dtype).eps * clean.abs() + 2.0**-33
        assert ((i[-1].double() - clean.double()).abs() <= one_unit).all()
    else:
        assert torch.equal(i[-1], clean.to(dtype))
    assert not torch.equal(i[0], i[1])


@pytest.mark.parametrize("backend", RUNNING)
def test_the_path_is_straight(backend):
    x0 = images(2, 3, 4, 4)
    x_T, i = path_interpolate(x0, [0.25, 0.5, 0.75, 1.0], seed=1, backend=backend)
    points = torch.cat((x_T[None], i))
    torch.testing.assert_close(points.diff(n=2, dim=0), torch.zeros_like(points[:3]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", RUNNING)
def test_noise_is_that_of_philox_normal(backend):
    x0 = images(3, 3, 5, 4, dtype=torch.uint8)
    noise = philox_normal(x0.shape, seed=77, offset=123)
    drawn = path_interpolate(x0, [0.3, 1.0], seed=77, offset=123, backend=backend)
    given_noise = path_interpolate(x0, [0.3, 1.0], noise=noise, backend=backend)
    for a, b in zip(drawn, given_noise, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    other = path_interpolate(x0, [0.3, 1.0], seed=78, offset=123, backend=backend)
    assert (other[0] - drawn[0]).abs().max() > 0.5
    # The second part of a batch has the noise of its place in the whole.
    part = path_interpolate(x0[1:], [0.3, 1.0], seed=77, offset=123 + x0[0].numel(), backend=backend)
    torch.testing.assert_close(part[0], drawn[0][1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(part[1], drawn[1][:, 1:], rtol=0, atol=1e-5)


def test_drawn_and_given_noise_have_the_same_bits_on_the_reference():
    x0 = images(3, 3, 5, 4)
    with use_backend("reference"):
        drawn = path_interpolate(x0, [0.3, 1.0], seed=7, offset=2)
        given_noise = path_interpolate(x0, [0.3, 1.0], noise=philox_normal(x0.shape, seed=7, offset=2))
    assert torch.equal(drawn[0], given_noise[0]) and torch.equal(drawn[1], given_noise[1])


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, torch.float32])
def test_images_need_not_be_contiguous(x0_dtype, backend):
    x0 = images(3, 4, 5, 6, dtype=x0_dtype)
    expected = path_interpolate(x0, [0.3, 1.0], seed=7, backend=backend)
    wide = torch.zeros(3, 4, 5, 12, dtype=x0_dtype)[..., 1::2].copy_(x0)
    views = [x0.contiguous(memory_format=torch.channels_last), wide, x0.transpose(0, 1).contiguous().transpose(0, 1)]
    for view in views:
        assert not view.is_contiguous()
        actual = path_interpolate(view, [0.3, 1.0], seed=7, backend=backend)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    noise = torch.randn(6, 5, 4, 3).permute(3, 2, 1, 0)
    flips = torch.tensor([True, False, False, False, True])[::2]
    expected = path_interpolate(x0, [0.3, 1.0], noise=noise.contiguous(), flips=flips.contiguous(), backend=backend)
    actual = path_interpolate(views[0], [0.3, 1.0], noise=noise, flips=flips, backend=backend)
    assert backend == "reference" or (actual[0].is_contiguous() and actual[1].is_contiguous())
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(shape, backend):
    flips = torch.ones(shape[0], dtype=torch.bool)
    for noise, mask in itertools.product((None, torch.zeros(shape)), (None, flips)):
        x0 = images(*shape).requires_grad_()
        x_T, i = path_interpolate(x0, [0.5, 1.0], seed=0, noise=noise, flips=mask, backend=backend)
        assert x_T.shape == shape and i.shape == (2, *shape)
        assert torch.autograd.grad(x_T.sum() + i.sum(), x0)[0].shape == shape


@pytest.mark.parametrize("backend", RUNNING)
def test_statistics_of_the_noisy_end(backend):
    x0 = images(64, 3, 24, 24, dtype=torch.uint8)
    a, s = VPSDE().marginal(1.0)
    x_T, _ = path_interpolate(x0, [1.0], seed=5, backend=backend)
    clean = x0.double() / 127.5 - 1
    residual = ((x_T - a * clean) / s).flatten()
    n = residual.numel()
    assert scipy.stats.kstest(residual.numpy(), scipy.stats.norm.cdf).pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack((residual, clean.flatten())))[0, 1].item()) < 5 / n**0.5
    # Another process, in which the image is still seen.
    x_T, _ = path_interpolate(x0, [1.0], seed=5, sde=VPSDE(0.1, 1.0), backend=backend)
    slope = (x_T * clean).sum() / clean.square().sum()
    assert slope.item() == pytest.approx(VPSDE(0.1, 1.0).marginal(1.0)[0], abs=5 / (n / 3) ** 0.5)
    assert VPSDE(0.1, 1.0).marginal(1.0)[0] > 0.5


@pytest.mark.parametrize("backend", RUNNING)
def test_another_process(backend):
    x0 = images(2, 3, 4, 4)
    noise = torch.randn_like(x0)
    results = path_interpolate(x0, [0.4, 1.0], noise=noise, sde=VPSDE(0.5, 3.0), backend=backend)
    for actual, exact in zip(results, eq7(x0, noise, [0.4, 1.0], 0.5, 3.0), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_threads_and_neighbours_do_not_change_a_bit(backend, set_threads):
    x0 = images(7, 3, 61, 67, dtype=torch.uint8)  # work for 5 threads
    flips = torch.arange(7) % 2 == 0

    def path(x0, offset, flips, threads):
        set_threads(threads)
        return path_interpolate(x0, [0.3, 1.0], seed=7, offset=offset, flips=flips, backend=backend)

    expected = path(x0, 5, flips, 1)
    for threads in (2, 5):
        assert all(map(torch.equal, path(x0, 5, flips, threads), expected))
    x_T, i = path(x0[3:], 5 + 3 * x0[0].numel(), flips[3:], 1)
    assert torch.equal(x_T, expected[0][3:]) and torch.equal(i, expected[1][:, 3:])


def test_derivatives():
    x0 = images(2, 1, 2, 3, dtype=torch.float64).requires_grad_()
    noise = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    for flips in (None, torch.tensor([True, False])):

        def path(x0, noise, flips=flips):
            return path_interpolate(x0, [0.3, 1.0], noise=noise, flips=flips, dtype=torch.float64)

        assert gradcheck(path, (x0, noise))
        assert gradgradcheck(path, (x0, noise))

        def drawn(x0, flips=flips):
            return path_interpolate(x0, [0.3, 1.0], seed=4, flips=flips, dtype=torch.float64)

        assert gradcheck(drawn, (x0,))


def gradients(x0, noise, flips, dtype, used, backend):
    """Gradients in a float x0 and in the noise, where it is given, of a function of x_T, of i or of both."""
    leaves = [x.clone().requires_grad_() for x in (x0, noise) if x is not None and x.is_floating_point()]
    x0_leaf = leaves[0] if x0.is_floating_point() else x0
    noise_leaf = None if noise is None else leaves[-1]
    x_T, i = path_interpolate(x0_leaf, [0.3, 0.9], seed=4, noise=noise_leaf, flips=flips, dtype=dtype, backend=backend)
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (value.double() * torch.randn(value.shape, generator=generator, dtype=torch.float64)).sum()
        for value in {"x_T": (x_T,), "i": (i,), "both": (x_T, i), "i(t_1)": (i[0],)}[used]
    )
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("used", ["x_T", "i", "both", "i(t_1)"])
@pytest.mark.parametrize("flips", [None, torch.tensor([True, False, True])])
def test_gradients_are_those_of_the_reference(backend, used, flips):
    float32, bfloat16, uint8 = torch.float32, torch.bfloat16, torch.uint8
    for x0_dtype, noise_dtype, dtype in (
        (float32, float32, float32),
        (float32, None, float32),
        (bfloat16, float32, float32),
        (float32, bfloat16, bfloat16),
        (uint8, float32, torch.float16),
    ):
        x0 = images(3, 2, 4, 5, dtype=x0_dtype)
        noise = None if noise_dtype is None else torch.randn(x0.shape).to(noise_dtype)
        actual = gradients(x0, noise, flips, dtype, used, backend)
        expected = gradients(x0, noise, flips, dtype, used, "reference")
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == e.dtype and e.abs().max() > 1e-3
            # Only the order of sums differs; a half type rounds the gradients, once.
            eps = max(torch.finfo(dtype).eps, torch.finfo(a.dtype).eps)
            torch.testing.assert_close(a, e, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("backend", KERNELS)
def test_only_what_needs_a_gradient_gets_one(backend):
    noise = torch.randn(2, 1, 2, 3, requires_grad=True)
    x_T, i = path_interpolate(images(2, 1, 2, 3, dtype=torch.uint8), [1.0], seed=4, backend=backend)
    assert not x_T.requires_grad and not i.requires_grad
    x_T, i = path_interpolate(images(2, 1, 2, 3, dtype=torch.uint8), [0.5], noise=noise, backend=backend)
    x_T.sum().backward()
    torch.testing.assert_close(noise.grad, torch.full_like(noise, VPSDE().marginal(1.0)[1]), rtol=1e-6, atol=0)
    with torch.no_grad():
        assert not path_interpolate(images(2, 1, 2, 3), [1.0], noise=noise, backend=backend)[0].requires_grad


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives(backend):
    # Of a function that is quadratic in the path: the kernel's own gradient must carry a graph.
    x0, noise = images(2, 1, 2, 3).requires_grad_(), torch.randn(2, 1, 2, 3, requires_grad=True)
    flips, found = torch.tensor([True, False]), []
    for name in (backend, "reference"):
        x_T, i = path_interpolate(x0, [0.3, 0.8], noise=noise, flips=flips, backend=name)
        first = torch.autograd.grad((x_T.pow(3).sum() + i.pow(3).sum()), (x0, noise), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), (x0, noise)))
    for a, e in zip(*found, strict=True):
        assert e.abs().max() > 0.1
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": [[0]]}, TypeError, r"x0 must be a torch.Tensor \[N, C, H, W\], got list"),
        ({"x0": torch.zeros(3, 4, 4)}, ValueError, r"x0 must have shape \[N, C, H, W\], got \[3, 4, 4\]"),
        (
            {"x0": torch.zeros(1, 3, 4, 4, dtype=torch.int32)},
            TypeError,
            "x0 must have dtype uint8, float32, .*, got int32",
        ),
        ({"times": 0.5}, TypeError, "times must be a sequence"),
        ({"times": torch.tensor(0.5)}, TypeError, "times must be a sequence"),
        ({"times": ()}, ValueError, "times must hold at least one time"),
        ({"times": [0.0, 1.0]}, ValueError, r"times must increase strictly within \(0, 1\]"),
        ({"times": [1.0, 0.5]}, ValueError, "times must increase strictly"),
        ({"seed": None}, ValueError, "path_interpolate needs a seed to draw the noise, or the noise itself"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got float"),
        ({"offset": -1}, ValueError, "offset must be in"),
        ({"dtype": torch.uint8}, TypeError, "dtype must be float32, float64, bfloat16, float16, got torch.uint8"),
        (
            {"noise": torch.zeros(2, 3, 4, 5)},
            ValueError,
            r"noise must have shape .* = \[2, 3, 4, 4\], got \[2, 3, 4, 5\]",
        ),
        ({"noise": torch.zeros(1, 3, 4, 4)}, ValueError, "noise must have shape"),
        ({"noise": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, "noise must have dtype float32"),
        (
            {"noise": torch.zeros(2, 3, 4, 4, device="meta")},
            ValueError,
            "noise must be on cpu like the other arguments",
        ),
        ({"flips": [True, False]}, TypeError, r"flips must be a torch.Tensor \[N\], got list"),
        ({"flips": torch.ones(2)}, TypeError, "flips must have dtype bool, got float32"),
        ({"flips": torch.ones(2, dtype=torch.uint8)}, TypeError, "flips must have dtype bool, got uint8"),
        (
            {"flips": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"flips must have shape \[N\] = \[2\], got \[3\]",
        ),
        (
            {"flips": torch.ones(2, 1, dtype=torch.bool)},
            ValueError,
            r"flips must have shape \[N\] = \[2\], got \[2, 1\]",
        ),
        (
            {"flips": torch.ones(2, dtype=torch.bool, device="meta")},
            ValueError,
            "flips must be on cpu like the other arguments, got meta",
        ),
        ({"sde": (0.1, 20.0)}, TypeError, "sde must be a spigan.VPSDE, got tuple"),
        ({"sde": None}, TypeError, "sde must be a spigan.VPSDE, got NoneType"),
        ({"backend": "fast"}, ValueError, "backend= names the backend 'fast'"),
    ],
)
@pytest.mark.parametrize("backend", RUNNING)
def test_errors_name_the_argument(change, error, message, backend):
    arguments = {"x0": torch.zeros(2, 3, 4, 4), "times": [0.5, 1.0], "seed": 0, "backend": backend}
    with pytest.raises(error, match=message):
        path_interpolate(**{**arguments, **change})


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("x0", "noise", "flips", "times", "dtype"),
    [
        (images(2, 3, 4, 5, dtype=torch.uint8), None, None, [0.3, 1.0], torch.float32),
        (images(2, 3, 4, 5), None, torch.tensor([True, False]), [1.0], torch.bfloat16),
        (images(2, 3, 4, 5).requires_grad_(), None, torch.tensor([True, False]), [0.3, 0.4, 1.0], torch.float32),
        (
            images(2, 1, 3, 3, dtype=torch.float16).requires_grad_(),
            torch.ones(2, 1, 3, 3, requires_grad=True),
            None,
            [0.3, 0.4],
            torch.float16,
        ),
        (images(2, 1, 3, 3, dtype=torch.uint8), torch.ones(2, 1, 3, 3, requires_grad=True), None, [0.3], torch.float32),
        (images(0, 3, 4, 5).requires_grad_(), None, torch.ones(0, dtype=torch.bool), [0.3, 1.0], torch.float32),
    ],
)
def test_opcheck(backend, x0, noise, flips, times, dtype):
    arguments = (x0, noise, flips, times, 0.3, 0.9, 7, 2**33 + 1, dtype, backend)
    torch.library.opcheck(torch.ops.spigan.path_interpolate, arguments)


@pytest.mark.parametrize("backend", RUNNING)
def test_stays_whole_under_compile(backend):
    def path(x0, flips):
        return path_interpolate(x0, [0.3, 1.0], seed=7, offset=5, flips=flips, backend=backend)

    compiled = torch.compile(path, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (2, 5, 3):
        x0, flips = images(n, 3, 4, 4).requires_grad_(), torch.arange(n) % 2 == 0
        actual, expected = compiled(x0, flips), path(x0, flips)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=2e-6)
        weights = [torch.randn_like(e) for e in expected]
        found = [
            torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, results, strict=True)), x0)[0]
            for results in (actual, expected)
        ]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", RUNNING)
def test_exports(backend):
    class Path(torch.nn.Module):
        def forward(self, x0, flips):
            return path_interpolate(x0, [0.3, 1.0], seed=7, flips=flips, backend=backend)

    batch = torch.export.Dim("batch", min=1, max=100)
    example = (images(2, 3, 4, 4), torch.tensor([True, False]))
    program = torch.export.export(Path(), example, dynamic_shapes={"x0": {0: batch}, "flips": {0: batch}})
    for n in (1, 5):
        arguments = (images(n, 3, 4, 4, seed=1), torch.arange(n) % 2 == 0)
        for actual, expected in zip(program.module()(*arguments), Path()(*arguments), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    uses_kernel = any("spigan.path_interpolate" in str(node.target) for node in program.graph.nodes)
    assert uses_kernel == (backend in KERNELS)
