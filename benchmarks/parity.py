"""AutoAttack "fast" against pyautoattack's "standard", model by model: python benchmarks/parity.py --help

The models include hard cases for a fast attack: masked gradients, quantized pixels, a network distilled at a high
temperature, one whose logits are multiplied by 100, a ViT. A row is written as soon as it is measured, and a stopped
run resumes after the last row.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _results import RESULTS, metadata, print_table, write
from pyautoattack.autoattack import AutoAttack as Original
from torch import Tensor, nn

from atop_fast import build_classifier
from atop_fast.attacks import AutoAttack, counted_passes
from atop_fast.attacks.autoattack import REST
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
    """Pixels quantized to a number of levels, with a straight-through gradient."""

    def __init__(self, model: nn.Module, levels: int) -> None:
        super().__init__()
        self.model, self.levels = model, levels

    def forward(self, x: Tensor) -> Tensor:
        rounded = (x * self.levels).round() / self.levels
        return self.model(x + (rounded - x).detach())


class Masked(nn.Module):
    """A sigmoid in front, so steep that its gradient vanishes in float32 nearly everywhere."""

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


class SmallViT(nn.Module):
    """Three transformer blocks over 8x8 patches of digits."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 8, stride=8)
        self.places = nn.Parameter(torch.randn(16, width) / 8)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT + self.places).mean(dim=1))


def trained(build: Callable[[], nn.Module], temperature: float = 1.0) -> nn.Module:
    """A network trained for some epochs on digits other than the attacked ones."""
    data = models.all_digits().split(4000, seed=0)[0]
    with seeded(0):
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(5):
            for rows in torch.randperm(len(data.labels)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(data.images[rows]) / temperature, data.labels[rows]).backward()
                optimizer.step()
    return model.eval()


# (norm, eps) and the model of every row.
CASES: dict[str, tuple[str, float, Callable[[], nn.Module]]] = {
    "robust MNIST": ("Linf", 0.2, models.robust_mnist),
    "robust MNIST, L2": ("L2", 1.5, models.robust_mnist),
    "robust CIFAR ResNet": ("Linf", 8 / 255, models.robust_cifar),
    "robust MNIST, masked by a steep sigmoid": ("Linf", 0.2, lambda: Masked(models.robust_mnist())),
    "robust MNIST, 8 levels a pixel": ("Linf", 0.2, lambda: Quantized(models.robust_mnist(), 7)),
    "distilled at temperature 50": (
        "Linf",
        0.05,
        lambda: trained(lambda: build_classifier("small_cnn", channels=1), 50.0),
    ),
    "robust MNIST, logits x 100": ("Linf", 0.2, lambda: Scaled(models.robust_mnist(), 100.0)),
    "ViT on digits": ("Linf", 0.03, lambda: trained(SmallViT)),
    "robust MNIST, beyond its training": ("Linf", 0.3, models.robust_mnist),
    "robust MNIST, logits / 100": ("Linf", 0.2, lambda: Scaled(models.robust_mnist(), 0.01)),
    "standard MNIST": ("Linf", 0.05, models.standard_mnist),
    "robust CIFAR ResNet, L2": ("L2", 0.5, models.robust_cifar),
    "robust MNIST, L1": ("L1", 10.0, models.robust_mnist),
}


def measured(name: str, count: int, settings: dict[str, int]) -> dict[str, Any]:
    """The verdicts on one model, in seconds of processor time: other work on the machine does not count."""
    norm, eps, build = CASES[name]
    data = (models.cifar() if "CIFAR" in name else models.mnist()).take(slice(0, count))
    x, y, model = data.images, data.labels, build()
    row: dict[str, Any] = {"model": name, "norm": norm, "eps": round(eps, 4), "images": count, **settings}
    counted = Counted(model)
    begin = time.process_time()
    left = _right(model, _standard(counted, norm, eps, settings)(x, y), y)
    row |= _columns("standard", left, time.process_time() - begin, counted.forwards + counted.backwards)
    begin = time.process_time()
    with counted_passes() as passes, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        fast = AutoAttack(model, norm, eps, version="fast", **settings)
        ours = _right(model, fast(x, y), y)
        row |= _columns("fast", ours, time.process_time() - begin, passes.forward + passes.backward)
        row |= {"left by fast alone": int((ours & ~left).sum()), "left by standard alone": int((left & ~ours).sum())}
        row["doubt"] = fast.in_doubt
        if fast.in_doubt:
            # The attacks that complete="auto" adds, with the same seeds.
            ids = ours.nonzero()[:, 0]
            rest = AutoAttack(model, norm, eps, version="custom", attacks_to_run=REST, **settings)
            ours[ids] = _right(model, rest(x[ids], y[ids], ids), y[ids])
        row |= _columns("auto", ours, time.process_time() - begin, passes.forward + passes.backward)
    for title in ("fast", "auto"):
        row[f"{title} x"] = round(row["standard s"] / max(row[f"{title} s"], 0.01), 1)
    return row


def _standard(model: nn.Module, norm: str, eps: float, settings: dict[str, int]) -> Callable[[Tensor, Tensor], Tensor]:
    theirs = Original(model, norm=norm, eps=eps, seed=0)
    n = settings["steps"]
    for apgd in (theirs.apgd, theirs.apgd_targeted):
        # Its checkpoints come from the number of steps that it was built with.
        apgd.n_iter = apgd.n_iter_orig = n
        shares = {"n_iter_2": 0.22, "n_iter_min": 0.06, "size_decr": 0.03}
        vars(apgd).update({name: max(int(share * n), 1) for name, share in shares.items()})
    theirs.fab.n_iter, theirs.square.n_queries = n, settings["n_queries"]

    def attacked(x: Tensor, y: Tensor) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()):
            return theirs.run_standard_evaluation(x, y, batch_size=256)[0]

    return attacked


def _columns(title: str, left: Tensor, seconds: float, passes: int) -> dict[str, Any]:
    return {title: round(float(left.double().mean()), 4), f"{title} s": round(seconds, 2), f"{title} passes": passes}


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(dim=1) == y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100, help="of every attack, on both sides")
    parser.add_argument("--queries", type=int, default=5000, help="of Square, on both sides")
    parser.add_argument("--only", default="", help="a part of the names of the models that are attacked")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    settings = {"steps": args.steps, "n_queries": args.queries}
    path = args.out / f"{NAME}--cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(row["model"], row["images"], row["steps"], row["n_queries"]) for row in rows}
    for name in CASES:
        if args.only not in name or (name, args.images, *settings.values()) in done:
            continue
        rows.append(measured(name, args.images, settings))
        print(*rows[-1].items(), sep="  ", flush=True)
        write(NAME, "cpu", args.out, {**metadata("cpu"), "command": "python benchmarks/parity.py", "rows": rows})
    print_table(rows)


if __name__ == "__main__":
    main()
