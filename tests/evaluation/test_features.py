"""Feature networks: how each is named, that its weights are what they say, and mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spigan.data import DataConfig, open_dataset
from spigan.evaluation import features
from spigan.evaluation.features import FeatureNet, file_sha256, load_features, resized

WEIGHTS = "feature_nets/cifar10_resnet56.safetensors"


def noise(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


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
    with pytest.raises(ValueError, match=r"is not inception-2015-12-05\.pt .* FID is only defined with this file"):
        load_features(f"inception={file}")
    with pytest.raises(ValueError, match="would be mistaken for FID's network"):
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


def test_images_are_resized_by_pillow(tmp_path: Path, random_resnet: Callable[[Path], Path]) -> None:
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
        FileNotFoundError, match=r"feature network 'dino': the file 'dino' does not exist; expected \"inception"
    ):
        load_features("dino")
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.ones(1)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(ValueError, match=rf"{name} is damaged or not a TorchScript file"):
            load_features(str(tmp_path / name))
    torch.jit.script(Wide()).save(str(tmp_path / "wide.pt"))
    with pytest.raises(ValueError, match=r"wide\.pt cannot be applied to uint8 images \[N, 3, 32, 32\] \(RuntimeError"):
        load_features(str(tmp_path / "wide.pt"))
    torch.jit.script(Flat()).save(str(tmp_path / "flat.pt"))
    with pytest.raises(ValueError, match=r"flat\.pt (makes features of shape|cannot be applied)"):
        load_features(str(tmp_path / "flat.pt"))
    with pytest.raises(ValueError, match="its name may only contain letters"):
        load_features(f"a b={scripts / 'pixels.pt'}")


def test_loading_leaves_the_random_state_alone(
    tmp_path: Path, scripts: Path, random_resnet: Callable[[Path], Path]
) -> None:
    path = random_resnet(tmp_path / "a.safetensors")
    state = torch.get_rng_state()
    net: FeatureNet = load_features(f"cifar10-resnet56={path}")
    net(noise(2, 3, 32, 32), probabilities=True)
    load_features(str(scripts / "pixels.pt"))
    assert torch.equal(torch.get_rng_state(), state)


def test_bundled_classifier_of_digits() -> None:
    """It was trained on all of these; benchmarks/train_digits_net.py measures it on others."""
    from sklearn.datasets import load_digits

    dataset = open_dataset(DataConfig(source="digits", resolution=16), progress=False)
    images = torch.stack([dataset[i] for i in range(len(dataset))])
    net = load_features("digits")
    features, classes = net(images, probabilities=True)
    assert classes is not None and features.shape == (1797, 64) and net.metric("FD") == "FD-Digits"
    right = classes.argmax(1) == torch.from_numpy(load_digits().target)
    assert right.float().mean() > 0.99
    enlarged = torch.nn.functional.interpolate(images[:8].float(), scale_factor=2).to(torch.uint8)
    assert torch.allclose(net(enlarged)[0], features[:8], atol=3.0)  # resized to 16 x 16


def test_pixels_are_averages_of_blocks() -> None:
    images = torch.zeros(2, 1, 16, 32, dtype=torch.uint8)
    images[0, :, :2, :4] = 255
    images[1] = 51
    features, classes = load_features("pixels")(images, probabilities=True)
    expected = torch.full((2, 8, 8), -1.0)
    expected[0, 0, 0], expected[1] = 1.0, 51 / 127.5 - 1
    assert classes is None and torch.allclose(features, expected.flatten(1))


def test_a_path_may_hold_equals_signs(scripts: Path, tmp_path: Path) -> None:
    """As the folders of `spigan ablate` do."""
    file = tmp_path / "r1_gamma=0.1" / "net.pt"
    file.parent.mkdir()
    file.write_bytes((scripts / "pixels.pt").read_bytes())
    assert load_features(str(file)).name == "net"
    assert load_features(f"mine={file}").name == "mine"
