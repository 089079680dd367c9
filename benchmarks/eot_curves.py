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
from typing import Any, NamedTuple

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import RT2, Dataset, Defense, RandomResizePad, load_defense
from atop_fast.attacks import APGD, PGD, GradientEstimator, counted_passes, draw_logits
from atop_fast.attacks.ball import per_image
from atop_fast.attacks.queue import State
from atop_fast.bench.plot import COLORS
from atop_fast.ops import pgd_step_linf
from atop_fast.randomness import derive_seed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import models

NAME, DRAWS = "eot-curves", 40
# In the order in which they are measured: those of quick and eot-fast, and those of 200 steps x 20 draws, come first.
PASSES = (80, 400, 4000, 40, 100, 1000)
CIFAR = "cifar10-rt2-at"
PICTURE = Path(__file__).parent.parent / "docs" / f"{NAME}.png"


class Weighted(PGD):
    """PGD with momentum whose draws count by sigmoid(log-odds of the label), which is the probability p_y.

    Draws that are already lost do not steer, as in DiffHammer (Wang et al., NeurIPS 2024):

        m <- momentum m + 1/n sum_i p_y,i g_i / mean|g_i|
    """

    def __init__(self, model: Defense, eps: float, passes: int, draws: int) -> None:
        super().__init__(model, eps=eps, steps=passes // draws, momentum=0.9, schedule="cosine")
        self.draws = draws

    def step(self, estimator: GradientEstimator, state: State) -> None:
        update = torch.zeros_like(state["x"])
        for draw in range(self.draws):
            found = estimator(state["x"], state["labels"], state["ids"], state["t"] * self.draws + draw)
            scale = found.gradient.flatten(1).abs().mean(dim=1).clamp_min(1e-30)
            update += per_image(torch.exp(-found.loss) / scale / self.draws) * found.gradient
        state["momentum"] = self.momentum * state["momentum"] + update
        state["x"] = pgd_step_linf(state["x"], state["momentum"], state["x0"], self._step_size(state), self.eps)
        state["best"] = state["x"]
        state["t"] += 1
        state["done"] |= state["t"] >= self.steps


class Schedule(NamedTuple):
    """The attack for so many passes an image, and between how many passes it is measured."""

    build: Callable[[Defense, float, int], Any]
    least: int = 40
    most: int = 400


def _pgd(draws: int, **options: Any) -> Callable[[Defense, float, int], PGD]:
    return lambda defense, eps, passes: PGD(defense, eps=eps, steps=passes // draws, eot_iter=draws, **options)


def _literature(defense: Defense, eps: float, passes: int) -> PGD:
    return PGD(defense, eps=eps, steps=passes // 20, eot_iter=20, alpha=0.22 * eps, random_start=False)


def _apgd(draws: int) -> Callable[[Defense, float, int], APGD]:
    return lambda defense, eps, passes: APGD(defense, eps=eps, steps=passes // draws - 1, eot_iter=draws)


STRONG = {"momentum": 0.9, "schedule": "cosine"}
# "quick" was 20 steps x 4 draws with constant steps, "pgd-eot" is 200 steps x 20 draws.
SCHEDULES = {
    "pgd-eot: constant 0.22 eps, 20 draws": Schedule(_literature, least=100, most=4000),
    "momentum, cosine, 1 draw": Schedule(_pgd(1, **STRONG), most=4000),
    "momentum, cosine, 4 draws": Schedule(_pgd(4, **STRONG), most=1000),
    "momentum, cosine, 20 draws": Schedule(_pgd(20, **STRONG), least=400, most=1000),
    "weighted by p_y, 1 draw": Schedule(lambda d, eps, n: Weighted(d, eps, n, 1)),
    "weighted by p_y, 4 draws": Schedule(lambda d, eps, n: Weighted(d, eps, n, 4)),
    "constant, 4 draws": Schedule(_pgd(4)),
    "autoattack-rand: APGD-CE, 20 draws": Schedule(_apgd(20), least=100),
    "APGD-CE, 4 draws": Schedule(_apgd(4), least=400),
}


class _Frame(nn.Module):
    """The middle of a larger image, at the classifier's size."""

    def __init__(self, classifier: nn.Module, size: int) -> None:
        super().__init__()
        self.classifier, self.size = classifier, size

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(nn.functional.interpolate(x, self.size, mode="bilinear", antialias=True))


def defenses(files: list[Path]) -> dict[str, tuple[Defense, float]]:
    """The random defenses by name, each with the radius at which attacks neither fail nor finish."""
    found: dict[str, tuple[Defense, float]] = {
        "resize and pad, robust MNIST": (
            Defense(RandomResizePad(28, 36), None, _Frame(models.robust_mnist(), 32)),
            0.2,
        ),
        "noise 0.25, robust MNIST": (Defense(RT2(4, mask_ratio=0.0, sigma=0.25), None, models.robust_mnist()), 0.1),
        CIFAR: (load_defense(CIFAR), 8 / 255),
    }
    return found | {file.stem: (load_defense(file), 0.25) for file in files}


def images(name: str) -> Dataset:
    """Images on which the defense of this name was not trained."""
    return models.cifar() if name == CIFAR else models.mnist()


def measured(defense: Defense, attack: Any, x: Tensor, y: Tensor) -> dict[str, Any]:
    begin = time.process_time()
    with counted_passes() as passes:
        adversarial = attack(x, y)
    seconds = time.process_time() - begin
    ids = torch.arange(len(x))
    with torch.no_grad():
        logits = draw_logits(defense, adversarial, derive_seed(0, "verdict"), ids, range(DRAWS))
    right = (logits.argmax(dim=2) == y[:, None]).sum(dim=1)
    return {
        "accuracy": round(float(right.double().mean()) / DRAWS, 4),
        "standard error": round(float(right.double().std()) / DRAWS / math.sqrt(len(x)), 4),
        "backward passes an image": passes.backward // len(x),
        "processor seconds": round(seconds, 1),
        f"right of {DRAWS} draws": right.tolist(),
    }


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against passes: a panel for each defense, a line for each schedule."""
    import matplotlib.figure

    names = list(dict.fromkeys(row["defense"] for row in rows))
    figure = matplotlib.figure.Figure(figsize=(3.4 * len(names), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for schedule, color in zip(SCHEDULES, (*COLORS, "#f0e442"), strict=True):
            line = [row for row in rows if (row["defense"], row["schedule"]) == (name, schedule)]
            line.sort(key=lambda row: row["passes"])
            axes.plot(
                [r["passes"] for r in line], [r["accuracy"] for r in line], "o-", color=color, label=schedule, ms=3
            )
        axes.set_xscale("log")
        axes.set_xlabel("passes an image")
        axes.set_title(f"{name}, eps {next(row['eps'] for row in rows if row['defense'] == name)}", fontsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"accuracy, mean of {DRAWS} fresh draws")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of save_defense, such as the demo's; eps 0.25")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--passes", type=int, nargs="*", default=list(PASSES), choices=PASSES)
    parser.add_argument("--only", default="", help="a part of the name of the defenses that are attacked")
    parser.add_argument("--schedule", default="", help="a part of the names of the schedules that are measured")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    path = args.out / f"{NAME}--cpu.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(row["defense"], row["schedule"], row["passes"], row["images"]) for row in rows}
    chosen = {name: found for name, found in defenses(args.files).items() if args.only in name}
    for passes in args.passes:
        for name, (defense, eps) in chosen.items():
            data = images(name).take(slice(0, args.images))
            for title, schedule in SCHEDULES.items():
                key = (name, title, passes, len(data.images))
                if key in done or args.schedule not in title or not schedule.least <= passes <= schedule.most:
                    continue
                rows.append(
                    dict(zip(("defense", "schedule", "passes", "images"), key, strict=True)) | {"eps": round(eps, 4)}
                )
                attack = schedule.build(defense.eval(), eps, passes)
                rows[-1] |= measured(defense, attack, data.images, data.labels)
                print(*list(rows[-1].values())[:-1], sep="  ", flush=True)
                about = {**metadata("cpu"), "command": "python benchmarks/eot_curves.py"}
                write(NAME, "cpu", args.out, {**about, "rows": rows})
    print_table([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows])
    picture(rows, args.picture)


if __name__ == "__main__":
    main()
