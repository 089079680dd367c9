"""Batches of images in [0, 1] on the networks' device, from tensors or from a torch dataset."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._core.checks import check_images, check_labels, check_not_empty, message
from .._core.files import describe
from ..randomness import derive_seed, seed_generators, seeded

Images: TypeAlias = Tensor | Dataset[Any]


class _Keyed(Dataset[Any]):
    """A dataset whose random numbers are a function of seed and item, instead of the process that reads it."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, i: int) -> Any:
        seed_generators(derive_seed(self.seed, i))
        return self.data[i]


class Feed:
    """The images of a training.

    Tensors are held on the networks' device, and uint8 tensors stay uint8. A torch dataset of (image, label) is read in
    every epoch by `workers` processes, which prepare pinned batches for a GPU, in the order of the training. Random
    augmentations by the global generators of torch, Python and NumPy are functions of seed, epoch and item, so that a
    training resumes to the same result with any number of workers.

    Args:
        function: name for error messages.
        images: float (N, C, H, W) in [0, 1] or uint8 (N, C, H, W); or a map-style dataset of such images (C, H, W) with
            integer labels.
        labels: int64 (N,); None for a dataset, which has its own, and for a training that does not use labels.
        device: device of the networks.
        workers: number of processes that read a dataset.

    Raises:
        TypeError, ValueError: `images` or `labels` are anything else; for a dataset, when they are read.
    """

    def __init__(
        self, function: str, images: Images, labels: Tensor | None, device: torch.device, workers: int = 4
    ) -> None:
        self.function, self.device, self.workers, self.images = function, device, workers, images
        # Number of the network's classes, set by check_labels.
        self.classes: int | None = None
        self.labeled = labels is not None or not isinstance(images, Tensor)
        if isinstance(images, Tensor):
            images = check_not_empty(function, "images", _check_pixels(function, images))
            # A graph behind the images would be freed by the first backward pass.
            self.images = images.detach().to(device)
            self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
            self.labels = check_labels(function, "labels", self.labels, images).to(device)
        elif isinstance(images, str) or not (hasattr(images, "__getitem__") and hasattr(images, "__len__")):
            expected = "a tensor, or a dataset with a length"
            raise TypeError(message(function, "images", expected, type(images).__name__))
        elif not len(images):
            raise ValueError(message(function, "images", "at least one", "none"))

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def first(self) -> Tensor:
        """The first image, (1, C, H, W)."""
        return next(self.batches([torch.zeros(1, dtype=torch.int64)], workers=0))[0]

    def check_labels(self, classes: int) -> None:
        """Raise ValueError unless all labels are below `classes`; a dataset's labels are checked when they are read."""
        if not self.labeled:
            raise ValueError(message(self.function, "labels", "given with a tensor of images", None))
        self.classes = classes
        if isinstance(self.images, Tensor):
            self._check(self.labels)

    def _check(self, labels: Tensor) -> None:
        low, high = (int(value) for value in labels.aminmax())
        if self.classes is not None and not 0 <= low <= high < self.classes:
            expected = f"class indices in [0, {self.classes}), as the classifier has {self.classes} logits"
            raise ValueError(message(self.function, "labels", expected, low if low < 0 else high))

    def description(self) -> str:
        """Identifies the data in a checkpoint: a hash of images, labels and their order.

        For a dataset without a method `description`, the hash covers the first image, and all labels if an attribute
        `targets` or `labels` holds them, otherwise up to 16 labels.
        """
        if isinstance(self.images, Tensor):
            return describe(self.images, self.labels)
        if callable(own := getattr(self.images, "description", None)):
            return f"{own()}"
        labels = getattr(self.images, "targets", getattr(self.images, "labels", None))
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):
            ids = torch.linspace(0, len(self) - 1, min(16, len(self))).long().tolist()
            with seeded(0):
                labels = torch.tensor([int(self.images[i][1]) for i in ids])
        return f"{type(self.images).__name__} {len(self)} {describe(self.first(), labels)}"

    def batches(
        self, ids: Sequence[Tensor], workers: int | None = None, seed: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, labels, ids) for each of the index tensors `ids`; `seed` is the key of a dataset's augmentations."""
        if isinstance(self.images, Tensor):
            # A single copy to the device instead of one per batch.
            for each in torch.cat(list(ids)).to(self.device).split([len(each) for each in ids]):
                yield _as_float(self.images[each]), self.labels[each], each
            return
        workers = self.workers if workers is None else workers
        loader = DataLoader(
            _Keyed(self.images, seed),
            batch_sampler=[each.tolist() for each in ids],
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            # Seeding the workers must not consume random numbers of the caller.
            generator=torch.Generator().manual_seed(0),
        )
        batches = iter(loader)
        for each in ids:
            # Without workers, this process reads, and its generators continue afterwards as before.
            with contextlib.nullcontext() if workers else seeded(seed):
                batch = next(batches)
            images, labels = self._checked(batch)
            yield (
                _as_float(images.to(self.device, non_blocking=True)),
                labels.to(self.device, torch.int64, non_blocking=True),
                each.to(self.device),
            )

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch of the dataset's items; its normalized images would train without an error."""
        images, labels, *_ = batch if isinstance(batch, (tuple, list)) and len(batch) > 1 else (None, None)
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            expected = "a dataset of (image, label), a tensor and an integer"
            parts = map(type, batch if isinstance(batch, (tuple, list)) else [batch])
            given = ", ".join(part.__name__ for part in parts)
            raise TypeError(message(self.function, "images", expected, f"batches of {given}"))
        if labels.is_floating_point() or labels.shape != (len(images),):
            expected = "one integer for each image"
            raise TypeError(message(self.function, "labels", expected, f"{labels.dtype} {tuple(labels.shape)}"))
        if self.classes is not None:
            self._check(labels)
        return _check_pixels(self.function, images), labels


def _check_pixels(function: str, images: Tensor) -> Tensor:
    """Raise unless images are uint8 (N, C, H, W), or as check_images has them."""
    if images.dtype != torch.uint8:
        return check_images(function, "images", images)
    if images.dim() != 4:
        raise ValueError(message(function, "images", "of shape (N, C, H, W)", tuple(images.shape)))
    return images


def _as_float(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()
