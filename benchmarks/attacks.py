"""Attacks end to end against torchattacks and pyautoattack, at equal work: python benchmarks/attacks.py --help

Beside every time stands what was found: accuracy under the attack, and how many images the two judge alike.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _harness
import torch
from torch import Tensor, nn

import atop_fast as atop
from atop_fast.attacks import PGD, AutoAttack, counted_passes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
EPS = 8 / 255
PEERS = ("torchattacks", "pyautoattack")


@dataclass
class Contest:
    """Attacks on the same images of the same model; the first is the peer."""

    case: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    run: dict[str, Callable[[], Tensor]]
    rounds: int = 5


def pgd10(cifar: Path) -> Iterator[Contest]:
    """Ten steps of PGD on a CIFAR ResNet-18, no image leaves."""
    import torchattacks

    model, x, y = _standard_cifar(cifar, 64)
    step = {"eps": EPS, "alpha": 2 / 255, "steps": 10, "random_start": False}
    run = {
        "torchattacks": _theirs(torchattacks.PGD(model, **step), x, y),
        "float32": _ours(PGD(model, **step), x, y),
        "bfloat16": _ours(PGD(model, **step, precision="bfloat16"), x, y),
    }
    yield Contest("PGD-10, ResNet-18, B=64", model, x, y, run)


def pgd100(cifar: Path) -> Iterator[Contest]:
    """A hundred steps to a verdict on an adversarially trained model: fooled images leave."""
    import torchattacks

    model, x, y = _robust_cifar(cifar, 512)
    step = {"eps": EPS, "alpha": 2 / 255, "steps": 100, "random_start": False}
    run = {
        "torchattacks": _theirs(torchattacks.PGD(model, **step), x, y, batch=64),
        "float32": _ours(PGD(model, **step, early_stop=True), x, y),
    }
    yield Contest("PGD-100 to a verdict, 512 images", model, x, y, run, rounds=3)


def eot(cifar: Path) -> Iterator[Contest]:
    """PGD-20 with 20 draws a step, through RT2, the 32x32 U-Net and a ResNet-18."""
    import torchattacks

    classifier, x, y = _standard_cifar(cifar, 8)
    with atop.randomness.seeded(0):
        purifier = atop.build_purifier("unet", channels=3, width=24).eval()
        nn.init.normal_(purifier.to_image.weight, std=0.02)
    defense = atop.Defense(atop.RT2(4, sigma=0.1), purifier, classifier).eval()
    step = {"eps": EPS, "alpha": 2 / 255, "steps": 20, "eot_iter": 20, "random_start": False}
    run = {
        "torchattacks": _theirs(torchattacks.EOTPGD(defense, **step), x, y),
        "float32": _ours(PGD(defense, **step), x, y),
        "bfloat16": _ours(PGD(defense, **step, precision="bfloat16"), x, y),
    }
    yield Contest("PGD-20 x EOT-20, RT2 + U-Net + ResNet-18, B=8", defense, x, y, run, rounds=3)


def autoattack(cifar: Path) -> Iterator[Contest]:
    """AutoAttack standard on small adversarially trained models, with the same numbers of steps and queries."""
    for name, load, norm, eps, screen in (
        ("CIFAR", _robust_cifar, "Linf", EPS, True),
        ("digits", _robust_mnist, "L2", 1.5, False),
    ):
        model, x, y = load(cifar, 512)
        run = {
            "pyautoattack": _pyautoattack(model, norm, eps, x, y),
            "float32": _ours(AutoAttack(model, norm, eps), x, y),
        }
        if screen:
            run["bfloat16 + finish"] = _ours(AutoAttack(model, norm, eps, precision="bfloat16"), x, y)
        yield Contest(f"AutoAttack standard, {norm}, {name}, 512 images", model, x, y, run, rounds=1)


CASES = {"pgd10": pgd10, "pgd100": pgd100, "eot": eot, "autoattack": autoattack}


def measure(contest: Contest) -> list[dict[str, Any]]:
    """The contest's rows, the peer first. The variants run in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contest.run}
    # Unlike those of the clock, processor seconds do not count what else the machine does.
    processor: dict[str, list[float]] = {name: [] for name in contest.run}
    found: dict[str, Tensor] = {}
    passes: dict[str, Any] = {}
    for _ in range(contest.rounds):
        for name, run in contest.run.items():
            with counted_passes() as counted:
                start, used = time.perf_counter(), time.process_time()
                adversarial = run()
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
            found[name] = _right(contest.model, adversarial, contest.labels)
            passes[name] = counted
    peer, *_ = contest.run
    rows = []
    for name, times in seconds.items():
        median = statistics.median(times)
        rows.append({
            "case": contest.case, "variant": name, "rounds": contest.rounds, "seconds": round(median, 3),
            "spread": round(max(times) - min(times), 3), "ratio": round(statistics.median(seconds[peer]) / median, 2),
            "processor_ratio": round(statistics.median(processor[peer]) / statistics.median(processor[name]), 2),
            "accuracy": round(float(found[name].double().mean()), 4),
            "agree": round(float((found[name] == found[peer]).double().mean()), 4),
            "weaker_on": int((found[name] & ~found[peer]).sum()),
            "stronger_on": int((found[peer] & ~found[name]).sum()),
            "forward": passes[name].forward or None, "backward": passes[name].backward or None,
        })  # fmt: skip
    return rows


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Whether the images are classified correctly, by one draw of a random defence."""
    draws = atop.attacks.draw_logits(model.eval(), x, 99, torch.arange(len(x)), range(1))
    return draws[:, 0].argmax(dim=1) == y


def _ours(attack: Any, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: attack(x, y)


def _theirs(attack: Any, x: Tensor, y: Tensor, batch: int = 1024) -> Callable[[], Tensor]:
    return lambda: torch.cat([attack(a, b) for a, b in zip(x.split(batch), y.split(batch), strict=True)])


def _pyautoattack(model: nn.Module, norm: str, eps: float, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    from pyautoattack.autoattack import AutoAttack as Original

    def run() -> Tensor:
        attack = Original(model, norm=norm, eps=eps, seed=0, version="standard")
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
            return attack.run_standard_evaluation(x, y, batch_size=256)[0]

    return run


def _standard_cifar(folder: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    import models

    return models.standard_cifar(), *_images(folder, count)


def _robust_cifar(folder: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    import models

    return models.robust_cifar(), *_images(folder, count)


def _robust_mnist(folder: Path, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    import models

    digits = models.mnist()
    return models.robust_mnist(), digits.images[:count], digits.labels[:count]


def _images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The same number of each class, from the folder's test images."""
    data = atop.image_folder(folder / "test")
    order = torch.cat([(data.labels == c).nonzero()[: -(-count // 10), 0] for c in range(10)]).view(10, -1).T.flatten()
    return data.images[order[:count]], data.labels[order[:count]]


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="which; all by default")
    parser.add_argument(
        "--cifar", type=Path, default=os.environ.get("ATOP_FAST_CIFAR10"), help="folder with test/<class>"
    )
    parser.add_argument("--json", action="store_true", help="write the results as JSON")
    parser.add_argument("--name", default="attacks", help="name of the JSON file")
    parser.add_argument("--out", type=Path, default=_harness.RESULTS, help="folder for the JSON file")
    parser.add_argument("--commit", help="commit to record; by default what git says")
    args = parser.parse_args()
    if args.cifar is None:
        parser.error("--cifar or ATOP_FAST_CIFAR10 must name a folder with test/<class>/<image>")
    _harness.keep_heap()
    rows = []
    for case in args.cases or CASES:
        for contest in CASES[case](args.cifar):
            rows += measure(contest)
            _harness.print_table(rows[-len(contest.run) :])
    if args.json:
        document = _harness.metadata("cpu", args.commit)
        document["versions"] |= {peer: importlib.metadata.version(peer) for peer in PEERS}
        print("wrote", _harness.write(args.name, "cpu", args.out, {**document, "rows": rows}))


if __name__ == "__main__":
    main()
