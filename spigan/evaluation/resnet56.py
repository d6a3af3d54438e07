"""The ResNet-56 for CIFAR-10 (He et al. 2015), a small feature network for images of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.models.pretrained import load_weights


class _BatchNorm(nn.Module):
    """nn.BatchNorm2d in eval mode, without the batch counter."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)  # type: ignore[arg-type]


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (He et al. 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = _BatchNorm(outputs)
        self.stride, self.padding = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:  # take every second pixel; pad the channels with zeros on both sides
            half = self.padding // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.padding - half))
        return F.relu(y + x)


class ResNet56(nn.Module):
    """ResNet-56 for 32 x 32 images (He et al. 2015, section 4.2): 3 stages of 9 blocks with 16, 32 and 64 channels."""

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
        """Map uint8 RGB [N, 3, 32, 32] to features [N, 64] (global average pooling) and class probabilities [N, 10]."""
        mean, std = images.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)
        x = (images.float() / 255.0 - mean[:, None, None]) / std[:, None, None]
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        features = x.mean((2, 3))
        return features, self.linear(features).softmax(1)


def load_resnet56(file: Path, device: torch.device) -> Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]:
    """Load the weights from a safetensors file, and return the network in the form that `FeatureNet` takes.

    Raises:
        ValueError: if the file is damaged, or holds unexpected tensors.
    """
    with torch.device("meta"):  # uses no memory and no random numbers for weights that will be replaced
        resnet = ResNet56()
    resnet = resnet.to_empty(device="cpu")
    load_weights(resnet, file)
    resnet = resnet.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    # On a CPU, the activations of 64 images stay in the cache: 666 images/s, instead of 498 with 256 images (one thread
    # of an AVX-512 server CPU, PyTorch 2.13, 2026-11-25).
    rows = 64 if device.type == "cpu" else 4096

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        features, classes = zip(*(resnet(part) for part in images.split(rows)), strict=True)
        return torch.cat(features), torch.cat(classes) if probabilities else None

    return network
