"""Feature networks: how each is named, that its weights are what they say, and mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.data import DataConfig, open_dataset
from spigan.evaluation import features
from spigan.evaluation.features import FeatureNet, ResNet56, file_sha256, load_features, resized

WEIGHTS = "feature_nets/cifar10_resnet56.safetensors"


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def random_resnet(path: Path) -> Path:
    """A file of ResNet-56 weights that is not trained."""
    torch.manual_seed(0)
    state = ResNet56().state_dict()
    for name, tensor in state.items():
        if "bn" in name:  # those have no initial values
            tensor.fill_(0.0 if name.endswith(("bias", "mean")) else 1.0)
    save_file(state, path)
    return path


# ---- ResNet-56 ----


def test_resnet56_is_the_published_architecture(tmp_path: Path) -> None:
    """0.85 M parameters (He et al. 2015, table 6), 55 convolutions and a linear layer."""
    resnet = ResNet56()
    learned = [tensor for name, tensor in resnet.state_dict().items() if "running" not in name]
    assert sum(tensor.numel() for tensor in learned) == pytest.approx(0.85e6, rel=0.01)
    assert sum(isinstance(module, nn.Conv2d) for module in resnet.modules()) == 55
    net = load_features(f"cifar10-resnet56={random_resnet(tmp_path / 'a.safetensors')}")
    assert (net.name, net.dim, net.classes, net.resolution) == ("ResNet56", 64, 10, 32)
    assert net.sha256 == file_sha256(tmp_path / "a.safetensors")
    assert [net.metric(kind) for kind in ("FD", "KID", "IS")] == ["FD-ResNet56", "KID-ResNet56", "IS-ResNet56"]


def test_resnet56_against_plain_functions(tmp_path: Path) -> None:
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
    _, probabilities = net(test.__getitems__(range(500)), probabilities=True)
    assert probabilities is not None
    accuracy = (probabilities.argmax(1) == torch.tensor(labels)).double().mean().item()
    assert accuracy == pytest.approx(0.934, abs=0.045)


def test_resnet56_refuses(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'cifar10-resnet56' says no file: give cifar10-resnet56=PATH .*docs/"):
        load_features("cifar10-resnet56")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist: give cifar10-resnet56=PATH"):
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


# ---- The Inception of FID ----


def test_missing_inception_says_where_to_get_it(cache: Path, tmp_path: Path) -> None:
    for spec, path in (("inception", cache / features.INCEPTION_NAME), ("inception=elsewhere.pt", "elsewhere.pt")):
        with pytest.raises(FileNotFoundError, match="FID needs the Inception network of 2015-12-05") as caught:
            load_features(spec)
        assert str(path) in str(caught.value) and features.INCEPTION_URL in str(caught.value)
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "own")):
        load_features("inception", cache_dir=tmp_path / "own")


def test_only_the_inception_of_2015_is_fid(scripts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = scripts / "detector.pt"
    with pytest.raises(ValueError, match=r"is not inception-2015-12-05\.pt .* only that file makes what is called FID"):
        load_features(f"inception={file}")
    with pytest.raises(ValueError, match="would be taken for FID's network"):
        load_features(f"Inception={file}")
    # A network of the same interface stands in for it.
    monkeypatch.setattr(features, "INCEPTION_SHA256", file_sha256(file))
    cache.mkdir()
    shutil.copy(file, cache / features.INCEPTION_NAME)
    net = load_features("inception")
    assert (net.name, net.dim, net.classes, net.resolution) == ("Inception", 16, 6, None)
    assert [net.metric(kind) for kind in ("FD", "KID", "IS")] == ["FID", "KID", "IS"]
    images = noise(5, 3, 32, 32)
    script = torch.jit.load(str(file))
    found, probabilities = net(images, probabilities=True)
    torch.testing.assert_close(found, script(images, return_features=True))
    torch.testing.assert_close(probabilities, script(images, no_output_bias=True))
    assert net(images)[1] is None


# ---- Any TorchScript network ----


def test_torchscript_networks(scripts: Path) -> None:
    net = load_features(str(scripts / "pixels.pt"))
    assert (net.name, net.metric("FD"), net.dim, net.classes) == ("pixels", "FD-pixels", 48, None)
    with_classes = load_features(f"my.net={scripts / 'classifier.pt'}")
    assert (with_classes.metric("IS"), with_classes.dim, with_classes.classes) == ("IS-my.net", 3, 3)
    detector = load_features(str(scripts / "detector.pt"))
    assert (detector.metric("FD"), detector.dim, detector.classes) == ("FD-detector", 16, None)


def test_grey_images_become_rgb(scripts: Path) -> None:
    net, images = load_features(str(scripts / "pixels.pt")), noise(4, 1, 16, 16)
    assert torch.equal(net(images)[0], net(images.repeat(1, 3, 1, 1))[0])


def test_images_are_resized_by_pillow(tmp_path: Path) -> None:
    net = load_features(f"cifar10-resnet56={random_resnet(tmp_path / 'a.safetensors')}")
    images = noise(2, 3, 64, 64)
    for filter_ in ("lanczos", "box"):
        how = Image.Resampling[filter_.upper()]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        expected = np.stack([np.asarray(picture.resize((32, 32), how)) for picture in pictures])
        assert np.array_equal(resized(images, 32, filter_).permute(0, 2, 3, 1).numpy(), expected)
        assert torch.equal(net(images, resize=filter_)[0], net(resized(images, 32, filter_))[0])
    assert resized(noise(2, 1, 8, 8), 32, "bicubic").shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    "images", [torch.zeros(2, 3, 8, 8), noise(2, 2, 8, 8), noise(3, 8, 8)], ids=["float", "channels", "one image"]
)
def test_unsuitable_images(scripts: Path, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, 1 or 3, H, W\] in 0\.\.255, got"):
        load_features(str(scripts / "pixels.pt"))(images)


class Flat(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().sum()


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(images.float().flatten(1))


def test_networks_that_are_none(tmp_path: Path, scripts: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"feature network 'dino': there is no file 'dino'; expected \"inception"
    ):
        load_features("dino")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(ValueError, match=rf"{name} is not a TorchScript file, or damaged"):
            load_features(str(tmp_path / name))
    torch.jit.script(Wide()).save(str(tmp_path / "wide.pt"))
    with pytest.raises(ValueError, match=r"wide\.pt cannot be applied to uint8 images \[N, 3, 32, 32\] \(RuntimeError"):
        load_features(str(tmp_path / "wide.pt"))
    torch.jit.script(Flat()).save(str(tmp_path / "flat.pt"))
    with pytest.raises(ValueError, match=r"flat\.pt (makes features of shape|cannot be applied)"):
        load_features(str(tmp_path / "flat.pt"))
    with pytest.raises(ValueError, match="its name may hold letters"):
        load_features(f"a b={scripts / 'pixels.pt'}")


def test_loading_leaves_the_random_state_alone(tmp_path: Path, scripts: Path) -> None:
    path = random_resnet(tmp_path / "a.safetensors")
    state = torch.get_rng_state()
    net: FeatureNet = load_features(f"cifar10-resnet56={path}")
    net(noise(2, 3, 32, 32), probabilities=True)
    load_features(str(scripts / "pixels.pt"))
    assert torch.equal(torch.get_rng_state(), state)
