"""What surrounds a call of a kernel: autocast, a default dtype, inputs that depend on each other, transforms."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp

from spigan.ops import modulated_conv2d, path_interpolate, philox_normal, rk4_mlp


def ode(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=dtype) / 4 for s in ((3, 8), (2, 8, 8), (2, 8), (2, 8))]


def layer(channels_out=8, kernel=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in ((2, 8, 8, 8), (channels_out, 8, kernel, kernel), (2, 8))]


@pytest.mark.parametrize(("channels_out", "kernel", "up"), [(8, 3, 1), (8, 3, 2), (3, 1, 1)])
def test_autocast_does_not_reach_into_a_layer(channels_out, kernel, up):
    inputs = layer(channels_out, kernel)
    expected = modulated_conv2d(*inputs, up=up, backend="cpp")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modulated_conv2d(*inputs, up=up, backend="cpp"), expected)


def test_autocast_does_not_reach_into_a_backward_pass():
    inputs = [x.requires_grad_() for x in ode()]
    expected = torch.autograd.grad(rk4_mlp(*inputs, [1.0], backend="cpp").sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(rk4_mlp(*inputs, [1.0], backend="cpp").sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_default_dtype_changes_nothing():
    inputs = layer()
    expected = modulated_conv2d(*inputs, backend="cpp")
    torch.set_default_dtype(torch.float16)
    try:
        assert torch.equal(modulated_conv2d(*inputs, backend="cpp", resample_filter=torch.ones(2).float()), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_filter_of_one_dimension_is_ignored_without_upsampling():
    inputs = [x.requires_grad_() for x in layer()]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], requires_grad=True)
    results = [modulated_conv2d(*inputs, resample_filter=filter, backend="cpp") for filter in (taps, None)]
    assert torch.equal(*results)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in results]
    for with_filter, without in zip(*gradients, strict=True):
        assert torch.equal(with_filter, without) and without.abs().max() > 0.1
    # No gradient reaches the filter.
    y = modulated_conv2d(*(x.detach() for x in inputs), resample_filter=taps, backend="cpp")
    assert not y.requires_grad


@pytest.mark.parametrize("create_graph", [False, True])
def test_inputs_may_depend_on_each_other(create_graph):
    def gradient(backend):
        h0, weight, b, _ = (x.requires_grad_() for x in ode(torch.float64))
        out = rk4_mlp(h0, weight, b, 2 * b, [1.0], backend=backend)
        return torch.autograd.grad(out.square().sum(), b, create_graph=create_graph)[0]

    torch.testing.assert_close(gradient("cpp"), gradient("reference"), rtol=1e-9, atol=1e-9)

    def of_style(backend):
        x, weight, style = layer()
        style.requires_grad_()
        out = modulated_conv2d(x * style[:, :, None, None], weight, style, backend=backend)
        return torch.autograd.grad(out.square().sum(), style, create_graph=create_graph)[0]

    torch.testing.assert_close(of_style("cpp"), of_style("reference"), rtol=1e-4, atol=1e-3)


def test_forward_mode_is_the_references():
    h0, *parameters = ode()
    x, weight, style = layer()
    calls = [
        (lambda h, b: rk4_mlp(h, *parameters, [1.0], backend=b), h0),
        (lambda x, b: path_interpolate(x, [0.5], seed=1, backend=b)[1], x),
        (lambda x, b: modulated_conv2d(x, weight, style, backend=b), x),
    ]
    for call, at in calls:
        expected = jvp(lambda v, call=call: call(v, "reference"), (at,), (torch.ones_like(at),))[1]
        assert expected.norm() > 0.1
        actual = jvp(lambda v, call=call: call(v, None), (at,), (torch.ones_like(at),))[1]
        torch.testing.assert_close(actual, expected)


def test_too_many_elements():
    with pytest.raises(ValueError, match="the number of elements of shape must be in"):
        philox_normal((2**40, 2**40), seed=3)


def test_given_noise_needs_no_seed_and_ignores_the_offset():
    x0, noise = torch.rand(2, 1, 1, 2, 2).unbind()
    actual = path_interpolate(x0, [0.5], noise=noise, offset=-1, backend="cpp")
    expected = path_interpolate(x0, [0.5], noise=noise, backend="reference")
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
