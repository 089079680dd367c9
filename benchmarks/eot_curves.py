"""Robust accuracy of random defenses against the passes that PGD spends: python benchmarks/eot_curves.py --help

Every row is a schedule, a split of the passes into steps and draws per step; the verdict is the mean over fresh draws.
A row is written as soon as it is measured, and a stopped run resumes after the last row.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import RT2, Defense, RandomResizePad, load_model, mnist5k
from atop_fast.attacks import APGD, PGD, counted_passes, draw_logits
from atop_fast.randomness import derive_seed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import models

NAME, EPS, PASSES, DRAWS = "eot-curves", 0.25, (40, 100, 400, 1000, 4000), 40
STRONG = {"momentum": 0.9, "schedule": "cosine"}
# Names of schedules, each with the attack for a number of passes per image; None if they cannot be split this way.
SCHEDULES: dict[str, Callable[[Defense, int], Any]] = {
    "momentum, cosine, 1 draw": lambda d, n: _pgd(d, n, 1, **STRONG),
    "momentum, cosine, 4 draws": lambda d, n: _pgd(d, n, 4, **STRONG),
    "momentum, cosine, 20 draws": lambda d, n: _pgd(d, n, 20, **STRONG),
    "cosine, 1 draw": lambda d, n: _pgd(d, n, 1, schedule="cosine"),
    "constant, 4 draws": lambda d, n: _pgd(d, n, 4),
    "pgd-eot: constant 0.22 eps, 20 draws": lambda d, n: _pgd(d, n, 20, alpha=0.22 * EPS, random_start=False),
    "autoattack-rand: APGD-CE, 20 draws": lambda d, n: (
        APGD(d, eps=EPS, steps=n // 20 - 1, eot_iter=20) if n >= 100 else None
    ),
}


def _pgd(defense: Defense, passes: int, draws: int, **options: Any) -> PGD:
    return PGD(defense, eps=EPS, steps=passes // draws, eot_iter=draws, **options)


class _Frame(nn.Module):
    """The middle of a larger image, at the classifier's size."""

    def __init__(self, classifier: nn.Module, size: int) -> None:
        super().__init__()
        self.classifier, self.size = classifier, size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True))


def defenses(runs: list[Path]) -> dict[str, Defense]:
    """The random defenses by name: those of the demo's runs, and two that need no training."""
    found: dict[str, Defense] = {}
    for run in runs:
        classifier = load_model(run / "classifier.safetensors", "classifier")
        transform = RT2(patch=4, sigma=0.25)
        for name in ("pretrained", "finetuned"):
            purifier = load_model(run / f"{name}.safetensors", "purifier")
            found[f"{run.name}: {name}"] = Defense(transform, purifier, classifier)
        found[f"{run.name}: rt_only"] = Defense(transform, None, classifier)
    found["resize and pad, robust MNIST"] = Defense(RandomResizePad(28, 36), None, _Frame(models.robust_mnist(), 32))
    found["noise 0.25, robust MNIST"] = Defense(RT2(4, mask_ratio=0.0, sigma=0.25), None, models.robust_mnist())
    return found


def measured(defense: Defense, attack: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    begin = time.monotonic()
    with counted_passes() as passes:
        adversarial = attack(x, y)
    seconds = time.monotonic() - begin
    ids = torch.arange(len(x))
    with torch.no_grad():
        logits = draw_logits(defense, adversarial, derive_seed(0, "verdict"), ids, range(DRAWS))
    right = (logits.argmax(dim=2) == y[:, None]).double().mean(dim=1)
    return {
        "accuracy": round(float(right.mean()), 4),
        "standard error": round(float(right.std()) / math.sqrt(len(x)), 4),
        "backward passes an image": passes.backward // len(x),
        "seconds": round(seconds, 2),
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against passes, a panel for each defense, a line for each schedule, as SVG."""
    names = list(dict.fromkeys(row["defense"] for row in rows))
    colors = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#999999", "#000000", "#cc79a7")
    width, height, left, top = 300, 230, 40, 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(names)}" '
        f'height="{height + 20 * len(SCHEDULES) + 16}" font-family="sans-serif" font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>'
    ]
    low, high = math.log10(PASSES[0]), math.log10(PASSES[-1])
    for panel, name in enumerate(names):
        most = max(row["accuracy"] for row in rows if row["defense"] == name)
        x0 = panel * width + left
        parts.append(f'<text x="{x0}" y="14">{name}</text><text x="{x0 - 34}" y="{top + 8}">{most:.2f}</text>')
        parts.append(f'<text x="{x0 - 34}" y="{height - 30}">0.00</text>')
        parts.append(f'<path d="M{x0} {top}V{height - 30}H{x0 + width - 60}" fill="none" stroke="#444"/>')

        def place(row: dict[str, Any], x0: int = x0, most: float = most) -> tuple[float, float]:
            share = (math.log10(row["passes"]) - low) / (high - low)
            return x0 + 4 + share * (width - 70), height - 30 - row["accuracy"] / max(most, 1e-9) * (height - 30 - top)

        for passes in PASSES:
            at = place({"passes": passes, "accuracy": 0.0})[0]
            parts.append(f'<text x="{at:.0f}" y="{height - 16}" text-anchor="middle">{passes}</text>')
        for schedule, color in zip(SCHEDULES, colors, strict=True):
            points = [place(row) for row in rows if (row["defense"], row["schedule"]) == (name, schedule)]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(points))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    for number, (schedule, color) in enumerate(zip(SCHEDULES, colors, strict=True)):
        at = height + 20 * number + 8
        parts.append(
            f'<path d="M12 {at - 4}h24" stroke="{color}" stroke-width="2"/><text x="42" y="{at}">{schedule}</text>'
        )
    path.write_text("".join(parts) + "</svg>\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders that `atop-fast demo` has left")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--passes", type=int, nargs="*", default=list(PASSES), choices=PASSES)
    parser.add_argument("--only", default="", help="a part of the name of the defenses that are attacked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = mnist5k().split(4000, seed=0)[1].take(slice(0, args.images))
    path = args.out / f"{NAME}--cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(row["defense"], row["schedule"], row["passes"], row["images"]) for row in rows}
    for name, defense in defenses(args.runs).items():
        if args.only not in name:
            continue
        for passes in args.passes:
            for schedule, build in SCHEDULES.items():
                key = (name, schedule, passes, len(data.images))
                if key in done or (attack := build(defense.eval(), passes)) is None:
                    continue
                rows.append(dict(zip(("defense", "schedule", "passes", "images"), key, strict=True)))
                rows[-1] |= measured(defense, attack, data.images, data.labels)
                print(*rows[-1].values(), sep="  ", flush=True)
                write(
                    NAME,
                    "cpu",
                    args.out,
                    {**metadata("cpu"), "command": "python benchmarks/eot_curves.py", "rows": rows},
                )
    print_table(rows)
    picture(rows, args.out / f"{NAME}.svg")


if __name__ == "__main__":
    main()
