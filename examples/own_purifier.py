"""A purifier of your own: any module from [masked image in [-1, 1], ones, mask] to images in [-1, 1].

It trains, is attacked and is evaluated as ours are. Registered by name, its files load by it, too.
"""

from __future__ import annotations

import torch
from digits import FOLDER, arguments, classifier, digits
from torch import Tensor, nn

import atop_fast as atop

EPS = 0.25


class Denoiser(nn.Module):
    """Three convolutions that correct the masked image.

    Args:
        channels: channels C of the images.
        width: channels between the convolutions.
    """

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels + 2, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, width, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(width, channels, 5, padding=2),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C + 2, H, W) -> images (B, C, H, W) in (-1.02, 1.02)."""
        # Slightly wider than [-1, 1], so that black pixels do not end in saturation.
        return 1.02 * torch.tanh(2 * x[:, : self.channels] + self.layers(x))


def main() -> None:
    """Register, train, save, load, evaluate."""
    args = arguments(__doc__)
    train, test = digits(args.quick)
    atop.purifiers.PURIFIERS["denoiser"] = Denoiser

    options = {"channels": 1, "width": 4 if args.quick else 16}
    purifier = atop.build_purifier("denoiser", **options)
    transform = atop.RT2(patch=4, sigma=0.25)
    config = atop.PretrainConfig(epochs=1 if args.quick else 3, batch_size=32, lr=2e-3, gan_weight=0)
    atop.pretrain(purifier, transform, train.images, config=config)
    path = FOLDER / "denoiser.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    atop.save_model(path, purifier, "purifier", "denoiser", **options)

    defense = atop.Defense(transform, atop.load_model(path), classifier(train, args.quick)).eval()
    attack = atop.PGD(defense, eps=EPS, steps=2 if args.quick else 80, momentum=0.9, schedule="cosine")
    report = atop.evaluate(defense, test.images, test.labels, eps=EPS, attacks={"pgd": attack})
    low, high = report.robust.mean_ci
    print(f"clean {report.clean.mean:.3f}, robust {report.robust.mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
