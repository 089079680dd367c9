"""The committed classifiers are what tests/data/models.json says."""

from __future__ import annotations

import json

import models
import pytest
import torch

from atop_fast import PGD

RECORDS = json.loads((models.DATA / "models.json").read_text())


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(dim=1) == labels).float().mean().item()


@pytest.mark.parametrize("name", list(RECORDS))
def test_files_are_small_and_their_training_is_recorded(name):
    path = models.DATA / f"{name}.safetensors"
    assert path.stat().st_size < (750e3 if name == "robust_cifar" else 150e3)
    assert {"training", "accuracy", "seconds", "date", "device", "versions"} <= set(RECORDS[name])
    assert getattr(models, name)() is getattr(models, name)()
    assert not getattr(models, name)().training


@pytest.mark.parametrize(("name", "eps"), [("standard_mnist", 0.1), ("robust_mnist", 0.1), ("robust_mnist", 0.2)])
def test_accuracy_on_mnist_is_the_recorded_one(name, eps):
    model, part, record = getattr(models, name)(), models.mnist().take(slice(0, 512)), RECORDS[name]["accuracy"]
    assert accuracy(model, part.images, part.labels) == pytest.approx(record["clean"], abs=0.005)
    # Twenty steps instead of the recorded hundred leave a little more.
    attacked = PGD(model, eps=eps, steps=20)(part.images, part.labels)
    assert record[f"pgd100 at {eps}"] - 0.01 <= accuracy(model, attacked, part.labels)
    assert accuracy(model, attacked, part.labels) <= record[f"pgd100 at {eps}"] + 0.05


def test_accuracy_of_robust_cifar_is_the_recorded_one():
    model, part, record = models.robust_cifar(), models.cifar(), RECORDS["robust_cifar"]["accuracy"]
    assert record["clean"] > 0.4
    assert record["pgd100 at 8/255"] > 0.2
    assert accuracy(model, part.images, part.labels) == pytest.approx(record["clean"], abs=0.005)
    part = part.take(slice(0, 128))
    attacked = PGD(model, steps=10)(part.images, part.labels)
    # 128 images: a standard error of 4 points.
    assert accuracy(model, attacked, part.labels) == pytest.approx(record["pgd100 at 8/255"], abs=0.13)


def test_standard_cifar_is_accurate_and_not_robust():
    """83 % of the JPEG images, and none under PGD."""
    model, part = models.standard_cifar(), models.cifar().take(slice(0, 64))
    assert accuracy(model, part.images, part.labels) > 0.7
    part = part.take(slice(0, 8))
    assert accuracy(model, PGD(model, steps=5)(part.images, part.labels), part.labels) == 0
