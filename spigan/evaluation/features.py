"""Feature networks: uint8 images -> the [N, D] features that metrics compare, and class probabilities where there are.

A feature network is named by a specification:

    inception                       the Inception of 2015-12-05, from the user's cache
    inception=PATH                  the same file elsewhere
    cifar10-resnet56=PATH           safetensors of the CIFAR-10 ResNet-56
    NAME=PATH, or PATH              any TorchScript network; NAME (default: the file's) names its metrics

Only the first is FID. A distance of other features is called FD-<name>, an Inception Score of another classifier
IS-<name>.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.data.dataset import user_path
from spigan.evaluation.cache import cache_folder
from spigan.models.pretrained import load_weights

if TYPE_CHECKING:
    from PIL import Image

INCEPTION_NAME = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_NAME}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
RESNET56 = "cifar10-resnet56"
RESNET56_SOURCE = "docs/evaluation.md says how to make it from https://github.com/akamaster/pytorch_resnet_cifar10"

Network = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


class FeatureNet:
    """A network that images are compared by. Made by `load_features`.

    Args:
        network: (uint8 [N, 3, H, W] on `device`, whether class probabilities are wanted) -> features [N, D], and class
            probabilities [N, classes] or None.
        name: what its metrics are called after; None for the Inception of FID.
        sha256: of the file of weights.
        source: specification that it was loaded by.
        resolution: side that images are resized to first; None: any, as they are.
        device: where it runs.

    Attributes:
        dim: D.
        classes: number of classes; None without class probabilities.
    """

    def __init__(
        self, network: Network, name: str | None, sha256: str, source: str, resolution: int | None, device: torch.device
    ) -> None:
        self._network = network
        self.name = name or "Inception"
        self._suffix = "" if name is None else f"-{name}"
        self.sha256, self.source, self.resolution, self.device = sha256, source, resolution, device
        features, probabilities = self._try()
        self.dim = features.shape[1]
        self.classes = None if probabilities is None else probabilities.shape[1]

    def metric(self, kind: str) -> str:
        """Name of a metric of these features; kind is "FD", "KID" or "IS": "FID", "KID", "IS" of the Inception of FID,
        else "FD-ResNet56" and so on."""
        return "FID" if kind == "FD" and not self._suffix else kind + self._suffix

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, *, resize: str = "lanczos", probabilities: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Features of uint8 images [N, C, H, W], C = 1 (repeated) or 3.

        Args:
            images: on any device.
            resize: Pillow's filter, antialiased, where they are not of this network's `resolution`.
            probabilities: also return class probabilities, where the network has any.

        Returns:
            float32 [N, D], and float32 [N, classes] or None, on this network's device.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images must be uint8 [N, 1 or 3, H, W] in 0..255, got {images.dtype} {list(images.shape)}"
            )
        if self.resolution is not None and tuple(images.shape[2:]) != (self.resolution, self.resolution):
            images = resized(images, self.resolution, resize)
        images = images.to(self.device).expand(-1, 3, -1, -1).contiguous()
        features, classes = self._network(images, probabilities)
        return features.float(), None if classes is None else classes.float()

    def _try(self) -> tuple[Tensor, Tensor | None]:
        """What two images of noise give, checked: a wrong network ends here, not after an hour of sampling."""
        side = self.resolution or 32
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8))
        try:
            features, probabilities = self(noise, probabilities=True)
        except Exception as error:  # it is anybody's code
            raise ValueError(
                f"{self.source} cannot be applied to uint8 images [N, 3, {side}, {side}] "
                f"({type(error).__name__}: {(str(error).strip() or 'no more is known').splitlines()[-1][:500]}): "
                "see docs/evaluation.md"
            ) from error
        for what, values in (("features", features), ("class probabilities", probabilities)):
            if values is not None and (values.ndim != 2 or len(values) != 2):
                raise ValueError(
                    f"{self.source} makes {what} of shape {list(values.shape)}, expected [2, D] of 2 images"
                )
        return features, probabilities


def resized(images: Tensor, resolution: int, resize: str) -> Tensor:
    """uint8 [N, C, H, W] resized to squares by Pillow, whose filters are antialiased."""
    from PIL import Image

    from spigan.images import to_pil

    def one(image: Image.Image) -> Tensor:
        pixels = np.asarray(image.resize((resolution, resolution), Image.Resampling[resize.upper()]))
        return torch.from_numpy(pixels.copy()).reshape(resolution, resolution, -1).permute(2, 0, 1)

    return torch.stack([one(image) for image in to_pil(images)])


def load_features(spec: str, *, device: torch.device | str = "cpu", cache_dir: str | Path | None = None) -> FeatureNet:
    """The feature network that a specification names; see the top of this module.

    A TorchScript file is a program: load only one from somebody you trust. torch's global generator is not touched.

    Args:
        spec: "inception", "inception=PATH", "cifar10-resnet56=PATH", "NAME=PATH" or "PATH".
        device: where it shall run.
        cache_dir: where "inception" is looked for; default: see `spigan.evaluation.cache.cache_folder`.

    Raises:
        FileNotFoundError: no such file; the message says where to get it.
        ValueError: the file is damaged, of another kind, or not of the network that the name means.
    """
    name, separator, path = spec.partition("=")
    if not separator:
        name, path = ("", spec) if spec not in ("inception", RESNET56) else (spec, "")
    device = torch.device(device)
    if name == "inception":
        return _inception(spec, user_path(path) if path else cache_folder(cache_dir) / INCEPTION_NAME, device)
    if name == RESNET56:
        return _resnet56(spec, path, device)
    file = user_path(path)
    if not file.is_file():
        known = f'"inception", "inception=PATH", "{RESNET56}=PATH", or the PATH of a TorchScript network'
        raise FileNotFoundError(f"feature network {spec!r}: there is no file {path!r}; expected {known}")
    if not re.fullmatch(r"[\w.-]+", name or file.stem):
        raise ValueError(f"feature network {spec!r}: its name may hold letters, digits, '.', '-' and '_' only")
    if (name or file.stem).lower() in ("inception", "fid", INCEPTION_NAME.removesuffix(".pt")):
        raise ValueError(f"{name or file.stem!r} would be taken for FID's network: say inception={path}")
    script = _load_script(file, device)
    return FeatureNet(_script_network(script), name or file.stem, file_sha256(file), spec, None, device)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


# ---- TorchScript ----


def _load_script(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            # torch calls TorchScript deprecated; the weights of FID exist in no other form.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # torch's reader raises RuntimeError, IndexError, UnicodeDecodeError and others
        raise ValueError(
            f"{path} is not a TorchScript file, or damaged ({_first_line(error)}): weights alone are "
            "not enough, a network is saved by torch.jit.script(network).save(PATH)"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _script_network(script: Any) -> Network:
    """Any TorchScript network: uint8 [N, 3, H, W] -> features [N, D], or the pair (features, class probabilities).

    Where it takes return_features (NVIDIA's feature networks do), that is set.
    """
    takes = {argument.name for argument in script.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in takes else {}

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        result = script(images, **options)
        features, classes = result if isinstance(result, tuple) else (result, None)
        return features.flatten(1), classes if probabilities else None

    return network


def _inception(spec: str, path: Path, device: torch.device) -> FeatureNet:
    """NVIDIA's TorchScript translation of the Inception of 2015-12-05.

    It resizes images to 299 x 299 itself, bilinearly and without antialiasing, as FID is defined.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: FID needs the Inception network of 2015-12-05, a TorchScript file of 96 MB. Get "
            f"it from {INCEPTION_URL} and put it there, or say inception=PATH"
        )
    sha256 = file_sha256(path)
    if sha256 != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not {INCEPTION_NAME} (its sha256 is {sha256[:12]}..., expected {INCEPTION_SHA256[:12]}...): "
            f"get it again from {INCEPTION_URL}; only that file makes what is called FID. Another network is given as "
            "NAME=PATH"
        )
    script = _load_script(path, device)
    # The softmax without its bias, as the Inception Score was published. Of features that are there already: the
    # network's own no_output_bias=True would compute them a second time.
    weight = script.state_dict()["output.weight"].float()  # [1008, 2048]

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        features = script(images, return_features=True).float()
        return features, F.linear(features, weight).softmax(1) if probabilities else None

    return FeatureNet(network, None, sha256, spec, None, device)


