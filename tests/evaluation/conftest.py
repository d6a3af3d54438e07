"""Feature networks and models that cost nothing, and a cache of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from spigan import SPIGAN, ModelConfig
from spigan.evaluation.resnet56 import ResNet56

SHARED = Path(__file__).parents[3] / "shared" / "data"


class Pixels(nn.Module):
    """4 x 4 means of each channel: 48 features."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)


class Classifier(nn.Module):
    """Means of the channels, and class probabilities of them."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        means = images.float().mean((2, 3)) / 64
        return means, means.softmax(1)


class Detector(nn.Module):
    """The interface of NVIDIA's feature networks, with 16 features and 6 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(16, 6)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = nn.functional.adaptive_avg_pool2d(img.float().mean(1, keepdim=True), 4).flatten(1) / 255
        if return_features:
            return features
        logits = features @ self.output.weight.T if no_output_bias else self.output(features)
        return logits.softmax(1)


@pytest.fixture(autouse=True, scope="module")  # not "session", which would last for all other tests
def _one_thread() -> Iterator[None]:
    """Small networks are fastest on one thread, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache during a test: an empty folder."""
    monkeypatch.setenv("SPIGAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of TorchScript networks: pixels.pt, classifier.pt, detector.pt."""
    folder = tmp_path_factory.mktemp("scripts")
    torch.manual_seed(0)
    for network in (Pixels(), Classifier(), Detector()):
        torch.jit.script(network.eval()).save(str(folder / f"{type(network).__name__.lower()}.pt"))
    return folder


@pytest.fixture(scope="session")
def model() -> SPIGAN:
    """A tiny model of 8x8 grey images with random weights."""
    torch.manual_seed(0)
    config = ModelConfig(resolution=8, img_channels=1, dim_h=16, embed_channels=4, channel_base=64, channel_max=8)
    return SPIGAN(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """shared(name): a file or folder of ../shared/data; the test is skipped where it is not."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"../shared/data/{name} is not here")
        return SHARED / name

    return find


@pytest.fixture
def random_resnet() -> Callable[[Path], Path]:
    """random_resnet(path): write the weights of an untrained ResNet-56."""

    def write(path: Path) -> Path:
        torch.manual_seed(0)
        state = ResNet56().state_dict()
        for name, tensor in state.items():
            if "bn" in name:  # those have no initial values
                tensor.fill_(0.0 if name.endswith(("bias", "mean")) else 1.0)
        save_file(state, path)
        return path

    return write
