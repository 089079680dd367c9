"""Inputs of trainings: accepted if their meaning is clear, else refused by name before the first update."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import nn

from atop_fast import (
    RT2,
    ClassifierConfig,
    Defense,
    FinetuneConfig,
    PretrainConfig,
    build_classifier,
    build_purifier,
    finetune,
    pretrain,
    train_classifier,
)
from atop_fast._core.files import write_text
from atop_fast.randomness import seeded

X = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(9) % 3
ONE = {"epochs": 1, "batch_size": 4}


class Pairs(torch.utils.data.Dataset):
    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return X[i], int(self.labels[i])


class TwoStages(nn.Module):
    """Returns a coarse and a fine image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)

    def forward(self, z):
        return self.conv(z), self.conv(z)


def classifier():
    with seeded(0):
        return build_classifier("small_cnn", channels=1, classes=3, width=4)


def defense(purifier=None):
    with seeded(0):
        return Defense(RT2(4), purifier or build_purifier("unet", channels=1, width=4), classifier())


def fine(system, labels=Y, images=X, **options):
    return finetune(system, images, labels, workers=0, config=FinetuneConfig(**ONE, **options), progress=False)


def test_paths_may_be_text(tmp_path):
    paths = {"checkpoint": f"{tmp_path}/c.pt", "metrics": f"{tmp_path}/m.jsonl"}
    options = {"progress": False, **paths}
    train_classifier(classifier(), X, Y, config=ClassifierConfig(**ONE), **options)
    for path in paths.values():
        os.remove(path)
    pretrain(defense().purifier, RT2(4), X, config=PretrainConfig(**ONE), **options)
    for path in paths.values():
        os.remove(path)
    finetune(defense(), X, Y, config=FinetuneConfig(**ONE), **options)
    assert all(map(os.path.exists, paths.values()))


@pytest.mark.parametrize("bad", [3, 7, -1])
def test_labels_beyond_the_classes_are_refused(bad):
    labels = Y.clone()
    labels[-1] = bad
    held_out, words = (X, labels), rf"labels must be class indices (>= 0|in \[0, 3\).*), got {bad}"
    options = {"config": ClassifierConfig(**ONE), "progress": False}
    for call in (
        lambda: train_classifier(classifier(), X, labels, **options),
        lambda: train_classifier(classifier(), X, Y, held_out=held_out, **options),
        lambda: train_classifier(classifier(), Pairs(labels), workers=0, **options),
        lambda: fine(defense(), labels),
        lambda: fine(defense(), None, Pairs(labels)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="labels must be given with a tensor of images"):
        fine(defense(), None)


class Normed(nn.Module):
    """Batch norm of features without pixels."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten())
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.net(x))


@pytest.mark.parametrize(
    ("options", "fits"),
    [
        ({"batch_size": 4}, False),
        ({"batch_size": 3}, True),
        ({"batch_size": 5, "accumulate": 2}, True),
        ({"batch_size": 5, "accumulate": 4}, False),
        ({"batch_size": 1}, False),
        ({"batch_size": 100}, True),
    ],
)
def test_batches_of_one_image_and_batch_norm(options, fits):
    config = ClassifierConfig(epochs=1, **options)
    net = Normed()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    if fits:
        assert len(train_classifier(net, X, Y, config=config, progress=False)) == 1
        return
    with pytest.raises(ValueError, match=r"fit: batch_size must be such that every .*batch norm \(net.2\)"):
        train_classifier(net, X, Y, config=config, progress=False)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    # With more than one value a channel there is nothing to refuse.
    spatial = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert len(train_classifier(spatial, X, Y, config=config, progress=False)) == 1


def test_frozen_networks_are_refused():
    frozen = defense()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match=r"purifier must be .*requires_grad_\(True\).* got a frozen GatedUNet"):
        fine(frozen)
    with pytest.raises(ValueError, match="got a frozen GatedUNet"):
        pretrain(frozen.purifier, RT2(4), X, config=PretrainConfig(**ONE), progress=False)
    with pytest.raises(ValueError, match="got a frozen SmallCNN"):
        train_classifier(frozen.classifier, X, Y, config=ClassifierConfig(**ONE), progress=False)
    # Part of it may be.
    partly = defense()
    first = next(partly.purifier.parameters()).requires_grad_(False)
    before = first.clone()
    fine(partly)
    assert torch.equal(first, before)


def test_a_wrapped_defense_is_refused_with_what_to_give():
    for wrapped, name in ((nn.DataParallel(defense()), "module"), (torch.compile(defense()), "_orig_mod")):
        with pytest.raises(TypeError, match=rf"finetune: defense must be a Defense; .*give its \.{name}"):
            fine(wrapped)
    with pytest.raises(TypeError, match=r"finetune: defense must be a Defense; .* got SmallCNN"):
        fine(classifier())


def test_a_purifier_with_two_outputs_is_refused_with_what_to_do():
    words = r"purifier must be a module that returns images \(B, C, H, W\) alone .*TwoStages, .* a tuple of 2"
    with pytest.raises(TypeError, match=f"Defense: {words}"):
        defense(TwoStages())(X)
    with pytest.raises(TypeError, match=words):
        pretrain(TwoStages(), RT2(4), X, config=PretrainConfig(**ONE), progress=False)
    with pytest.raises(TypeError, match=words):
        fine(defense(TwoStages()))


def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch):
    real = os.fsync

    def fail(code, folders):
        def fsync(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}") == folders:
                raise OSError(code, os.strerror(code))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)

    for code in (errno.EINVAL, errno.ENOTSUP):
        fail(code, folders=True)
        write_text(tmp_path / "a.txt", str(code))
        assert (tmp_path / "a.txt").read_text() == str(code)
    for code, folders in ((errno.EIO, True), (errno.ENOSPC, False)):
        fail(code, folders)
        with pytest.raises(OSError, match=os.strerror(code)):
            write_text(tmp_path / "a.txt", "x")
