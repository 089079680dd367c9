"""Images with their labels, class names and file names in one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._core.checks import message
from .._core.files import write_atomic
from ..data import Dataset


def save_images(path: Path, data: Dataset) -> None:
    """Write images, as bytes, with their labels, classes and, if known, file names; atomic."""
    images = data.images if data.images.dtype == torch.uint8 else (data.images * 255).round().to(torch.uint8)
    tensors = {"images": images.cpu().contiguous(), "labels": data.labels.cpu().contiguous()}
    metadata = {"classes": json.dumps(data.classes), "files": json.dumps(data.files)}
    write_atomic(path, lambda file: save_file(tensors, str(file), metadata))


def read_images(path: str | Path) -> Dataset:
    """The images in a file of save_images, uint8.

    Raises:
        ValueError: no such file, or one with something else in it.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            images, labels = (file.get_tensor(name) for name in ("images", "labels"))
            metadata = file.metadata() or {}
            classes, files = json.loads(metadata["classes"]), json.loads(metadata.get("files", "null"))
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise ValueError("its images are not uint8 of shape (N, C, H, W)")
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not names")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError("its labels are not one int64 for each image")
        if int(labels.min()) < 0 or int(labels.max()) >= len(classes):
            raise ValueError("its labels are not indices into its classes")
        if files is not None and (
            not isinstance(files, list) or len(files) != len(images) or not all(isinstance(name, str) for name in files)
        ):
            raise ValueError("its files are not one name for each image")
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            message("read_images", "path", "a file of images of atop-fast", f"{path} ({reason})")
        ) from error
    return Dataset(images, labels, tuple(classes), None if files is None else tuple(files))
