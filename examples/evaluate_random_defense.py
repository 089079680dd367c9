"""Evaluate a random defense that is not one of ours: any module, or any callable, from images to logits.

The example is a classifier behind noise and a random shift, as another project might define it. The report shows the
accuracy of one draw under attack, with an interval, and the findings of the diagnostics.
"""

from __future__ import annotations

import torch
from digits import FOLDER, arguments, classifier, digits
from torch import Tensor, nn

import atop_fast as atop
from atop_fast.doctor import diagnose, format_findings


class NoisyAndShifted(nn.Module):
    """A classifier of images with noise, shifted by up to two pixels."""

    def __init__(self, model: nn.Module, sigma: float = 0.2) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        noisy = (x + self.sigma * torch.randn_like(x)).clamp(0, 1)
        down, right = torch.randint(-2, 3, (2,)).tolist()
        return self.model(noisy.roll((down, right), dims=(2, 3)))


def main() -> None:
    """Diagnose, then evaluate."""
    args = arguments(__doc__)
    train, test = digits(args.quick)
    model = NoisyAndShifted(classifier(train, args.quick)).eval()

    checks = ("images", "finite", "logits", "determinism") if args.quick else None
    print(format_findings(diagnose(model, test.images, test.labels, eps=0.1, checks=checks)))

    # The protocols by name are in docs/evaluation.md; a claim needs "pgd-eot" or "autoattack-rand" instead of "quick".
    attacks = {"fgsm": atop.FGSM(model, eps=0.1)} if args.quick else None
    report = atop.evaluate(
        model, test.images, test.labels, protocol="quick", eps=0.1, attacks=attacks,
        diagnostics=False, out=FOLDER / ("quick_evaluate" if args.quick else "evaluate"),
    )  # fmt: skip
    for name, verdict in {"clean": report.clean, "robust": report.robust}.items():
        low, high = verdict.mean_ci
        print(f"{name:6} one draw {verdict.mean:.3f} [{low:.3f}, {high:.3f}]")
        print(f"       vote of {verdict.draws} {verdict.majority:.3f}, all of them {verdict.worst:.3f}")


if __name__ == "__main__":
    main()
