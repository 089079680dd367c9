"""Diagnostics before a long evaluation: does the model keep the contract, and can the attack's gradient be trusted?"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._core.checks import (
    ROUNDING,
    check_choice,
    check_fits,
    check_images,
    check_integer,
    check_labels,
    check_logits,
    check_not_empty,
    check_radius,
    message,
)
from ..defense import Defense, check_model
from ..randomness import derive_seed, permutation
from . import contract, masking, overfitting
from ._probe import Finding, Model, Probe, Status, untouched

CHECKS = (*contract.CHECKS, *masking.CHECKS)
# With training images.
TRAINING_CHECKS = tuple(overfitting.CHECKS)

__all__ = ["CHECKS", "TRAINING_CHECKS", "Finding", "check_contract", "conclude", "diagnose", "format_findings"]


def diagnose(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str = "Linf",
    eps: float = 8 / 255,
    seed: int = 0,
    steps: int = 10,
    eot_iter: int | None = None,
    max_images: int = 64,
    checks: Sequence[str] | None = None,
    progress: bool = False,
    training: tuple[Tensor, Tensor] | None = None,
) -> list[Finding]:
    """Check a model's contract and look for gradient masking; docs/diagnostics.md says what each check does and why.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits (B, classes >= 2). A module's
            mode, buffers and requires_grad, and the global generators, are as before afterwards, also after an error.
        images: float images (N, C, H, W); they should be in [0, 1], which is one of the checks.
        labels: int64 labels (N,).
        norm, eps: threat model ("Linf" or "L2"); eps > 0 in units of [0, 1] pixels.
        seed: key of all randomness.
        steps: PGD steps.
        eot_iter: draws in each gradient of the attacks on a random model; by default what the gradient's noise asks
            for, at most 8.
        max_images: images that are examined, chosen at random by `seed`.
        checks: names out of CHECKS; all by default. Those that need a Defense are left out for other models, and a
            failure of "images" or "finite" ends the list, as later checks would only repeat it.
        progress: show a progress bar with the name of the check that runs.
        training: images and labels on which the model was trained, none of them among `images`; adds TRAINING_CHECKS,
            on at most `max_images` of them.

    Returns:
        A Finding for each check, in the order of CHECKS and TRAINING_CHECKS.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    known = CHECKS if training is None else (*CHECKS, *TRAINING_CHECKS)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "steps": steps, "eot_iter": eot_iter, "progress": progress}
    return _run("diagnose", model, images, labels, seed, max_images, checks, known, training, **options)


