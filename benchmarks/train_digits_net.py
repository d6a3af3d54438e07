"""Train the bundled classifier of digits, `--features digits`: python benchmarks/train_digits_net.py [OUT].

Holds out every fifth image for the accuracy that it prints, then trains again on all of them and writes the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from spigan.data import DataConfig
from spigan.data.dataset import open_dataset
from spigan.evaluation.digits_net import RESOLUTION, WEIGHTS, DigitsNet
from spigan.files import atomic_path

EPOCHS, BATCH = 60, 64


def augmented(images: Tensor) -> Tensor:
    """Rotate, scale and shift images [N, 1, H, W] at random, by up to 12 degrees, 10 % and 1.5 pixels."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * 0.2
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * (3 / RESOLUTION)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    matrix = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    """Train a network on uint8 images [N, 1, 16, 16] and their labels."""
    torch.manual_seed(0)
    net = DigitsNet().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images))[: len(images) // BATCH * BATCH].split(BATCH):
            _, logits = net(augmented(images[rows].float()))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def main() -> None:
    dataset = open_dataset(DataConfig(source="digits", resolution=RESOLUTION))
    images = torch.stack([dataset[i] for i in range(len(dataset))])
    labels = torch.from_numpy(load_digits().target)
    test = torch.arange(len(images)) % 5 == 0
    net = train(images[~test], labels[~test])
    with torch.inference_mode():
        right = net(images[test])[1].argmax(1) == labels[test]
    print(f"trained on {int((~test).sum())} images: {int(right.sum())} of {int(test.sum())} others classified right")
    net = train(images, labels)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as scratch:
        save_file(net.state_dict(), scratch)
    print(f"wrote {out}, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
