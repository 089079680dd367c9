"""AutoAttack "fast" against pyautoattack's "standard", model by model: python benchmarks/parity.py --help

The models include hard cases for a fast attack: masked gradients, quantized pixels, a network distilled at a high
temperature, one whose logits are multiplied by 100, a ViT. A row is written as soon as it is measured, and a stopped
run resumes after the last row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyautoattack.autoattack
import torch
import torch.nn.functional as F
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import build_classifier
from atop_fast.attacks import AutoAttack, counted_passes
from atop_fast.randomness import seeded

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import models

NAME = "parity"


class Scaled(nn.Module):
    """Logits times a number: a softmax without a gradient, as after distillation, or a flat one."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


class Quantized(nn.Module):
    """Pixels of so many levels; the gradient passes as through the identity."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return self.model(x + (rounded - x).detach())


class Masked(nn.Module):
    """A sigmoid so steep in front that its gradient vanishes in float32 nearly everywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(torch.sigmoid(60 * (x - 0.5)))


class Counted(nn.Module):
    """Counts the rows that go forward and backward through a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits = self.model(x)
        if logits.requires_grad:
            logits.register_hook(lambda g: setattr(self, "backwards", self.backwards + len(g)))
        return logits


def trained(kind: str, temperature: float = 1.0) -> nn.Module:
    """A network trained for some epochs on digits that the attacked ones are not among."""
    data = models.all_digits().split(4000, seed=0)[0]
    with seeded(0):
        model = (
            build_classifier(kind, channels=1)
            if kind == "small_cnn"
            else build_classifier(kind, channels=1, patch_size=4, image_size=32)
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(6):
            for rows in torch.randperm(len(data.labels)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(data.images[rows]) / temperature, data.labels[rows]).backward()
                optimizer.step()
    return model.eval()


# (norm, eps) and the model of every row.
CASES: dict[str, tuple[str, float, Callable[[], nn.Module]]] = {
    "robust CIFAR ResNet": ("Linf", 8 / 255, models.robust_cifar),
    "robust CIFAR ResNet, L2": ("L2", 0.5, models.robust_cifar),
    "robust MNIST": ("Linf", 0.2, models.robust_mnist),
    "robust MNIST, beyond its training": ("Linf", 0.3, models.robust_mnist),
    "robust MNIST, L2": ("L2", 1.5, models.robust_mnist),
    "robust MNIST, L1": ("L1", 10.0, models.robust_mnist),
    "standard MNIST": ("Linf", 0.05, models.standard_mnist),
    "robust MNIST, logits x 100": ("Linf", 0.2, lambda: Scaled(models.robust_mnist(), 100.0)),
    "robust MNIST, logits / 100": ("Linf", 0.2, lambda: Scaled(models.robust_mnist(), 0.01)),
    "robust MNIST, 8 levels a pixel": ("Linf", 0.2, lambda: Quantized(models.robust_mnist(), 7)),
    "robust MNIST, masked by a steep sigmoid": ("Linf", 0.2, lambda: Masked(models.robust_mnist())),
    "distilled at temperature 50": ("Linf", 0.05, lambda: trained("small_cnn", 50.0)),
    "ViT on digits": ("Linf", 0.03, lambda: trained("vit_tiny")),
}


def measured(name: str, count: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Both verdicts on one model."""
    norm, eps, build = CASES[name]
    data = (models.cifar() if "CIFAR" in name else models.mnist()).take(slice(0, count))
    x, y = data.images, data.labels
    model = Counted(build())
    begin = time.monotonic()
    theirs = pyautoattack.autoattack.AutoAttack(model, norm=norm, eps=eps, seed=0, verbose=False)
    for apgd in (theirs.apgd, theirs.apgd_targeted):
        if settings["steps"] != 100:
            # Its checkpoints come from the number of steps that it was built with.
            n = settings["steps"]
            apgd.n_iter, apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (
                n,
                max(n // 5, 1),
                max(n // 16, 1),
                max(n // 33, 1),
            )
    theirs.fab.n_iter, theirs.square.n_queries = settings["steps"], settings["queries"]
    adversarial = theirs.run_standard_evaluation(x, y, batch_size=64)[0]
    row: dict[str, Any] = {"model": name, "norm": norm, "eps": round(eps, 4), "images": count, **settings}
    row |= {"standard": _accuracy(model, adversarial, y), "standard s": round(time.monotonic() - begin, 1)}
    row |= {"standard passes": model.forwards + model.backwards}
    for title, complete in (("fast", False), ("fast, complete", True)):
        begin = time.monotonic()
        with counted_passes() as passes:
            ours = AutoAttack(
                model.model,
                norm,
                eps,
                version="fast",
                steps=settings["steps"],
                n_queries=settings["queries"],
                complete=complete,
            )
            adversarial = ours(x, y)
        seconds = time.monotonic() - begin
        row |= {title: _accuracy(model, adversarial, y), f"{title} s": round(seconds, 1)}
        row |= {f"{title} passes": passes.forward + passes.backward}
        row |= {f"{title} faster": round(row["standard s"] / seconds, 1)}
    return row


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return round(float((model(x).argmax(dim=1) == y).double().mean()), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="of every attack, on both sides")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, on both sides")
    parser.add_argument("--only", default="", help="a part of the names of the models that are attacked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"steps": args.steps, "queries": args.queries}
    path = args.out / f"{NAME}--cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(row["model"], row["images"], row["steps"], row["queries"]) for row in rows}
    for name in CASES:
        if args.only not in name or (name, args.images, *settings.values()) in done:
            continue
        rows.append(measured(name, args.images, settings))
        print(*rows[-1].items(), sep="  ", flush=True)
        write(NAME, "cpu", args.out, {**metadata("cpu"), "command": "python benchmarks/parity.py", "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    main()
