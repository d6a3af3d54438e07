"""Feature networks, which map uint8 images to the [N, D] features that metrics compare, and to class probabilities.

A specification names a feature network:

    inception                       the Inception of 2015-12-05, from the user's cache
    inception=PATH                  the same file in another place
    digits                          the bundled classifier of digits
    pixels                          the pixels themselves, as 8 x 8 grey averages
    cifar10-resnet56=PATH           the CIFAR-10 ResNet-56, a safetensors file
    NAME=PATH, or PATH              any TorchScript network; NAME (default: the file's) names its metrics

`digits` and `pixels` need no file. FID and IS are only defined with Inception. With any other network, the distance is
called FD-<name> and the Inception Score IS-<name>.
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
from torch import Tensor
from torch.nn import functional as F

from spigan.evaluation import digits_net
from spigan.evaluation.resnet56 import load_resnet56
from spigan.files import cache_folder, user_path
from spigan.images import to_pil

if TYPE_CHECKING:
    from PIL import Image

INCEPTION_NAME = "inception-2015-12-05.pt"
INCEPTION_URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{INCEPTION_NAME}"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
RESNET56 = "cifar10-resnet56"
RESNET56_SOURCE = "docs/evaluation.md explains how to make it from https://github.com/akamaster/pytorch_resnet_cifar10"

Network = Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]


class FeatureNet:
    """A network whose features are used to compare images. Created by `load_features`.

    Args:
        network: function of the images (uint8 [N, 3, H, W] on `device`) and of a bool, whether to compute class
            probabilities. It returns features [N, D], and class probabilities [N, classes] or None.
        name: name that appears in the names of its metrics. None for FID's Inception.
        sha256: SHA-256 of the file of weights.
        source: the specification from which it was loaded.
        resolution: side in pixels to which images are first resized. None: images of any size are used unchanged.
        device: device on which it runs.

    Attributes:
        dim: number of features, D.
        classes: number of classes. None if there are no class probabilities.

    Raises:
        ValueError: if the network cannot be applied to images, or its results have the wrong shape.
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
        """Return the name of a metric of the kind "FD", "KID" or "IS".

        For FID's Inception it is "FID", "KID" or "IS"; for other networks "FD-ResNet56" and so on.
        """
        return "FID" if kind == "FD" and not self._suffix else kind + self._suffix

    @torch.inference_mode()
    def __call__(
        self, images: Tensor, *, resize: str = "lanczos", probabilities: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the features of images.

        Args:
            images: uint8 [N, C, H, W] on any device. Grey images are repeated to 3 channels.
            resize: Pillow filter (antialiased) for images that do not have this network's `resolution`.
            probabilities: whether to also return class probabilities, if the network has any.

        Returns:
            Features, float32 [N, D], and class probabilities, float32 [N, classes] or None, on this network's device.

        Raises:
            ValueError: if the images have any other dtype or shape.
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
        """Apply the network to two noise images, so that a wrong network fails now, not after an hour of sampling."""
        side = self.resolution or 32
        noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, side, side), dtype=np.uint8))
        try:
            features, probabilities = self(noise, probabilities=True)
        except Exception as error:  # a network may run any code
            raise ValueError(
                f"{self.source} cannot be applied to uint8 images [N, 3, {side}, {side}] "
                f"({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[-1][:500]}): "
                "see docs/evaluation.md"
            ) from error
        for what, values in (("features", features), ("class probabilities", probabilities)):
            if values is not None and (values.ndim != 2 or len(values) != 2):
                raise ValueError(
                    f"{self.source} makes {what} of shape {list(values.shape)} from 2 images; expected [2, D]"
                )
        return features, probabilities


def resized(images: Tensor, resolution: int, resize: str) -> Tensor:
    """Resize uint8 [N, C, H, W] images to squares with Pillow, whose filters are antialiased."""
    from PIL import Image

    def one(image: Image.Image) -> Tensor:
        pixels = np.asarray(image.resize((resolution, resolution), Image.Resampling[resize.upper()]))
        return torch.from_numpy(pixels.copy()).reshape(resolution, resolution, -1).permute(2, 0, 1)

    return torch.stack([one(image) for image in to_pil(images)])


