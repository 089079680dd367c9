"""The command `atop-fast doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from .._core.checks import check_device, check_integer
from .._core.files import write_text
from ..classifiers.zoo import System
from ..data import Dataset
from ..recipes.options import DataConfig, GivenTransform
from . import diagnose, format_findings


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
    norm: Literal["Linf", "L2"] = "Linf",
    eps: float = 8 / 255,
    steps: int = 10,
    eot_iter: int | None = None,
    images: int = 64,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Check a defense's contract and look for gradient masking; exit code 1 if a check fails.

    Args:
        classifier: classifier.safetensors; or a checkpoint of torch.save with `architecture`; or a model by name, such
            as torchvision:resnet50 with `weights`, or one of RobustBench in the folder models (see load_classifier).
        purifier: purifier.safetensors; without it the classifier alone is examined, or, if `transform` is given, that
            transform before it.
        defense: instead of both, defense.safetensors of the commands train or demo, or the name of a defense that the
            package carries.
        out: file for the findings as JSON; none by default.
        data: images and their split; the held-out part is used.
        transform: the random transform, if no file states it.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or what stands before the names.
        norm: norm of the threat model.
        eps: its radius, in units of [0, 1] pixels.
        steps: PGD steps.
        eot_iter: draws in each gradient; by default what the gradient's noise asks for, at most 8.
        images: how many held-out images are examined.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    target = check_device("doctor", "device", device)
    check_integer("doctor", "images", images, low=1)
    system = System(classifier, purifier, defense, transform, architecture, weights, key)
    model, part = system.load("doctor", data.load(print)[1])
    assert isinstance(part, Dataset)
    part = part.to(target)
    findings = diagnose(
        model.eval().to(target),
        part.images,
        part.labels,
        norm=norm,
        eps=eps,
        seed=seed,
        steps=steps,
        eot_iter=eot_iter,
        max_images=images,
    )
    if out is not None:
        write_text(Path(out), json.dumps([asdict(f) for f in findings], indent=2) + "\n")
    print(format_findings(findings))
    if any(f.status == "fail" for f in findings):
        sys.exit(1)
