"""spigan.models.layers: equalised learning rate and StyleGAN2's constants."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from spigan.models.layers import Conv2d, Linear, channels_at, check_resolution, network_dtype, normalize_2nd_moment


@pytest.mark.parametrize("activation", ["linear", "lrelu"])
@pytest.mark.parametrize("lr_multiplier", [1.0, 0.01])
def test_linear_is_scaled_when_used(activation: str, lr_multiplier: float) -> None:
    torch.manual_seed(0)
    layer = Linear(7, 5, activation=activation, lr_multiplier=lr_multiplier, bias_init=0.25).double()
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = x @ (layer.weight * lr_multiplier / math.sqrt(7)).T + 0.25
    if activation == "lrelu":
        expected = torch.where(expected > 0, expected, 0.2 * expected) * math.sqrt(2)
    torch.testing.assert_close(layer(x), expected)


def test_linear_starts_with_the_same_function_scale_whatever_the_multiplier() -> None:
    """Weights are stored divided by the multiplier, so that the multiplier slows Adam and nothing else."""
    outputs = []
    for lr_multiplier in (1.0, 0.01):
        torch.manual_seed(0)
        layer = Linear(64, 64, lr_multiplier=lr_multiplier)
        assert layer.weight.std().item() == pytest.approx(1 / lr_multiplier, rel=0.1)
        outputs.append(layer(torch.ones(1, 64)))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_linear_runs_in_the_dtype_of_its_input() -> None:
    assert Linear(4, 4)(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, None), (3, 2, None), (3, 2, 0), (1, 1, None)])
@pytest.mark.parametrize(("bias", "lr_multiplier"), [(True, 1.0), (True, 0.01), (False, 1.0)])
def test_conv_is_scaled_when_used(
    kernel: int, stride: int, padding: int | None, bias: bool, lr_multiplier: float
) -> None:
    torch.manual_seed(0)
    layer = Conv2d(3, 4, kernel, stride=stride, padding=padding, bias=bias, lr_multiplier=lr_multiplier)
    assert layer.weight.std().item() == pytest.approx(1 / lr_multiplier, rel=0.4)
    expected_bias = None
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias, std=1 / lr_multiplier)
        expected_bias = layer.bias * lr_multiplier
    x = torch.randn(2, 3, 9, 9)
    weight = layer.weight * lr_multiplier / math.sqrt(3 * kernel * kernel)
    expected = F.conv2d(x, weight, expected_bias, stride=stride, padding=kernel // 2 if padding is None else padding)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.bias is not None) == bias


def test_normalize_2nd_moment() -> None:
    x = torch.randn(5, 9) * torch.tensor([1e-2, 1.0, 3.0, 1e3, 1e5])[:, None]
    y = normalize_2nd_moment(x)
    torch.testing.assert_close(y.square().mean(dim=1), torch.ones(5), rtol=2e-4, atol=0)
    torch.testing.assert_close(F.normalize(y), F.normalize(x))
    assert not normalize_2nd_moment(torch.zeros(1, 9)).any()  # and no division by zero


def test_channels_at_is_the_width_of_stylegan2() -> None:
    # Config F: 512 up to 64x64, then halved at every doubling down to 32 at 1024x1024.
    widths = [channels_at(2**i, 32768, 512) for i in range(2, 11)]
    assert widths == [512, 512, 512, 512, 512, 256, 128, 64, 32]
    assert channels_at(1024, 512, 64) == 1


@pytest.mark.parametrize("resolution", [0, 4, 12, 33, 2048, -8])
def test_check_resolution_refuses(resolution: int) -> None:
    with pytest.raises(ValueError, match=f"power of two from 8 to 1024, got {resolution}"):
        check_resolution(resolution)


def test_network_dtype() -> None:
    x = torch.zeros(1)
    assert network_dtype(x) == torch.float32
    assert network_dtype(x.double()) == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert network_dtype(x) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert network_dtype(x) == torch.float32