def load_features(spec: str, *, device: torch.device | str = "cpu", cache_dir: str | Path | None = None) -> FeatureNet:
    """Load the feature network that a specification names.

    A TorchScript file is a program: only load files that you trust. Torch's global random generator is not used.

    Args:
        spec: "inception", "inception=PATH", "cifar10-resnet56=PATH", "digits", "pixels", "NAME=PATH" or "PATH"; see the
            top of this module.
        device: device on which to run.
        cache_dir: folder that holds the file for "inception". Default: see `spigan.files.cache_folder`.

    Raises:
        FileNotFoundError: if the file does not exist. The message states where to get it.
        ValueError: if the file is damaged, of the wrong kind, or holds a different network than its name promises.
    """
    name, separator, path = spec.partition("=")
    if not separator or user_path(spec).is_file():  # folders of studies have names such as r1_gamma=0.1
        name, path = ("", spec) if spec not in ("inception", RESNET56) else (spec, "")
    device = torch.device(device)
    if spec == "digits":
        sha256 = file_sha256(digits_net.WEIGHTS)
        network = digits_net.load_digits_net(device)
        return FeatureNet(network, "Digits", sha256, spec, digits_net.RESOLUTION, device)
    if spec == "pixels":
        sha256 = hashlib.sha256(b"8 x 8 grey").hexdigest()  # stands for the file that there is not
        return FeatureNet(digits_net.pooled_pixels, "pixels", sha256, spec, None, device)
    if name == "inception":
        return _inception(spec, user_path(path) if path else cache_folder(cache_dir) / INCEPTION_NAME, device)
    if name == RESNET56:
        return _resnet56(spec, path, device)
    file = user_path(path)
    if not file.is_file():
        known = f'"inception[=PATH]", "{RESNET56}=PATH", "digits", "pixels" or the PATH of a TorchScript network'
        raise FileNotFoundError(f"feature network {spec!r}: the file {path!r} does not exist; expected {known}")
    if not re.fullmatch(r"[\w.-]+", name or file.stem):
        raise ValueError(f"feature network {spec!r}: its name may only contain letters, digits, '.', '-' and '_'")
    if (name or file.stem).lower() in ("inception", "fid", INCEPTION_NAME.removesuffix(".pt")):
        raise ValueError(f"{name or file.stem!r} would be mistaken for FID's network: use inception={path}")
    script = _load_script(file, device)
    return FeatureNet(_script_network(script), name or file.stem, file_sha256(file), spec, None, device)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


# ---- TorchScript ----


def _load_script(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            # torch calls TorchScript deprecated, but FID's weights only exist in this form.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # torch's reader raises RuntimeError, IndexError, UnicodeDecodeError and others
        raise ValueError(
            f"{path} is damaged or not a TorchScript file ({_first_line(error)}): save the network, not only its "
            "weights, with torch.jit.script(network).save(PATH)"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]


def _script_network(script: Any) -> Network:
    """Wrap a TorchScript network that maps uint8 [N, 3, H, W] to features [N, D], or to (features, probabilities).

    If it has the argument `return_features`, as NVIDIA's feature networks do, the argument is set.
    """
    takes = {argument.name for argument in script.forward.schema.arguments}
    options = {"return_features": True} if "return_features" in takes else {}

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        result = script(images, **options)
        features, classes = result if isinstance(result, tuple) else (result, None)
        return features.flatten(1), classes if probabilities else None

    return network


def _inception(spec: str, path: Path, device: torch.device) -> FeatureNet:
    """Load NVIDIA's TorchScript translation of the Inception of 2015-12-05.

    The network itself resizes images to 299 x 299, bilinearly and without antialiasing, as in the definition of FID.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: FID needs the Inception network of 2015-12-05, a TorchScript file of 96 MB. "
            f"Download {INCEPTION_URL} and put it there, or use inception=PATH"
        )
    sha256 = file_sha256(path)
    if sha256 != INCEPTION_SHA256:
        raise ValueError(
            f"{path} is not {INCEPTION_NAME} (expected the sha256 {INCEPTION_SHA256[:12]}..., got {sha256[:12]}...): "
            f"download it again from {INCEPTION_URL}; FID is only defined with this file. To use another network, "
            "write NAME=PATH"
        )
    script = _load_script(path, device)
    # The Inception Score was published with a softmax without bias. It is computed here from the features, because the
    # network's own no_output_bias=True would compute the features a second time.
    weight = script.state_dict()["output.weight"].float()  # [1008, 2048]

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        features = script(images, return_features=True).float()
        return features, F.linear(features, weight).softmax(1) if probabilities else None

    return FeatureNet(network, None, sha256, spec, None, device)


def _resnet56(spec: str, path: str, device: torch.device) -> FeatureNet:
    file = user_path(path)
    if not path or not file.is_file():
        problem = f"{path} does not exist" if path else f"{spec!r} lacks the path of a file"
        raise FileNotFoundError(f"{problem}: use {RESNET56}=PATH with its safetensors file; {RESNET56_SOURCE}")
    network = load_resnet56(file, device)
    return FeatureNet(network, "ResNet56", file_sha256(file), spec, 32, device)
