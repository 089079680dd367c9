"""Attacks on trained networks, with hundreds of images: python benchmarks/cifar_attacks.py --help

A larger version of `atop-fast bench attacks`, with the trained networks of tests/models.py and 512 test images.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import atop_fast as atop
from atop_fast.attacks import PGD, AutoAttack
from atop_fast.bench import results
from atop_fast.bench.attacks import ALPHA, EPS, attack_case, pyautoattack, torchattacks_pgd
from atop_fast.bench.evaluate import torchattacks_eotpgd
from atop_fast.bench.harness import Case, Roofline, keep_heap, measure
from atop_fast.bench.models import defense

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def pgd10(cifar: Path, most: int) -> Iterator[Case]:
    """Ten steps of PGD on a CIFAR ResNet-18, no image leaves."""
    import models

    model, (x, y) = models.standard_cifar(), images(cifar, min(64, most))
    step = {"eps": EPS, "alpha": ALPHA, "steps": 10}
    run = {
        "torchattacks": lambda: torchattacks_pgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False)(x, y),
        "atop_fast bfloat16": lambda: PGD(model, **step, random_start=False, precision="bfloat16")(x, y),
    }
    yield attack_case("PGD-10, CIFAR ResNet-18, trained", model, x, y, run)


def pgd100(cifar: Path, most: int) -> Iterator[Case]:
    """A hundred steps to a verdict on an adversarially trained model: fooled images leave."""
    import models

    model, (x, y) = models.robust_cifar(), images(cifar, most)
    step = {"eps": EPS, "alpha": ALPHA, "steps": 100}

    def theirs() -> Tensor:
        parts = zip(x.split(64), y.split(64), strict=True)
        return torch.cat([torchattacks_pgd(model, a, b, **step) for a, b in parts])

    run = {
        "torchattacks": theirs,
        "atop_fast": lambda: PGD(model, **step, random_start=False, early_stop=True)(x, y),
    }
    yield attack_case("PGD-100 to a verdict, CIFAR, small ResNet", model, x, y, run)


def eot(cifar: Path, most: int) -> Iterator[Case]:
    """PGD-20 with 20 draws a step, through RT2, the 32x32 U-Net and a ResNet-18."""
    import models

    x, y = images(cifar, min(8, most))
    model = defense(models.standard_cifar(), channels=3, width=24, device="cpu")
    step = {"eps": EPS, "alpha": ALPHA, "steps": 20, "eot_iter": 20}
    run = {
        "torchattacks": lambda: torchattacks_eotpgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False)(x, y),
        "atop_fast bfloat16": lambda: PGD(model, **step, random_start=False, precision="bfloat16")(x, y),
    }
    yield attack_case("PGD-20 x EOT-20, RT2 + U-Net + ResNet-18", model, x, y, run, rounds=1)


def autoattack(cifar: Path, most: int) -> Iterator[Case]:
    """AutoAttack standard on a small adversarially trained model, with the same numbers of steps and queries."""
    import models

    model, (x, y) = models.robust_cifar(), images(cifar, most)
    yield attack_case(
        "AutoAttack standard, Linf, CIFAR, small ResNet", model, x, y, _contest(model, "Linf", EPS, x, y), rounds=1
    )


def autoattack_l2(cifar: Path, most: int) -> Iterator[Case]:
    """The same in L2, on digits."""
    import models

    model, digits = models.robust_mnist(), models.mnist().take(slice(0, most))
    x, y = digits.images, digits.labels
    yield attack_case("AutoAttack standard, L2, digits", model, x, y, _contest(model, "L2", 1.5, x, y), rounds=1)


CASES = {"pgd10": pgd10, "pgd100": pgd100, "eot": eot, "autoattack": autoattack, "autoattack-l2": autoattack_l2}


def _contest(model: torch.nn.Module, norm: str, eps: float, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "pyautoattack": lambda: pyautoattack(model, x, y, norm, eps),
        "atop_fast": lambda: AutoAttack(model, norm, eps)(x, y),
        "atop_fast bfloat16": lambda: AutoAttack(model, norm, eps, precision="bfloat16")(x, y),
    }


def images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The same number of each class, from the folder's test images."""
    data = atop.image_folder(folder / "test")
    order = torch.cat([(data.labels == c).nonzero()[: -(-count // 10), 0] for c in range(10)]).view(10, -1).T.flatten()
    return data.images[order[:count]], data.labels[order[:count]]


def main() -> None:
    """Measure, print, and write the results if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="which; all by default")
    parser.add_argument(
        "--cifar", type=Path, default=os.environ.get("ATOP_FAST_CIFAR10"), help="folder with test/<class>"
    )
    parser.add_argument("--images", type=int, default=512, help="at most; cases of slow networks have fewer")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if args.cifar is None:
        parser.error("--cifar or ATOP_FAST_CIFAR10 must name a folder with test/<class>/<image>")
    keep_heap()
    rows, roofline = [], Roofline("cpu")
    for name in args.cases or CASES:
        for case in CASES[name](args.cifar, args.images):
            rows += measure(case, "cpu", 0.0, roofline)
            results.print_rows(rows[-len(case.run) :])
    if args.json:
        results.write(args.json, {**results.metadata("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
