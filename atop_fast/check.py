"""The command `atop-fast check`: tries a classifier on the user's images, and writes it for other commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._core.checks import check_device, check_fits, check_integer, check_logits, message
from .checkpoints import CLASSES, SHAPE, holds, read_header, read_metadata, save_model
from .classifiers import Normalized
from .classifiers.programs import carried_programs, printable
from .classifiers.zoo import System, sized
from .data import Dataset, chance_level
from .doctor import check_contract, format_findings
from .evaluation.report import versions
from .evaluation.verdict import wilson_interval
from .recipes.options import DataConfig, GivenTransform

# Number of images in a pass, and of images that the checks of the contract examine.
BATCH, EXAMINED = 64, 64
# The entry of a file's metadata by which it comes from this command.
CHECKED = "checked"


def check(
    classifier: str,
    out: str = "classifier.safetensors",
    data: DataConfig = DataConfig(),
    architecture: str | None = None,
    weights: str | None = None,
    key: str | None = None,
    normalize: str | None = None,
    options: dict[str, Any] | None = None,
    classes: str | None = None,
    images: int = 1000,
    trust: bool = False,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Try a classifier on your images, and write it as one file that other commands take.

    `atop-fast check CLASSIFIER [options]`; exit code 1, and no file, if a check fails or the accuracy is not above that
    of always naming the most frequent class. The file carries the architecture, the weights, the normalization, the
    size of the images and the names of the classes; for FILE.py:Class, it also carries the source of FILE.py, and
    commands then require --trust.

    Args:
        classifier: FILE.py:Class with `weights`; or an archive of TorchScript or torch.export, with `trust`; or a model
            by name, such as torchvision:resnet50 with `weights`; or a checkpoint of torch.save with `architecture`; or
            classifier.safetensors, to try it again, and, without `trust`, to read the source in it.
        out: the file to write. An existing file is replaced only if check wrote it for the same classifier.
        data: images and their split; the held-out part is used.
        architecture: of a checkpoint of torch.save: resnet18, wrn_28_10, ...
        weights: file of the weights of FILE.py:Class or of a model of torchvision or timm.
        key: of a checkpoint that holds several networks: the dictionary, or the prefix of the names.
        normalize: mean and standard deviation by which the network expects its input to be normalized: imagenet,
            cifar10, cifar100, mnist, half or MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2; by default those of its
            package, or none.
        options: arguments of the class or of the architecture, such as '{width: 64}'.
        classes: names of the classifier's classes in its order, as cat,dog,ship or a text file with one in each line;
            by default the sorted names of the folders.
        images: how many held-out images are examined, at most.
        trust: run the program in a file: an archive, or the source of a class.
        device: where to compute: auto (a GPU, if there is one), cpu, cuda, cuda:1, ...
        seed: key of all randomness.
    """
    chosen = check_device("check", "device", device)
    check_integer("check", "images", images, low=1)
    if not Path(out).parent.is_dir():
        raise ValueError(message("check", "out", "a file in a folder that exists", out))
    if classifier.endswith(".safetensors") and not trust:
        for _, what, source in carried_programs(read_header(classifier)):
            print(f"{classifier} carries {what}:\n{printable(source)}")
    part: Any = sized("check", classifier, data).load(print)[1]
    names = tuple(read_metadata(classifier).get(CLASSES, ())) if classifier.endswith(".safetensors") else ()
    part = _in_order(part, classes, names).take(slice(0, images)).to(chosen)
    system = System(classifier, None, None, GivenTransform(), architecture, weights, key, normalize, trust)
    model = system.alone(part, **(options or {})).to(chosen)
    itself = Path(out).resolve() == Path(classifier).resolve()
    if not itself and not _may_replace(Path(out), model):
        expected = "a new file, or one that check wrote for this classifier; give another name by --out"
        raise ValueError(message("check", "out", expected, f"{out}, which exists and holds something else"))
    print(f"Classifier: {_described(classifier, model, normalize)}")
    with torch.no_grad(), check_fits("check", "data", part.images):
        logits = torch.cat([check_logits("check", model(x), len(x)) for x in part.images.split(BATCH)])
    if logits.shape[1] != len(part.classes):
        expected = f"the names of the classifier's {logits.shape[1]} classes, in its order"
        raise ValueError(message("check", "classes", expected, f"{len(part.classes)}: {' '.join(part.classes)}"))
    right = (logits.argmax(dim=1) == part.labels).float()
    low, high = wilson_interval(float(right.mean()), len(right))
    frequent = chance_level(part.labels)
    print(
        f"Accuracy on {len(part):,} held-out images: {float(right.mean()):.3f} [{low:.3f}, {high:.3f}]; always naming "
        f"the most frequent class would score {frequent:.3f}"
    )
    findings = check_contract(model, part.images, part.labels, seed=seed, max_images=EXAMINED)
    doubts = [finding for finding in findings if finding.status != "pass"]
    print(f"{len(findings) - len(doubts)} of {len(findings)} checks of the contract pass.")
    if doubts:
        print(format_findings(doubts))
    failed = any(finding.status == "fail" for finding in doubts)
    if failed or low <= frequent:
        reason = "a check failed" if failed else "the accuracy is not beyond doubt above naming the most frequent class"
        print(f"Nothing was written: {reason}.")
        sys.exit(1)
    if itself:
        print(f"{out} stays as it is")
        return
    checked = {"images": part.description(), "accuracy": float(right.mean()), **versions()}
    save_model(out, model, metadata={CLASSES: part.classes, SHAPE: part.shape, CHECKED: checked})
    carried = "".join(f"; it carries {what}, which --trust runs" for _, what, _ in carried_programs(read_header(out)))
    print(f"Wrote {out} ({Path(out).stat().st_size / 1e6:.1f} MB){carried}")


def _may_replace(path: Path, model: nn.Module) -> bool:
    """Whether the file of this name is missing, or has nothing that the command would not write again."""
    return not path.exists() or (CHECKED in read_metadata(path) and holds(path, model))


def _in_order(data: Dataset, given: str | None, stored: tuple[str, ...]) -> Dataset:
    """The data with labels in the classifier's class order: the option's, or its file's, or else the data's own.

    Raises:
        ValueError: the names contradict one another.
    """
    names = stored or data.classes
    if given is not None:
        file = Path(given)
        text = file.read_text(encoding="utf-8") if file.is_file() else given.replace(",", "\n")
        names = tuple(name.strip() for name in text.splitlines() if name.strip())
        if stored and names != stored:
            raise ValueError(message("check", "classes", f"those of the file, {' '.join(stored)}", " ".join(names)))
    if len(set(names)) != len(names):
        raise ValueError(message("check", "classes", "different names", " ".join(names)))
    if unknown := [name for name in data.classes if name not in names]:
        expected = f"images of the classifier's classes, {' '.join(names[:20])}"
        raise ValueError(message("check", "data", expected, f"{unknown[0]!r} among {' '.join(data.classes[:20])}"))
    return data.relabeled(names)


def _described(classifier: str, model: nn.Module, normalize: str | None) -> str:
    inner = model.model if isinstance(model, Normalized) else model
    count = sum(parameter.numel() for parameter in inner.parameters())
    rule = normalize or "its mean and deviation"
    images = "images in [0, 1]" if inner is model else f"images normalized by {rule}"
    return f"{type(inner).__name__} of {classifier}, {count:,} parameters, {images}"
