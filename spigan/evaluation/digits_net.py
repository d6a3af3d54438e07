"""A small classifier of scikit-learn's digits: features and class probabilities for images of digits, bundled.

`benchmarks/train_digits_net.py` trains it and writes the weights; docs/evaluation.md gives its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spigan.models.pretrained import load_weights

WEIGHTS = Path(__file__).parents[1] / "assets" / "feature_nets" / "digits.safetensors"
RESOLUTION = 16


class DigitsNet(nn.Module):
    """Three convolutions and two linear layers for grey images of 16 x 16 pixels, 22,954 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32 * 2 * 2, 64)
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map uint8 [N, 3, 16, 16] images, or [N, 1, 16, 16], to features [N, 64] and logits of the classes [N, 10].

        The features are the last layer's inputs without their activation, so that few of them are constant.
        """
        x = images.float().mean(1, keepdim=True) / 127.5 - 1
        for convolution in (self.conv1, self.conv2, self.conv3):
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        features = self.linear(x.flatten(1))
        return features, self.classes(F.relu(features))


def load_digits_net(device: torch.device) -> Callable[[Tensor, bool], tuple[Tensor, Tensor | None]]:
    """Load the bundled weights, and return the network in the form that `FeatureNet` takes."""
    with torch.device("meta"):  # uses no memory and no random numbers for weights that will be replaced
        net = DigitsNet()
    net = net.to_empty(device="cpu")
    load_weights(net, WEIGHTS)
    net = net.eval().requires_grad_(False).to(device)

    def network(images: Tensor, probabilities: bool) -> tuple[Tensor, Tensor | None]:
        features, logits = net(images)
        return features, logits.softmax(1) if probabilities else None

    return network


def pooled_pixels(images: Tensor, probabilities: bool) -> tuple[Tensor, None]:
    """Average uint8 [N, 3, H, W] images to 8 x 8 grey pixels, in the form that `FeatureNet` takes: features [N, 64]."""
    grey = images.float().mean(1, keepdim=True) / 127.5 - 1
    return F.adaptive_avg_pool2d(grey, 8).flatten(1), None
