"""Attack a Defense with torchattacks, and judge what it found on fresh draws.

A Defense is a module from images to logits like any other. The accuracy of one more draw on torchattacks' images is not
a verdict; `evaluate` accepts its attack like ours.
"""

from __future__ import annotations

import torchattacks
from digits import arguments, classifier, digits
from torch import Tensor

import atop_fast as atop

EPS = 0.1


def main() -> None:
    """torchattacks' EOT-PGD and our PGD with momentum, of as many passes, on one defense."""
    args = arguments(__doc__)
    train, test = digits(args.quick)
    defense = atop.Defense(atop.RT2(patch=4, sigma=0.2), None, classifier(train, args.quick)).eval()
    steps, draws = (2, 2) if args.quick else (20, 4)

    theirs = torchattacks.EOTPGD(defense, eps=EPS, alpha=EPS / 8, steps=steps, eot_iter=draws)

    def eotpgd(images: Tensor, labels: Tensor, sample_ids: Tensor) -> Tensor:
        return theirs(images, labels)

    # Momentum averages over the draws of many steps, so that one draw in each suffices (docs/evaluation.md#passes).
    ours = atop.PGD(defense, eps=EPS, steps=steps * draws, momentum=0.9, schedule="cosine")
    attacks = {"torchattacks": eotpgd, "atop_fast": ours}
    report = atop.evaluate(defense, test.images, test.labels, eps=EPS, attacks=attacks)
    for name, verdict in {"clean": report.clean, **report.attacks, "worse of the two": report.robust}.items():
        low, high = verdict.mean_ci
        print(f"{name:16} {verdict.mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
