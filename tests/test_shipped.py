"""Defenses that the package carries: they load by name, predict what was stored, and say where they come from."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atop_fast import PGD, Defense, evaluate, list_defenses, load_classifier, load_defense
from atop_fast.checkpoints import find_defense
from atop_fast.classifiers.zoo import match_classes
from atop_fast.data import Dataset
from atop_fast.defenses.own import find
from atop_fast.recipes.pack import system_of

DATA = Path(__file__).parent / "data"
NAMES = list_defenses()


def test_all_of_them_take_less_than_ten_megabytes_of_a_wheel():
    assert {"cifar10-rt2", "cifar10-rt2-at"} <= set(NAMES)
    # Wheels are compressed by deflate.
    assert sum(len(zlib.compress(find_defense("test", name).read_bytes())) for name in NAMES) < 10e6


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_where_it_comes_from(name):
    metadata = load_defense(name).metadata
    assert {"classes", "shape", "norm", "eps", "recipe", "seed", "commit", "data", "license"} <= metadata.keys()
    assert "JPEG" in metadata["data"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_stored_images_and_draws_are_those_that_were_stored(name):
    stored, defense = load_file(DATA / f"{name.replace('-', '_')}.safetensors"), load_defense(name)
    images, ids = stored["images"].float() / 255, torch.arange(len(stored["images"]))
    with torch.no_grad():
        logits = torch.stack([defense(images, sample_ids=ids, draw=draw) for draw in range(4)], dim=1)
    # Other machines round otherwise: draws are the same to the bit, sums are not.
    torch.testing.assert_close(logits, stored["logits"], rtol=1e-3, atol=1e-2)
    right = logits.argmax(dim=2) == stored["labels"][:, None]
    assert right.double().mean() > 0.4
    # The draws differ.
    assert (logits[:, 0] != logits[:, 1]).any(dim=1).all()


def test_images_of_foolbox_are_evaluated_in_three_lines():
    foolbox = pytest.importorskip("foolbox")
    defense = load_defense("cifar10-rt2-at")
    model = foolbox.PyTorchModel(defense, bounds=(0, 1), device="cpu")
    images, labels = foolbox.utils.samples(model, dataset="cifar10", batchsize=4)
    attacks = {"pgd": PGD(defense, steps=3, eot_iter=2)}
    options = {"attacks": attacks, "draws": 2, "selection_draws": 2, "diagnostics": (), "progress": False}
    report = evaluate(defense, images, labels.long(), **options)
    assert report.robust.mean <= report.clean.mean


def test_the_command_evaluate_takes_their_names(tmp_path, monkeypatch):
    assert system_of(Path("cifar10-rt2-at"), tmp_path) == {"defense": "cifar10-rt2-at"}
    assert system_of(Path("resnet50"), tmp_path) == {"classifier": "resnet50"}
    # A file of that name comes first, as in load_defense.
    monkeypatch.chdir(tmp_path)
    Path("cifar10-rt2-at").write_bytes(b"weights")
    assert system_of(Path("cifar10-rt2-at"), tmp_path) == {"classifier": "cifar10-rt2-at"}


def test_their_classifiers_load_by_name_and_can_be_judged_behind_other_defenses():
    defense, classifier = load_defense("cifar10-rt2"), load_classifier("cifar10-rt2")
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(classifier(x), defense.classifier(x), rtol=0, atol=0)
    assert not classifier.training
    # Labels follow the order of the classes in the file.
    classes = tuple(defense.metadata["classes"])
    data = Dataset(x, torch.tensor([0, 1]), tuple(reversed(classes)))
    with pytest.warns(UserWarning, match="labels are put in the order"):
        assert match_classes("test", "cifar10-rt2", data).labels.tolist() == [9, 8]
    name, build = find("cifar10-rt2")
    judged = build(classifier, x.shape[1:])
    assert name == "cifar10-rt2"
    assert isinstance(judged, Defense)
    ids = torch.arange(2)
    torch.testing.assert_close(judged(x, sample_ids=ids, draw=0), defense(x, sample_ids=ids, draw=0), rtol=0, atol=0)
    with pytest.raises(ValueError, match="a defense of the given classifier"):
        find("cifar10-rt2-at")[1](classifier, x.shape[1:])
    with pytest.raises(ValueError, match="normalize must be left out for cifar10-rt2"):
        load_classifier("cifar10-rt2", normalize="half")
