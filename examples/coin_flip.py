"""A coin among classifiers: how the rules by which random defenses are judged can go wrong.

The coin looks at no image. It answers correctly in 90 % of its calls, so that no attack can make it better or worse,
and its robust accuracy is 0.9 by definition. AutoAttack's rule, one wrong draw and an image is lost, calls it weaker
the more attacks it meets; a verdict from fresh draws says 0.9. `--json FILE` writes what docs/evaluation.md shows.
"""

from __future__ import annotations

import json

import torch
from digits import arguments
from torch import Tensor, nn

import atop_fast as atop

RIGHT = 0.9


class Coin(nn.Module):
    """Right, which is class 0, with probability RIGHT in every call, whatever the image."""

    def forward(self, x: Tensor) -> Tensor:
        lucky = (torch.rand(len(x), device=x.device) < RIGHT).float()
        logits = torch.stack((lucky, 1 - lucky, -torch.ones_like(lucky), -2 * torch.ones_like(lucky)), dim=1)
        # Attach the logits to the images; the gradient is 0.
        return logits + 0 * x.flatten(1).sum(dim=1, keepdim=True)


def autoattack(images: Tensor, labels: Tensor, version: str) -> dict[str, float]:
    """The accuracy after each attack of AutoAttack, by its own rule."""
    torch.manual_seed(0)
    # Longer attacks would change nothing: there is nothing to find.
    attack = atop.AutoAttack(Coin(), version=version, steps=2, n_queries=8)
    attack.run_standard_evaluation(images, labels)
    return attack.accuracy


def sound(images: Tensor, labels: Tensor, draws: int) -> dict[str, object]:
    """The same attacks, judged by draws that none of them has seen."""
    coin, options = Coin(), {"eps": 8 / 255, "steps": 2}
    attacks = {
        "apgd-ce": atop.APGD(coin, loss="ce", **options),
        "apgd-t": atop.APGDT(coin, **options),
        "fab-t": atop.FAB(coin, **options),
        "square": atop.Square(coin, eps=8 / 255, n_queries=8),
    }
    report = atop.evaluate(coin, images, labels, attacks=attacks, draws=draws, progress=False)
    return {
        "mean": report.robust.mean,
        "mean_ci": list(report.robust.mean_ci),
        "single_draw": report.emulated["single_draw"]["accuracy"],
    }


def main() -> None:
    """Print the verdict of each rule."""
    args = arguments(__doc__, json="file for the results")
    count = 100 if args.quick else 1000
    images, labels = torch.full((count, 1, 4, 4), 0.5), torch.zeros(count, dtype=torch.int64)
    results = {
        "right": RIGHT,
        "images": count,
        "draws": 20,
        "autoattack": {version: autoattack(images, labels, version) for version in ("rand", "standard")},
        "evaluate": sound(images, labels, 20),
    }
    for version, accuracy in results["autoattack"].items():
        print(f"AutoAttack {version:8}", "  ".join(f"{name} {value:.2f}" for name, value in accuracy.items()))
    low, high = results["evaluate"]["mean_ci"]
    print(f"evaluate            {results['evaluate']['mean']:.2f}, 95 % interval [{low:.2f}, {high:.2f}]")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