# ---- ResNet-56 for CIFAR-10 ----


class _BatchNorm(nn.Module):
    """Batch normalisation with kept statistics: what nn.BatchNorm2d is in eval mode, without its counter of batches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[arg-type]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _BatchNorm(outputs)
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:  # every second pixel; channels of zeros on both sides
            half = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.padding - half))
        return F.relu(y + x)


class ResNet56(nn.Module):
    """The ResNet-56 for 32x32 images (He et al. 2015, section 4.2): 3 stages of 9 blocks, 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = _BatchNorm(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            first = _Block(inputs, outputs, stride=1 if stage == 1 else 2)
            self.add_module(f"layer{stage}", nn.Sequential(first, *(_Block(outputs, outputs, 1) for _ in range(8))))
            inputs = outputs
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 RGB [N, 3, 32, 32] -> features [N, 64] after global average pooling, class probabilities [N, 10]."""
        mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)
        x = (images.float() / 255.0 - mean[:, None, None]) / std[:, None, None]
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        features = x.mean((2, 3))
        return features, self.linear(features).softmax(1)


def _resnet56(spec: str, path: str, device: torch.device) -> FeatureNet:
    file = user_path(path)
    if not path or not file.is_file():
        problem = f"{path} does not exist" if path else f"{spec!r} says no file"
        raise FileNotFoundError(f"{problem}: give {RESNET56}=PATH of its safetensors; {RESNET56_SOURCE}")
    with torch.device("meta"):  # no memory, and no random numbers, for weights that are about to be replaced
        resnet = ResNet56()
    resnet = resnet.to_empty(device="cpu")
    load_weights(resnet, file)
    resnet = resnet.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    # On a CPU activations of 64 images stay in the cache: 666 images/s instead of 498 at 256 (one thread of an AVX-512
    # server CPU, PyTorch 2.13, 2026-11-25).
    rows = 64 if device.type == "cpu" else 4096

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        features, classes = zip(*(resnet(part) for part in images.split(rows)), strict=True)
        return torch.cat(features), torch.cat(classes) if probabilities else None

    return FeatureNet(network, "ResNet56", file_sha256(file), spec, 32, device)
