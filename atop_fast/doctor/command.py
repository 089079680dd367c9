"""The command `atop-fast doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from .._core.checks import check_device, check_integer
from .._core.files import write_text
from ..classifiers.zoo import System, other_threat
from ..data import Dataset
from ..recipes.options import DataConfig, GivenTransform
from . import Finding, conclude, diagnose, format_findings, sampled
from ._probe import MOST_DRAWS


def doctor(
    classifier: str | None = None,
    purifier: str | None = None,
    defense: str | None = None,
    out: str | None = None,
    data: DataConfig = DataConfig(),
    transform: GivenTransform = GivenTransform(),
    architecture: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    normalize: str | None = None,
    trust: bool = False,
    norm: Literal["Linf", "L2"] = "Linf",
    eps: float = 8 / 255,
    steps: int = 10,
    eot_iter: int | None = None,
    images: int = 64,
    training: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Check a defense's contract and look for gradient masking; exit code 1 if a check fails, as with too few images.

    `atop-fast doctor RUN [options]` takes defense, images and threat model from the folder of a run, or from its
    archive, and `atop-fast doctor MODEL` a defense or a classifier by its file or name.

    Args:
        classifier: classifier.safetensors, or another classifier that evaluate takes.
        purifier: purifier.safetensors; without it the classifier alone is examined, or, if `transform` is given, that
            transform before it.
        defense: instead of both, defense.safetensors of the commands train or demo, or the name of a defense that the
            package carries.
        out: file for the findings as JSON; none by default.
        data: images and their split; the held-out part is used.
        transform: the random transform, if no file states it.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of FILE.py:Class or of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or the prefix of the names.
        normalize: mean and standard deviation by which the network expects its input to be normalized: imagenet,
            cifar10, cifar100, mnist, half or MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2; by default those of its
            package, or none.
        trust: run the program in a file: an archive, or the source of a class.
        norm: norm of the threat model.
        eps: its radius, in units of [0, 1] pixels.
        steps: PGD steps.
        eot_iter: draws in each gradient; by default what the gradient's noise asks for, at most 8.
        images: how many held-out images are examined.
        training: also examine as many training images, on which the model must have been trained: the generalization
            gap, and whether losses reveal membership in the training set.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    chosen = check_device("doctor", "device", device)
    check_integer("doctor", "images", images, low=1)
    system = System(classifier, purifier, defense, transform, architecture, weights, key, normalize, trust)
    train, held_out = system.sized("doctor", data).load(print)
    model, part = system.load("doctor", held_out)
    assert isinstance(part, Dataset)
    if other := other_threat(model, norm, eps):
        print(other)
    part = part.to(chosen)
    members = None
    if training:
        known = train.take(sampled(len(train), seed, images)).floats()
        known = known if known.classes == part.classes else known.relabeled(part.classes)
        members = known.to(chosen).training()
    findings = diagnose(
        model.eval().to(chosen),
        part.images,
        part.labels,
        norm=norm,
        eps=eps,
        seed=seed,
        steps=steps,
        eot_iter=eot_iter,
        max_images=images,
        progress=True,
        training=members,
    )
    if out is not None:
        write_text(Path(out), json.dumps([asdict(f) for f in findings], indent=2) + "\n")
    print(format_findings(findings))
    status, sentence = conclude({f.name: f.status for f in findings})
    print(f"{sentence}{_draws(findings)}")
    if status == "fail":
        sys.exit(1)


def _draws(findings: Sequence[Finding]) -> str:
    """The sentence on the draws that an evaluation should take, if it is more than one."""
    numbers = next((f.numbers for f in findings if f.name == "gradient_noise"), {"recommended_eot_iter": 1})
    recommended = numbers["recommended_eot_iter"]
    if recommended == 1:
        return ""
    least = f"more than {MOST_DRAWS}" if recommended is None else f"at least {recommended}"
    return (
        f" Each gradient of an attack should average over {least} draws: `atop-fast evaluate` warns beside its verdict "
        "if no attack of its protocol does."
    )