def check_contract(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int = 0,
    max_images: int = 64,
    checks: Sequence[str] | None = None,
) -> list[Finding]:
    """The cheap part of diagnose: the contract between images and model, without an attack.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits (B, classes >= 2).
        images: float images (N, C, H, W); they should be in [0, 1], which is one of the checks.
        labels: int64 labels (N,).
        seed: key of all randomness.
        max_images: images that are examined, chosen at random by `seed`.
        checks: names of checks of the contract; all by default.

    Returns:
        A Finding for each check, in the order of the contract's.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    return _run("check_contract", model, images, labels, seed, max_images, checks, tuple(contract.CHECKS))


def conclude(statuses: Mapping[str, str]) -> tuple[Status, str]:
    """The conclusion from all findings: the worst status, and a sentence.

    Args:
        statuses: name of each check -> "pass", "warn" or "fail"; at least one.
    """
    named = {status: [name for name, found in statuses.items() if found == status] for status in ("fail", "warn")}
    if named["fail"]:
        return "fail", f"Do not rely on a robust accuracy from this model and data: {_listed(named['fail'])} failed."
    if named["warn"]:
        return "warn", f"A robust accuracy is open to doubt: {_listed(named['warn'])} warned."
    return "pass", f"No objection from {len(statuses)} checks. They find broken evaluations, and prove no robustness."


def _listed(names: Sequence[str]) -> str:
    return f"the check{'s' if len(names) > 1 else ''} {', '.join(names)}"


def format_findings(findings: Sequence[Finding], width: int = 120) -> str:
    """Findings as a table of text, a line or more each."""
    column = max((len(f.name) for f in findings), default=0)
    lines = []
    for f in findings:
        head = f"{f.status:4}  {f.name:<{column}}  "
        text = textwrap.wrap(f.reason, max(20, width - len(head)))
        lines += [head + text[0], *(" " * len(head) + rest for rest in text[1:])]
    return "\n".join(lines)


def _run(
    function: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    seed: int,
    max_images: int,
    checks: Sequence[str] | None,
    known: Sequence[str],
    training: tuple[Tensor, Tensor] | None = None,
    *,
    norm: str = "Linf",
    eps: float = 8 / 255,
    steps: int = 1,
    eot_iter: int | None = None,
    progress: bool = False,
) -> list[Finding]:
    """Check the arguments of `function`, and examine the chosen images."""
    check_model(function, model)
    check_not_empty(function, "images", check_images(function, "images", images, finite=False))
    if images.numel() and images.min() >= -ROUNDING and images.max() <= 1 + ROUNDING:
        images = images.clamp(0, 1)
    check_labels(function, "labels", labels, images)
    check_choice(function, "norm", norm, ("Linf", "L2"))
    if check_radius(function, norm, eps) == 0:
        raise ValueError(message(function, "eps", "> 0", eps))
    check_integer(function, "steps", steps, low=1)
    check_integer(function, "max_images", max_images, low=1)
    if eot_iter is not None:
        check_integer(function, "eot_iter", eot_iter, low=1)
    for name in checks or ():
        check_choice(function, "checks", name, known)
    ids = sampled(len(images), check_integer(function, "seed", seed), max_images)
    x, y = images.detach()[ids.to(images.device)], labels[ids.to(labels.device)]
    members = None if training is None else _training(function, training, x, seed, max_images)
    checks = known if checks is None else checks
    return examine(function, model, x, y, ids, len(images), seed, norm, eps, steps, eot_iter, checks, progress, members)


def _training(
    function: str, training: tuple[Tensor, Tensor], images: Tensor, seed: int, most: int
) -> tuple[Tensor, Tensor]:
    """The training images that are examined, with their labels, on the device of `images`."""
    x = check_not_empty(function, "training", check_images(function, "training", training[0]))
    y = check_labels(function, "training", training[1], x)
    if x.shape[1:] != images.shape[1:] or x.dtype != images.dtype:
        expected = f"images like `images`, {tuple(images.shape[1:])} {images.dtype}"
        raise ValueError(message(function, "training", expected, f"{tuple(x.shape[1:])} {x.dtype}"))
    ids = sampled(len(x), seed, most)
    x, y = x.detach()[ids.to(x.device)].to(images.device), y[ids.to(y.device)].to(images.device)
    if count := sum(bool((images == image).flatten(1).all(dim=1).any()) for image in x):
        raise ValueError(message(function, "training", "images that are not among `images`", f"{count} that are"))
    return x, y


def sampled(total: int, seed: int, most: int) -> Tensor:
    """The images of a set that a diagnosis examines: `most` at random, int64, in their order."""
    return permutation(total, derive_seed(seed, "doctor"), 0)[:most].sort()[0]


def examine(
    function: str,
    model: Model,
    images: Tensor,
    labels: Tensor,
    ids: Tensor,
    total: int,
    seed: int,
    norm: str = "Linf",
    eps: float = 8 / 255,
    steps: int = 10,
    eot_iter: int | None = None,
    checks: Sequence[str] = CHECKS,
    progress: bool = False,
    training: tuple[Tensor, Tensor] | None = None,
) -> list[Finding]:
    """The findings of checked arguments.

    Args:
        function: whose call it is, for errors.
        images, labels, ids: the examined images (B, C, H, W), their labels and their places in a set of `total` images.
        model, seed, norm, eps, steps, eot_iter, checks, progress: see diagnose.
        training: the examined training images and their labels.
    """
    ids = ids.to(images.device)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "seed": seed, "steps": steps, "eot_iter": eot_iter}
    probe = Probe(model, images, labels, ids, total=total, **options)
    if training is not None:
        others = total + torch.arange(len(training[0]), device=images.device)
        probe.training = Probe(model, *training, others, total=total, **options)
    findings: list[Finding] = []
    chosen = _chosen(model, checks)
    if "images" in chosen:
        findings.append(chosen.pop("images")(probe))
        if findings[0].status == "fail":
            return findings
    with untouched(model, images.device):
        _check_model(function, probe)
    with tqdm(chosen.items(), desc="doctor", unit="check", disable=not progress) as bar:
        for name, check in bar:
            bar.set_postfix_str(name)
            with untouched(model, images.device, evaluation=name not in contract.AS_GIVEN):
                findings.append(check(probe))
            if findings[-1].status == "fail" and name in contract.STOPS:
                break
    return findings


def _chosen(model: Model, names: Sequence[str]) -> dict[str, Callable[[Probe], Finding]]:
    """The wanted checks that apply, in the order in which they run."""
    every = {**contract.CHECKS, **masking.CHECKS, **overfitting.CHECKS}
    left_out = () if isinstance(model, Defense) else masking.DEFENSE
    return {name: check for name, check in every.items() if name in names and name not in left_out}


def _check_model(function: str, probe: Probe) -> None:
    """Raise ValueError unless the model maps the images to (B, classes >= 2), with every label among the classes."""
    with torch.no_grad(), check_fits(function, "images", probe.x, probe.model):
        output = probe.output(probe.x)
    check_logits(function, output, len(probe.x), int(probe.y.max()))
