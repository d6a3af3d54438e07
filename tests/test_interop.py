"""spigan.interop against images made by the original StyleGAN2-ADA code (golden/README.md says how)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import spigan
from spigan.interop import stylegan2_synthesis

GOLDEN = Path(__file__).parent / "golden" / "stylegan2_ada.safetensors"
TOLERANCE = 3e-6  # of the image's maximum; the original's own float32 rounding is 6e-7


@dataclass(frozen=True)
class Network:
    """Sizes of one of the networks behind the golden images."""

    w_dim: int
    resolution: int
    img_channels: int
    channel_base: int
    channel_max: int
    conv_clamp: float | None = None

    @property
    def resolutions(self) -> list[int]:
        return [2**i for i in range(2, self.resolution.bit_length())]

    @property
    def num_ws(self) -> int:
        return 2 * len(self.resolutions)


NETWORKS = {
    "a": Network(24, 32, 3, channel_base=512, channel_max=20),
    "b": Network(16, 8, 1, channel_base=64, channel_max=12, conv_clamp=256),
    "c": Network(16, 8, 1, channel_base=64, channel_max=12, conv_clamp=1.25),
}


def state_dict_shapes(net: Network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official synthesis network's state dict, without the "synthesis." prefix."""
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, in_channels: int) -> None:
        shapes[f"{name}.affine.weight"] = (in_channels, net.w_dim)
        shapes[f"{name}.affine.bias"] = (in_channels,)

    def conv(name: str, in_channels: int, out_channels: int, res: int) -> None:
        affine(name, in_channels)
        shapes[f"{name}.weight"] = (out_channels, in_channels, 3, 3)
        shapes[f"{name}.bias"] = (out_channels,)
        shapes[f"{name}.noise_strength"] = ()
        shapes[f"{name}.noise_const"] = (res, res)
        shapes[f"{name}.resample_filter"] = (4, 4)

    channels = {res: min(net.channel_base // res, net.channel_max) for res in net.resolutions}
    for res in net.resolutions:
        block, width = f"b{res}", channels[res]
        shapes[f"{block}.resample_filter"] = (4, 4)
        if res == 4:
            shapes[f"{block}.const"] = (width, 4, 4)
        else:
            conv(f"{block}.conv0", channels[res // 2], width, res)
        conv(f"{block}.conv1", width, width, res)
        affine(f"{block}.torgb", width)
        shapes[f"{block}.torgb.weight"] = (net.img_channels, width, 1, 1)
        shapes[f"{block}.torgb.bias"] = (net.img_channels,)
    return shapes


def make_state_dict(net: Network, prefix: str = "synthesis.") -> dict[str, Tensor]:
    """The weights behind the golden images, by the rule in golden/README.md."""
    taps = np.array([1.0, 3.0, 3.0, 1.0])
    state: dict[str, Tensor] = {}
    for j, (name, shape) in enumerate(sorted(state_dict_shapes(net).items())):
        if name.endswith("resample_filter"):
            value = np.outer(taps, taps) / 64
        else:
            value = np.asarray(np.random.RandomState(1000 + j).standard_normal(shape))
            if name.endswith("affine.bias"):
                value = 1 + 0.1 * value
            elif name.endswith((".bias", ".noise_strength")):
                value = 0.1 * value
        state[prefix + name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state


def make_styles(net: Network) -> Tensor:
    """[2, num_ws, w_dim], a different style for each layer."""
    styles = np.random.RandomState(7).standard_normal((2, net.num_ws, net.w_dim))
    return torch.from_numpy(styles.astype(np.float32))


def relative_error(image: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the expected image's largest absolute value."""
    assert image.shape == expected.shape
    return ((image.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return make_state_dict(NETWORKS["a"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("noise", ["const", "none"])
@pytest.mark.parametrize("key", NETWORKS)
def test_images_equal_the_originals(key: str, noise: str, dtype: torch.dtype, golden: dict[str, Tensor]) -> None:
    net = NETWORKS[key]
    generator = stylegan2_synthesis(make_state_dict(net), conv_clamp=net.conv_clamp)
    assert isinstance(generator, spigan.Generator)
    assert generator.num_ws == net.num_ws
    image = generator.to(dtype)(make_styles(net).to(dtype), noise=noise)
    assert image.dtype == dtype
    assert relative_error(image, golden[f"{key}/{noise}"]) <= TOLERANCE


def test_golden_images_tell_noise_and_clamp_apart(golden: dict[str, Tensor]) -> None:
    for key in NETWORKS:
        assert relative_error(golden[f"{key}/none"], golden[f"{key}/const"]) > 0.1
    # b and c differ in conv_clamp alone.
    for noise in ("const", "none"):
        assert relative_error(golden[f"c/{noise}"], golden[f"b/{noise}"]) > 0.1


@torch.no_grad()
def test_every_layer_takes_its_own_style(golden: dict[str, Tensor]) -> None:
    net = NETWORKS["a"]
    generator = stylegan2_synthesis(make_state_dict(net))
    for layer in range(net.num_ws):
        styles = make_styles(net)
        styles[:, layer] += 0.5
        assert relative_error(generator(styles, noise="const"), golden["a/const"]) > 1e-3, f"layer {layer}"


@pytest.mark.parametrize(("channel_base", "channel_max"), [(256, 64), (100, 9), (1000, 512), (1023, 77), (64, 1)])
def test_widths_that_do_not_divide_channel_base(channel_base: int, channel_max: int) -> None:
    net = Network(8, 64, 3, channel_base=channel_base, channel_max=channel_max)
    weights = stylegan2_synthesis(make_state_dict(net)).state_dict()
    for name, shape in state_dict_shapes(net).items():
        if not name.endswith("resample_filter"):
            assert weights[name].shape == shape, name


@torch.no_grad()
def test_prefix_is_optional(golden: dict[str, Tensor]) -> None:
    net = NETWORKS["a"]
    generator = stylegan2_synthesis(make_state_dict(net, prefix=""))
    assert relative_error(generator(make_styles(net), noise="const"), golden["a/const"]) <= TOLERANCE


@torch.no_grad()
def test_mapping_of_a_whole_generator_is_ignored(state: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    state |= {
        "mapping.fc0.weight": torch.zeros(24, 24),
        "mapping.fc0.bias": torch.zeros(24),
        "mapping.w_avg": torch.zeros(24),
    }
    generator = stylegan2_synthesis(state)
    assert relative_error(generator(make_styles(NETWORKS["a"]), noise="const"), golden["a/const"]) <= TOLERANCE


@torch.no_grad()
def test_half_precision_weights_are_cast_to_float32(state: dict[str, Tensor]) -> None:
    mixed = {k: v.half() if k.startswith(("synthesis.b16.", "synthesis.b32.")) else v for k, v in state.items()}
    generator = stylegan2_synthesis(mixed)
    assert {v.dtype for v in [*generator.parameters(), *generator.buffers()]} == {torch.float32}
    rounded = stylegan2_synthesis({k: v.float() for k, v in mixed.items()})
    styles = make_styles(NETWORKS["a"])
    torch.testing.assert_close(generator(styles, noise="const"), rounded(styles, noise="const"), rtol=0, atol=0)


@torch.no_grad()
def test_generator_owns_its_weights(state: dict[str, Tensor]) -> None:
    generator = stylegan2_synthesis(state)
    before = {k: v.clone() for k, v in state.items()}
    for tensor in [*generator.parameters(), *generator.buffers()]:
        tensor.zero_()
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(
    "name",
    [
        "b4.const",
        "b4.conv1.weight",
        "b4.torgb.affine.weight",
        "b8.conv0.weight",
        "b8.conv1.noise_strength",
        "b16.conv0.noise_const",
        "b16.conv1.affine.bias",
        "b16.torgb.weight",
        "b32.conv1.weight",
        "b32.torgb.bias",
    ],
)
@pytest.mark.parametrize("prefix", ["synthesis.", ""])
def test_missing_name(name: str, prefix: str) -> None:
    state = make_state_dict(NETWORKS["a"], prefix=prefix)
    del state[prefix + name]
    with pytest.raises(ValueError, match=re.escape(name)):
        stylegan2_synthesis(state)


def test_missing_block(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"b16\b"):
        stylegan2_synthesis({k: v for k, v in state.items() if ".b16." not in k})


@pytest.mark.parametrize("empty", [{}, {"mapping.w_avg": torch.zeros(24)}], ids=["nothing", "mapping only"])
def test_no_synthesis_names(empty: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"b4\.const|synthesis"):
        stylegan2_synthesis(empty)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("b4.const", (20, 4, 5)),
        ("b8.conv1.bias", (21,)),
        ("b8.conv0.affine.weight", (20, 25)),
        ("b16.conv0.noise_const", (16, 15)),
        ("b16.conv1.weight", (20, 20, 5, 5)),
        ("b16.torgb.weight", (4, 20, 1, 1)),
        ("b32.conv1.affine.bias", (17,)),
        ("b32.conv0.weight", (16, 20, 3)),
    ],
)
def test_wrong_shape(name: str, shape: tuple[int, ...], state: dict[str, Tensor]) -> None:
    state[f"synthesis.{name}"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=re.escape(name)):
        stylegan2_synthesis(state)


@pytest.mark.parametrize(
    "name", ["synthesis.b8.skip.weight", "synthesis.b4.conv0.weight", "synthesis.b12.const", "encoder.weight"]
)
def test_unknown_name(name: str, state: dict[str, Tensor]) -> None:
    state[name] = torch.zeros(20, 20, 3, 3)
    with pytest.raises(ValueError, match=re.escape(name.removeprefix("synthesis."))):
        stylegan2_synthesis(state)


@pytest.mark.parametrize("name", ["b4.resample_filter", "b8.conv0.resample_filter", "b32.resample_filter"])
@pytest.mark.parametrize("taps", [[1.0, 2.0, 2.0, 1.0], [1.0, 2.0, 1.0], [1.0, 3.0, 3.0, 2.0]], ids=str)
def test_other_resample_filter(name: str, taps: list[float], state: dict[str, Tensor]) -> None:
    row = torch.tensor(taps) / sum(taps)
    state[f"synthesis.{name}"] = torch.outer(row, row)
    with pytest.raises(ValueError, match=re.escape(name)):
        stylegan2_synthesis(state)


@pytest.mark.parametrize("name", ["b4.const", "b8.conv0.weight", "b16.conv1.noise_strength", "b32.resample_filter"])
@pytest.mark.parametrize("value", [None, 1.0, np.zeros((4, 4), dtype=np.float32)], ids=["None", "float", "ndarray"])
def test_not_a_tensor(name: str, value: object, state: dict[str, Tensor]) -> None:
    broken: dict[str, object] = {**state, f"synthesis.{name}": value}
    with pytest.raises(TypeError, match=re.escape(name)):
        stylegan2_synthesis(broken)  # type: ignore[arg-type]
