"""The ResNet-56 for CIFAR-10: architecture, numbers, accuracy, and wrong weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.data import DataConfig, open_dataset
from spigan.evaluation.features import file_sha256, load_features
from spigan.evaluation.resnet56 import ResNet56

WEIGHTS = "feature_nets/cifar10_resnet56.safetensors"


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def test_resnet56_is_the_published_architecture(tmp_path: Path, random_resnet: Callable[[Path], Path]) -> None:
    """0.85 M parameters (He et al. 2015, table 6), 55 convolutions and a linear layer."""
    resnet = ResNet56()
    learned = [tensor for name, tensor in resnet.state_dict().items() if "running" not in name]
    assert sum(tensor.numel() for tensor in learned) == pytest.approx(0.85e6, rel=0.01)
    assert sum(isinstance(module, nn.Conv2d) for module in resnet.modules()) == 55
    net = load_features(f"cifar10-resnet56={random_resnet(tmp_path / 'a.safetensors')}")
    assert (net.name, net.dim, net.classes, net.resolution) == ("ResNet56", 64, 10, 32)
    assert net.sha256 == file_sha256(tmp_path / "a.safetensors")
    assert [net.metric(kind) for kind in ("FD", "KID", "IS")] == ["FD-ResNet56", "KID-ResNet56", "IS-ResNet56"]


def test_resnet56_against_plain_functions(tmp_path: Path, random_resnet: Callable[[Path], Path]) -> None:
    """The same network written out with torch's functions alone, on weights drawn at random."""
    path = random_resnet(tmp_path / "a.safetensors")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: tensor + 0.1 * torch.rand(tensor.shape, generator=generator) if "bn" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(state, path)

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias, mean, var = (
            state[f"{name}.{part}"][:, None, None].double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    images = noise(3, 3, 32, 32)
    mean = torch.tensor([0.485, 0.456, 0.406]).double()[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225]).double()[:, None, None]
    x = norm(F.conv2d((images.double() / 255 - mean) / std, state["conv1.weight"].double(), padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(9):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{name}.conv1.weight"].double(), stride=stride, padding=1)
            y = norm(
                F.conv2d(norm(y, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"].double(), padding=1),
                f"{name}.bn2",
            )
            if stride == 2:
                x = x[:, :, ::2, ::2]
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2])
                x = torch.cat([zeros, x, zeros], 1)
            x = (x + y).relu()
    expected = x.mean((2, 3))
    found, probabilities = load_features(f"cifar10-resnet56={path}")(images, probabilities=True)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    logits = expected @ state["linear.weight"].double().T + state["linear.bias"].double()
    assert probabilities is not None
    torch.testing.assert_close(probabilities.double(), logits.softmax(1), rtol=1e-3, atol=1e-4)


def test_resnet56_knows_cifar10(shared: Callable[[str], Path]) -> None:
    """500 test images: 93.4 % of 10,000 are published, 4 standard deviations are 4.5 %."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = shared("cifar10")
    labels = parquet.read_table(next(folder.glob("test-*")), columns=["label"])["label"].to_pylist()[:500]
    test = open_dataset(DataConfig(source=str(folder), split="test", cache="none"), progress=False)
    net = load_features(f"cifar10-resnet56={shared(WEIGHTS)}")
    _, probabilities = net(test.images(range(500)), probabilities=True)
    assert probabilities is not None
    accuracy = (probabilities.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert accuracy == pytest.approx(0.934, abs=0.045)


def test_resnet56_refuses(tmp_path: Path, random_resnet: Callable[[Path], Path]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'cifar10-resnet56' lacks the path of a file: use cifar10-resnet56=PATH .*docs/"
    ):
        load_features("cifar10-resnet56")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: use cifar10-resnet56=PATH"):
        load_features("cifar10-resnet56=nowhere")
    state = load_file(random_resnet(tmp_path / "a.safetensors"))
    for damaged, message in (
        ({k: v for k, v in state.items() if k != "linear.bias"}, r"missing linear\.bias"),
        (state | {"more": torch.ones(1)}, "unexpected more"),
        (state | {"linear.weight": torch.ones(100, 64)}, r"linear\.weight has shape \[100, 64\], expected \[10, 64\]"),
    ):
        save_file(damaged, tmp_path / "b.safetensors")
        with pytest.raises(ValueError, match=message):
            load_features(f"cifar10-resnet56={tmp_path / 'b.safetensors'}")
    (tmp_path / "c.safetensors").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"c\.safetensors is damaged or not a safetensors file"):
        load_features(f"cifar10-resnet56={tmp_path / 'c.safetensors'}")
