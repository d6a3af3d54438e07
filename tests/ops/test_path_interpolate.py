"""path_interpolate against eq. 7 in numpy float64; its noise against philox_normal."""

from __future__ import annotations

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
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
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


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("k", TIMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *FLOATS])
def test_values(x0_dtype, dtype, k, backend, assert_accurate, poisoned_memory):
    x0, times = images(3, 2, 5, 7, dtype=x0_dtype), TIMES[k]
    noise = philox_normal(x0.shape, seed=9, offset=4, backend="reference")
    results = path_interpolate(x0, times, seed=9, offset=4, dtype=dtype, backend=backend)
    assert results[0].shape == x0.shape and results[1].shape == (k, *x0.shape)
    for actual, plain, exact in zip(results, eager(x0, noise, times, dtype), eq7(x0, noise, times), strict=True):
        # 1e-5: the noise of two backends may differ by so much.
        slack = 2.0 if dtype in (torch.bfloat16, torch.float16) else 2.0 + 1e-5 / torch.finfo(dtype).eps
        assert_accurate(actual, plain, exact, slack)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *FLOATS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_values_with_given_noise(x0_dtype, dtype, backend, assert_accurate):
    x0, times = images(2, 3, 4, 5, dtype=x0_dtype), [0.123, 0.7, 1.0]
    for noise_dtype in FLOATS:
        noise = torch.randn(x0.shape).to(noise_dtype)
        results = path_interpolate(x0, times, noise=noise, dtype=dtype, backend=backend)
        for actual, plain, exact in zip(results, eager(x0, noise, times, dtype), eq7(x0, noise, times), strict=True):
            assert_accurate(actual, plain, exact)


@pytest.mark.parametrize("backend", RUNNING)
@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(0, 5)] * 4),
    times=st.sets(st.floats(1e-6, 1), min_size=1, max_size=8).map(sorted),
    x0_dtype=st.sampled_from([torch.uint8, torch.float32, torch.float64]),
    offset=st.integers(0, 2**40),
)
def test_values_at_any_shape_and_times(backend, shape, times, x0_dtype, offset):
    x0 = images(*shape, dtype=x0_dtype)
    noise = philox_normal(shape, seed=3, offset=offset)
    results = path_interpolate(x0, times, seed=3, offset=offset, backend=backend)
    for actual, exact in zip(results, eq7(x0, noise, times), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1.2e-5)


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("x0_dtype", [torch.uint8, *FLOATS])
def test_the_path_ends_in_the_clean_image_exactly(x0_dtype, dtype, backend):
    x0 = images(2, 3, 8, 8, dtype=x0_dtype)
    if x0_dtype == torch.uint8:
        x0.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
        clean = x0.float() / 127.5 - 1
    else:
        clean = x0.double() if x0_dtype == torch.float64 else x0.float()
    _, i = path_interpolate(x0, [0.5, 1.0], seed=0, dtype=dtype, backend=backend)
    assert torch.equal(i[-1], clean.to(dtype))
    assert not torch.equal(i[0], i[1])


@pytest.mark.parametrize("backend", RUNNING)
def test_the_path_is_straight(backend):
    x0 = images(2, 3, 4, 4, dtype=torch.float64)
    x_T, i = path_interpolate(x0, [0.25, 0.5, 0.75, 1.0], seed=1, dtype=torch.float64, backend=backend)
    points = torch.cat((x_T[None], i))
    torch.testing.assert_close(points.diff(n=2, dim=0), torch.zeros_like(points[:3]), rtol=0, atol=1e-14)


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
    expected = path_interpolate(x0, [0.3, 1.0], noise=noise.contiguous(), backend=backend)
    actual = path_interpolate(x0, [0.3, 1.0], noise=noise, backend=backend)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("backend", RUNNING)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(shape, backend):
    x_T, i = path_interpolate(images(*shape, dtype=torch.uint8), [0.5, 1.0], seed=0, backend=backend)
    assert x_T.shape == shape and i.shape == (2, *shape)


@pytest.mark.parametrize("backend", RUNNING)
def test_statistics_of_the_noisy_end(backend):
    x0 = images(64, 3, 24, 24, dtype=torch.uint8)
    a, s = VPSDE().marginal(1.0)
    x_T, _ = path_interpolate(x0, [1.0], seed=5, dtype=torch.float64, backend=backend)
    clean = x0.double() / 127.5 - 1
    residual = ((x_T - a * clean) / s).flatten()
    n = residual.numel()
    assert scipy.stats.kstest(residual.numpy(), scipy.stats.norm.cdf).pvalue > 1e-3
    assert abs(torch.corrcoef(torch.stack((residual, clean.flatten())))[0, 1].item()) < 5 / n**0.5
    # Another process, in which the image is still seen.
    x_T, _ = path_interpolate(x0, [1.0], seed=5, sde=VPSDE(0.1, 1.0), dtype=torch.float64, backend=backend)
    slope = (x_T * clean).sum() / clean.square().sum()
    assert slope.item() == pytest.approx(VPSDE(0.1, 1.0).marginal(1.0)[0], abs=5 / (n / 3) ** 0.5)
    assert VPSDE(0.1, 1.0).marginal(1.0)[0] > 0.5


@pytest.mark.parametrize("backend", RUNNING)
def test_another_process(backend):
    x0 = images(2, 3, 4, 4, dtype=torch.float64)
    noise = torch.randn_like(x0)
    results = path_interpolate(x0, [0.4, 1.0], noise=noise, sde=VPSDE(0.5, 3.0), dtype=torch.float64, backend=backend)
    for actual, exact in zip(results, eq7(x0, noise, [0.4, 1.0], 0.5, 3.0), strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", RUNNING)
def test_derivatives(backend):
    x0 = images(2, 1, 2, 3, dtype=torch.float64).requires_grad_()
    noise = torch.randn(2, 1, 2, 3, dtype=torch.float64, requires_grad=True)

    def path(x0, noise):
        return path_interpolate(x0, [0.3, 1.0], noise=noise, dtype=torch.float64, backend=backend)

    assert gradcheck(path, (x0, noise))
    assert gradgradcheck(path, (x0, noise))

    def drawn(x0):
        return path_interpolate(x0, [0.3, 1.0], seed=4, dtype=torch.float64, backend=backend)

    assert gradcheck(drawn, (x0,))
    x_T, i = path_interpolate(images(2, 1, 2, 3, dtype=torch.uint8), [1.0], seed=4, backend=backend)
    assert not x_T.requires_grad and not i.requires_grad


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
        ({"backend": "fast"}, ValueError, "backend= names the backend 'fast'"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    with pytest.raises(error, match=message):
        path_interpolate(**{"x0": torch.zeros(2, 3, 4, 4), "times": [0.5, 1.0], "seed": 0, **change})


@pytest.mark.parametrize("backend", RUNNING)
def test_stays_whole_under_compile(backend):
    x0 = images(2, 3, 4, 4, dtype=torch.uint8)

    def path(x0):
        return path_interpolate(x0, [0.3, 1.0], seed=7, offset=5, backend=backend)

    compiled = torch.compile(path, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(x0), path(x0), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", RUNNING)
def test_exports(backend):
    class Path(torch.nn.Module):
        def forward(self, x0):
            return path_interpolate(x0, [0.3, 1.0], seed=7, backend=backend)

    batch = torch.export.Dim("batch", min=1, max=100)
    program = torch.export.export(Path(), (images(2, 3, 4, 4),), dynamic_shapes={"x0": {0: batch}})
    x0 = images(5, 3, 4, 4, seed=1)
    for actual, expected in zip(program.module()(x0), Path()(x0), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
