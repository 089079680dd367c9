"""The suite `attacks`: attacks end to end against those of other libraries, with the same steps from the same start."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGD, AutoAttack, draw_logits
from .harness import Case, Function, Options, Quality, flops
from .models import digits, has_digits, plain_pgd, resnet18, smooth_images

EPS, ALPHA = 8 / 255, 2 / 255


def cases(options: Options) -> Iterator[Case]:
    """PGD on a CIFAR ResNet-18, PGD to a verdict, and AutoAttack."""
    yield _pgd10(options)
    if has_digits():
        yield _pgd_to_a_verdict(options)
        if not options.quick:
            yield _autoattack(options)


def _pgd10(options: Options) -> Case:
    count = (4 if options.quick else 32) * (1 if options.device == "cpu" else 16)
    model, x = resnet18(options.device), smooth_images(count).to(options.device)
    # For a network with random weights, the labels are its own predictions, which the attack changes.
    y = model(x).argmax(dim=1)
    step: dict[str, Any] = {"eps": EPS, "alpha": ALPHA, "steps": 10}
    run: dict[str, Function] = {
        **peers_pgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False)(x, y),
        "atop_fast bfloat16": lambda: PGD(model, **step, random_start=False, precision="bfloat16")(x, y),
    }
    if not options.quick:
        compiled = torch.compile(model)
        run["compile"] = lambda: plain_pgd(compiled, x, y, **step)
    # A step is a forward pass and the gradient in the images, which costs the same.
    work = 10 * 2 * flops(lambda: model(x))
    return attack_case("PGD-10, CIFAR ResNet-18", model, x, y, run, work)


def _pgd_to_a_verdict(options: Options) -> Case:
    count = 64 if options.quick else 256
    model, x, y = digits(options.device)
    x, y = x[:count], y[:count]
    step: dict[str, Any] = {"eps": 0.06, "alpha": 0.01, "steps": 40}
    run = {
        **peers_pgd(model, x, y, **step),
        "atop_fast": lambda: PGD(model, **step, random_start=False, early_stop=True)(x, y),
    }
    return attack_case("PGD-40 to a verdict, digits", model, x, y, run)


def _autoattack(options: Options) -> Case:
    model, x, y = digits(options.device)
    x, y = x[:128], y[:128]
    run: dict[str, Function] = {
        "pyautoattack": lambda: pyautoattack(model, x, y, "Linf", 0.06),
        "atop_fast": lambda: AutoAttack(model, "Linf", 0.06)(x, y),
    }
    return attack_case("AutoAttack standard, digits", model, x, y, run, rounds=1)


def attack_case(
    name: str, model: nn.Module, x: Tensor, y: Tensor, run: Mapping[str, Function], work: int = 0, rounds: int = 3
) -> Case:
    """A case whose variants return adversarial images, judged by the model itself in float32."""
    shape = "x".join(map(str, x.shape))
    ours = [variant for variant in run if variant.startswith("atop_fast")]

    def judge(outputs: dict[str, Any]) -> Quality:
        return judge_attacks(model, x, y, outputs)

    return Case("attacks", name, shape, "float32", run, ours, 0, work, len(x), judge, rounds)


def judge_attacks(model: nn.Module, x: Tensor, y: Tensor, outputs: dict[str, Tensor]) -> Quality:
    """Accuracy that each attack leaves, by one draw of a random defense, and the images judged as after the first."""
    right = {}
    for name, adversarial in outputs.items():
        logits = draw_logits(model, adversarial, 99, torch.arange(len(x), device=x.device), range(1))
        right[name] = logits[:, 0].argmax(dim=1) == y
    first = next(iter(right.values()))
    return {
        name: {"accuracy": float(found.double().mean()), "agree": float((found == first).double().mean())}
        for name, found in right.items()
    }


def peers_pgd(model: nn.Module, x: Tensor, y: Tensor, **step: Any) -> dict[str, Function]:
    """PGD from the images by plain PyTorch and by the other libraries."""
    attacks = {"plain": plain_pgd, "torchattacks": torchattacks_pgd, "foolbox": foolbox_pgd, "ART": art_pgd}
    return {name: functools.partial(attack, model, x, y, **step) for name, attack in attacks.items()}


def torchattacks_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """torchattacks' PGD."""
    import torchattacks

    attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=steps, random_start=False)
    adversarial: Tensor = attack(x, y)
    return adversarial


def foolbox_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """foolbox's PGD, without its own verdict."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
    adversarial: Tensor = attack.run(wrapped, x, foolbox.Misclassification(y), epsilon=eps)
    return adversarial


def art_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """PGD of the Adversarial Robustness Toolbox, which takes and returns NumPy arrays."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    estimator = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu" if x.device.type == "cpu" else "gpu",
    )
    attack = ProjectedGradientDescentPyTorch(
        estimator, eps=eps, eps_step=alpha, max_iter=steps, batch_size=len(x), verbose=False
    )
    return torch.from_numpy(attack.generate(x.cpu().numpy(), y=y.cpu().numpy())).to(x.device)


def pyautoattack(model: nn.Module, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    """AutoAttack standard by its authors' code, as pyautoattack distributes it."""
    from pyautoattack.autoattack import AutoAttack as Original

    attack = Original(model, norm=norm, eps=eps, seed=0, version="standard", device=str(x.device))
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        adversarial: Tensor = attack.run_standard_evaluation(x, y, batch_size=256)[0]
    return adversarial
