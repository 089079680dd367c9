"""Your own classifier and its checkpoint, trained elsewhere on normalized images, behind a random transform.

Two things go wrong most often, and the doctor finds both: images normalized twice or not at all, and a model left in
training mode.
"""

from __future__ import annotations

import torch
from digits import FOLDER, arguments, digits
from torch import Tensor, nn

import atop_fast as atop
from atop_fast.classifiers import Normalized
from atop_fast.doctor import check_contract, format_findings

MEAN, STD = (0.13,), (0.31,)


class TheirNetwork(nn.Module):
    """A network as another project has it: it expects normalized images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.linear = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).amax(dim=(2, 3)))


def main() -> None:
    """Load the checkpoint, check the contract, evaluate."""
    args = arguments(__doc__, checkpoint="state dict of TheirNetwork; by default one is trained first")
    train, test = digits(args.quick)
    network = TheirNetwork()
    # The normalization of the network's training goes inside: the library's images are in [0, 1].
    model = Normalized(network, MEAN, STD)
    checkpoint = args.checkpoint or FOLDER / "theirs.pt"
    if not checkpoint.exists():
        config = atop.ClassifierConfig(epochs=1 if args.quick else 10)
        atop.train_classifier(model, train.images, train.labels, config=config)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(network.state_dict(), checkpoint)
    network.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    model.eval()

    print(format_findings(check_contract(model, test.images, test.labels)))
    defense = atop.Defense(atop.RT1(patch=4, mask_ratio=0.25), None, model)
    attack = atop.PGD(defense, eps=0.1, steps=2 if args.quick else 80, momentum=0.9, schedule="cosine")
    report = atop.evaluate(defense, test.images, test.labels, eps=0.1, attacks={"pgd": attack})
    low, high = report.robust.mean_ci
    print(f"clean {report.clean.mean:.3f}, robust {report.robust.mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
