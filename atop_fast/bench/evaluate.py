"""The suite `evaluate`: attacks on random defenses with EOT, and whole evaluations, in images per second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGD
from ..defense import Defense
from ..evaluation import evaluate
from .attacks import ALPHA, EPS, judge_attacks
from .harness import Case, Function, Options, Quality, flops
from .models import defense, digits, has_digits, resnet18, smooth_images
from .unet_plain import PlainUNet

DRAWS = 20


def cases(options: Options) -> Iterator[Case]:
    """PGD with EOT through a U-Net and a ResNet-18, and the protocol `quick` on digits."""
    yield _pgd_eot(options)
    if has_digits():
        yield _protocol(options)


def _pgd_eot(options: Options) -> Case:
    count = (2 if options.quick else 8) * (1 if options.device == "cpu" else 16)
    model = defense(resnet18(options.device), channels=3, width=24, device=options.device)
    x = smooth_images(count).to(options.device)
    y = model(x, draw=0).argmax(dim=1)
    steps, draws = (2, 5) if options.quick else (5, 10)
    step: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": steps, "eot_iter": draws}
    run: dict[str, Function] = {
        "torchattacks": lambda: torchattacks_eotpgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False)(x, y),
        "atop_fast bfloat16": lambda: PGD(model, **step, random_start=False, precision="bfloat16")(x, y),
    }

    def judge(outputs: dict[str, Any]) -> Quality:
        return judge_attacks(model, x, y, outputs)

    plain = PlainUNet(3, 24).to(options.device)
    with torch.no_grad():
        once = flops(lambda: model.classifier(x)) + flops(lambda: plain(model.transform(x)))
    shape = "x".join(map(str, x.shape))
    ours = list(run)[1:]
    name = f"PGD-{steps} x EOT-{draws}, RT2 + U-Net + ResNet-18"
    return Case("evaluate", name, shape, "float32", run, ours, 0, steps * draws * 2 * once, count, judge, rounds=3)


def _protocol(options: Options) -> Case:
    count, eps = (8 if options.quick else 64) * (1 if options.device == "cpu" else 8), 0.03
    classifier, images, labels = digits(options.device)
    model = defense(classifier, channels=1, width=8, device=options.device)
    x, y = images[:count], labels[:count]
    run: dict[str, Function] = {
        "torchattacks": lambda: peer_protocol(model, x, y, eps),
        "atop_fast": lambda: evaluate(model, x, y, protocol="quick", eps=eps, progress=False).robust.mean,
    }

    def judge(outputs: dict[str, Any]) -> Quality:
        return {name: {"accuracy": accuracy} for name, accuracy in outputs.items()}

    shape = "x".join(map(str, x.shape))
    name = "protocol quick, digits, RT2 + U-Net"
    return Case("evaluate", name, shape, "float32", run, ["atop_fast"], 0, 0, count, judge, rounds=3)


def torchattacks_eotpgd(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int, eot_iter: int
) -> Tensor:
    """torchattacks' PGD with EOT."""
    import torchattacks

    attack = torchattacks.EOTPGD(model, eps=eps, alpha=alpha, steps=steps, eot_iter=eot_iter, random_start=False)
    with torch.random.fork_rng():
        adversarial: Tensor = attack(x, y)
    return adversarial


@torch.no_grad()
def peer_protocol(model: Defense, x: Tensor, y: Tensor, eps: float) -> float:
    """The protocol `quick` around torchattacks: the same steps, draws of the choice and draws of the verdicts.

    PGD has no momentum, which torchattacks lacks with EOT: as many passes, but a weaker attack.
    """
    with torch.enable_grad():
        fgsm = torchattacks_eotpgd(model, x, y, eps, eps, 1, 4)
        pgd = torchattacks_eotpgd(model, x, y, eps, 2.5 * eps / 80, 80, 1)
    candidates = [x, fgsm, pgd]
    chosen = torch.stack([_right(model, candidate, y) for candidate in candidates]).argmin(dim=0)
    judged = torch.stack([_right(model, candidate, y) for candidate in candidates])
    # The 8-bit verdict: judge the chosen candidates again, rounded.
    rounded = torch.stack(candidates)[chosen, torch.arange(len(x), device=x.device)].mul(255).round().div(255)
    _right(model, rounded, y)
    return float(judged.gather(0, chosen[None]).mean())


def _right(model: Defense, x: Tensor, y: Tensor) -> Tensor:
    """The share of DRAWS draws in which each image is classified correctly, float64 (B,)."""
    return torch.stack([model(x).argmax(dim=1) == y for _ in range(DRAWS)]).double().mean(dim=0)
