"""evaluate reads a dataset batch by batch, to the numbers of tensors; what it cannot read twice alike it refuses."""

from __future__ import annotations

import weakref

import pytest
import torch
from models import mnist, standard_mnist
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler
from torch.utils.data import Dataset as TorchDataset

from atop_fast import RT2, Dataset, Defense, evaluate
from atop_fast.evaluation import quick_attacks
from atop_fast.evaluation.source import CHUNK, make_source

pytestmark = pytest.mark.usefixtures("no_pictures")
COUNT = 20
OPTIONS = {"eps": 0.1, "draws": 3, "selection_draws": 2, "batch_size": 8, "progress": False}


@pytest.fixture(scope="module")
def digits():
    return mnist().take(slice(0, COUNT))


def defense():
    return Defense(RT2(4, sigma=0.1), None, standard_mnist()).eval()


def numbers(report):
    # The check of the cost measures time.
    diagnostics = [finding for finding in report.diagnostics if finding["name"] != "cost"]
    return report.clean, report.robust, report.eight_bit, report.samples, report.attacks, diagnostics


class Watched(TorchDataset):
    """Float images of which it counts those that are still in memory."""

    def __init__(self, images, labels, change=0.0):
        self.images, self.labels, self.change = images, labels, change
        self.alive = self.most = self.reads = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.reads += 1
        image = (self.images[i] + self.change * self.reads).clamp(0, 1)
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(image, self._gone)
        return image, int(self.labels[i])

    def _gone(self):
        self.alive -= 1


@pytest.mark.parametrize("folder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_tensors(folder, digits, tmp_path):
    images, labels = digits.images, digits.labels
    out = {"out": tmp_path / "tensors"} if folder else {"diagnostics": ()}
    options = {**OPTIONS, "attacks": lambda model: quick_attacks(model, eps=0.1, steps=5)}
    expected = numbers(evaluate(defense(), images, labels, **options, **out))
    data = TensorDataset(images, labels)
    sources = {
        "dataset": data,
        "loader": DataLoader(data, batch_size=3),
        "shuffled": DataLoader(data, batch_size=7, shuffle=True),
        "subset": Subset(TensorDataset(images.flip(0), labels.flip(0)), range(COUNT - 1, -1, -1)),
        "ours": digits,
        "three": TensorDataset(images, labels, labels),
    }
    if folder:
        sources = {"shuffled": sources["shuffled"]}
    for name, source in sources.items():
        out = {"out": tmp_path / name} if folder else {"diagnostics": ()}
        assert numbers(evaluate(defense(), source, **options, **out)) == expected, name


def test_bytes_are_read_as_those_of_a_dataset_in_memory(digits):
    data = Dataset((digits.images * 255).round().to(torch.uint8), digits.labels, digits.classes)
    streamed = TensorDataset(data.images, data.labels)
    one, other = (evaluate(standard_mnist(), d, **OPTIONS, diagnostics=()) for d in (data, streamed))
    assert numbers(one) == numbers(other)


def test_labels_of_a_dataset_may_be_integers_of_any_size(digits):
    expected = numbers(evaluate(standard_mnist(), digits.images, digits.labels, **OPTIONS, diagnostics=()))
    for labels in (digits.labels.int(), digits.labels.byte()):
        data = TensorDataset(digits.images, labels)
        assert numbers(evaluate(standard_mnist(), data, **OPTIONS, diagnostics=())) == expected


def test_a_run_goes_on_with_another_source(digits, tmp_path):
    model, out = standard_mnist(), tmp_path / "run"
    whole = evaluate(model, digits.images, digits.labels, **OPTIONS)
    cut = evaluate(model, digits.images, digits.labels, **OPTIONS, out=out, budget=0)
    assert not cut.complete
    data = Watched(digits.images, digits.labels)
    report = evaluate(model, data, **OPTIONS, out=out)
    assert report.complete
    assert (report.robust, report.samples) == (whole.robust, whole.samples)
    before = data.reads
    again = evaluate(model, data, **OPTIONS, out=out)
    assert again.robust == whole.robust
    # The check of the data, the trial, 4 images for the probe of the model and 8 in two rows of the gallery: no attack.
    assert data.reads - before <= 2 * COUNT + 4 + 16
    changed = digits.images.clone()
    changed[-1, 0, 0, 0] = 0.5
    with pytest.raises(ValueError, match="evaluate: out must be"):
        evaluate(model, TensorDataset(changed, digits.labels), **OPTIONS, out=out)


def test_memory_holds_a_batch_of_items(tmp_path):
    images = torch.rand(6 * CHUNK, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = Watched(images, torch.zeros(len(images), dtype=torch.int64))
    attacks = {"none": lambda x, y, ids: x}
    evaluate(torch.nn.Flatten(), data, attacks=attacks, diagnostics=(), out=tmp_path / "run", **OPTIONS)
    assert data.alive == 0
    assert data.reads > 2 * len(images)
    # The trial takes the most: 256 images.
    assert data.most <= 256


def test_images_that_change_are_refused(digits):
    data = Watched(digits.images, digits.labels, change=1e-3)
    with pytest.raises(ValueError, match="evaluate: images must be a dataset whose items are the same in every read"):
        evaluate(standard_mnist(), data, **OPTIONS)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 4, 4), 0


def test_what_is_no_whole_set_is_refused(digits):
    images, labels = digits.images, digits.labels
    data = TensorDataset(images, labels)
    uneven = [(torch.rand(1, 4, 4 + i % 2), 0) for i in range(4)]
    for source, error, pattern in (
        (Stream(), TypeError, "images must be a Dataset with a length and items by index"),
        (DataLoader(Stream()), TypeError, "images must be a Dataset with a length and items by index"),
        (DataLoader(data, sampler=WeightedRandomSampler([1.0] * COUNT, COUNT)), ValueError, "visits every item"),
        (DataLoader(data, batch_size=None), ValueError, "visits every item .* got one with batch_size=None"),
        (DataLoader(data, batch_size=3, drop_last=True), ValueError, "got one that drops the last 2"),
        (TensorDataset(images), TypeError, r"images must be a dataset of \(image, label\)"),
        (TensorDataset(images[:0], labels[:0]), ValueError, "images must be at least one, got none"),
        (TensorDataset(images * 255, labels), ValueError, r"images must be in \[0, 1\]"),
        (TensorDataset(images, labels.float()), TypeError, "labels must be an int64 tensor"),
        (Subset([(object(), 0)], [0]), TypeError, r"of \(image, label\) with tensors as images .*ToTensor\(\)"),
        (Subset([(images[0], "cat")], [0]), TypeError, "labels must be class indices, got str, as in 'cat'"),
        (Subset(uneven, range(4)), ValueError, "images must be a dataset whose images have one shape"),
    ):
        with pytest.raises(error, match=pattern):
            evaluate(standard_mnist(), source, **OPTIONS)
    with pytest.raises(ValueError, match="evaluate: labels must be left out for a dataset, which has its own"):
        evaluate(standard_mnist(), data, labels, **OPTIONS)


@pytest.mark.parametrize(
    ("sample", "files"), [(("a/0.png", 1), ["0.png"] * 3), (("a/0.png", 1, {}), ["0.png"] * 3), ({"label": 1}, None)]
)
def test_samples_of_other_datasets_may_be_anything(sample, files):
    """Names of files come from attributes like torchvision's, which may hold something else."""
    data = Watched(torch.rand(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64))
    data.root, data.samples = "a", [sample] * 3
    assert make_source(data, None, None).files == files
