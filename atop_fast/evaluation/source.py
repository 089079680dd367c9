"""The labeled images of an evaluation: tensors in memory, or a dataset that is streamed."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from .._core.checks import check_images, check_labels, check_not_empty, message
from ..data import Dataset, Files

# Number of items read at a time when a dataset is checked.
CHUNK = 64


class Source:
    """Images (N, C, H, W) in [0, 1] with labels (N,), accessed by index.

    Attributes:
        labels: int64 (N,), on the device of the images.
        sample: the first image (1, C, H, W), of the dtype and on the device of all.
        identity: SHA-256 of types, shapes and bytes of images and labels; the same for tensors and datasets.
        classes, files: names of the classes and of the images' files, if the images come with these.
    """

    classes: Sequence[str] | None = None
    files: Sequence[str] | None = None
    labels: Tensor
    sample: Tensor
    identity: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and labels (B,) at the indices int64 (B,)."""
        raise NotImplementedError


class InMemory(Source):
    """Tensors; their checks name the arguments of evaluate."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = check_not_empty("evaluate", "images", check_images("evaluate", "images", images))
        self.labels = check_labels("evaluate", "labels", labels, self.images)
        self.sample = self.images[:1]
        digest = hashlib.sha256()
        _add(digest, self.images, self.images.shape)
        _add(digest, self.labels, self.labels.shape)
        self.identity = digest.hexdigest()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        index = index.to(self.images.device)
        return self.images[index], self.labels[index]


class Streamed(Source):
    """A dataset whose items are read on demand; only the images in use are in memory.

    It is read once at the start, for its labels, its identity and the checks of its images. A checksum of each image is
    kept: one that differs in a later read, as under a random augmentation, raises.

    Args:
        data: a map-style Dataset of torch whose items are (image, label, ...), or a DataLoader over one, of which the
            dataset and collate_fn are used. Images are floats in [0, 1], or bytes.
        device: where images are taken to.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        self.data, self.device = data, device
        self.collate: Callable[[list[Any]], Any] = default_collate
        if isinstance(data, DataLoader):
            _check_loader(data)
            self.data, self.collate = data.dataset, data.collate_fn
        if isinstance(self.data, IterableDataset) or not hasattr(self.data, "__len__"):
            expected = "a Dataset with a length and items by index, or a DataLoader over one"
            raise TypeError(message("evaluate", "images", expected, type(self.data).__name__))
        count = len(self.data)
        if not count:
            raise ValueError(message("evaluate", "images", "at least one", "none"))
        digest, labels = hashlib.sha256(), []
        self.checksums: list[int] = []
        for part in torch.arange(count).split(CHUNK):
            x, y = self._read(part.tolist())
            if not self.checksums:
                self.sample = x[:1].to(device)
                _add(digest, x[:0], (count, *x.shape[1:]))
            if x.shape[1:] != self.sample.shape[1:] or x.dtype != self.sample.dtype:
                expected = f"images of one shape and dtype, such as {tuple(self.sample.shape[1:])} {self.sample.dtype}"
                raise ValueError(message("evaluate", "images", expected, f"{tuple(x.shape[1:])} {x.dtype}"))
            digest.update(_bytes(x))
            self.checksums += map(_checksum, x)
            labels.append(y)
        self.labels = torch.cat(labels).to(device)
        _add(digest, self.labels, self.labels.shape)
        self.identity = digest.hexdigest()
        self.classes, self.files = _names(self.data, count)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        places = index.tolist()
        x, _ = self._read(places)
        if changed := [i for i, image in zip(places, x, strict=True) if _checksum(image) != self.checksums[i]]:
            expected = "a dataset whose items are the same in every read, without random augmentations"
            raise ValueError(message("evaluate", "images", expected, f"another image {changed[0]} than before"))
        return x.to(self.device), self.labels[index.to(self.device)]

    def _read(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images and labels on the CPU."""
        try:
            batch = self.collate([self.data[i] for i in places])
        except RuntimeError as error:
            expected = "a dataset whose images have one shape"
            raise ValueError(message("evaluate", "images", expected, " ".join(str(error).split()))) from error
        except TypeError as error:
            expected = "a dataset of (image, label) with tensors as images (of torchvision: transform=ToTensor())"
            raise TypeError(message("evaluate", "images", expected, " ".join(str(error).split()))) from error
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            given = f"items of type {type(self.data[places[0]]).__name__}"
            raise TypeError(message("evaluate", "images", "a dataset of (image, label)", given))
        x, y = batch[0], self._labels(batch[1])
        if isinstance(x, Tensor) and x.dtype == torch.uint8:
            x = x.float().div_(255)
        return check_images("evaluate", "images", x).cpu(), check_labels("evaluate", "labels", y, x).cpu()

    @staticmethod
    def _labels(values: Any) -> Tensor:
        """The labels of a batch; integers of any size become int64, as numbers of Python do."""
        try:
            y = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            given = f"{type(values[0]).__name__}, as in {values[0]!r}" if isinstance(values, (list, tuple)) else values
            raise TypeError(message("evaluate", "labels", "class indices", given)) from error
        return y.long() if y.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32) else y


def make_source(images: Any, labels: Any, model: object) -> Source:
    """The source of evaluate's arguments; dataset images are moved to the device of the model's first parameter or CPU.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    if not isinstance(images, (Dataset, TorchDataset, DataLoader)):
        if labels is None and not isinstance(images, Tensor):
            expected = "a tensor with `labels`, a Dataset of this library or of torch, or a DataLoader"
            raise TypeError(message("evaluate", "images", expected, type(images).__name__))
        return InMemory(images, labels)
    if labels is not None:
        given = f"a {type(labels).__name__} besides a {type(images).__name__}"
        raise ValueError(message("evaluate", "labels", "left out for a dataset, which has its own", given))
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = torch.device("cpu") if first is None else first.device
    if isinstance(images, Dataset):
        source = InMemory(images.floats().images.to(device), images.labels.to(device))
        source.classes, source.files = images.classes, images.files
        return source
    return Streamed(images, device)


def _names(data: Any, count: int) -> tuple[list[str] | None, list[str] | None]:
    """Names of classes and files of a dataset such as Files or torchvision's ImageFolder, as far as it has them."""
    classes, samples = getattr(data, "classes", None), getattr(data, "samples", None)
    files = list(data.files) if isinstance(data, Files) else None
    if isinstance(samples, list) and isinstance(root := getattr(data, "root", None), str):
        # Samples of other datasets may be anything.
        paths = [sample[0] for sample in samples if isinstance(sample, tuple) and sample and isinstance(sample[0], str)]
        files = [os.path.relpath(path, root) for path in paths] if len(paths) == count else files
    return [str(name) for name in classes] if isinstance(classes, (list, tuple)) else None, files


def _check_loader(loader: DataLoader[Any]) -> None:
    """Raise unless a DataLoader returns every item of its dataset once, in any order."""
    expected = "a DataLoader that visits every item of its dataset once"
    sampler, count = loader.sampler, len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0  # type: ignore[arg-type]
    whole = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == count
    )
    if isinstance(loader.dataset, IterableDataset):
        return
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler or not whole:
        given = f"one with {type(sampler).__name__} and {type(loader.batch_sampler).__name__}"
        given = "one with batch_size=None" if loader.batch_size is None and loader.batch_sampler is None else given
        raise ValueError(message("evaluate", "images", f"{expected} (give a Subset for a part)", given))
    if loader.drop_last and count % loader.batch_size:
        raise ValueError(
            message("evaluate", "images", expected, f"one that drops the last {count % loader.batch_size}")
        )


def _add(digest: Any, tensor: Tensor, shape: Sequence[int]) -> None:
    """Add a tensor, or the first part of one of this shape."""
    digest.update(f"{tensor.dtype} {tuple(shape)}".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _checksum(image: Tensor) -> int:
    return zlib.crc32(_bytes(image))
