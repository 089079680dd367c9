"""Folders with a sub-folder of images for each class: their layout, and the reading of one image."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .checks import message
from .files import identify

# Names of sub-folders that are splits rather than classes, in order of preference.
PARTS = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}
# Folders that operating systems create; names that begin with a dot are hidden, too.
HIDDEN = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found")


class Folder:
    """The image files in a folder with a sub-folder for each class; hidden files and folders are ignored.

    Args:
        root: the folder.
        transform: applied to each PIL image.

    Raises:
        OSError: the folder does not exist or holds no images, or a class has none.
    """

    def __init__(self, root: str | Path, transform: Callable[[Any], Any]) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

        self.root, self.transform = os.path.expanduser(root), transform
        self.classes = sorted(_folders(self.root))
        if not self.classes:
            raise FileNotFoundError("it has no sub-folder")

        def is_image(path: str) -> bool:
            hidden = any(map(_hidden, os.path.relpath(path, self.root).split(os.sep)))
            return not hidden and has_file_allowed_extension(path, IMG_EXTENSIONS)

        indices = {name: index for index, name in enumerate(self.classes)}
        self.samples = make_dataset(self.root, indices, is_valid_file=is_image)
        self.targets = [label for _, label in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        path, label = self.samples[i]
        return self.transform(_read_image(path)), label


def find_parts(path: str | Path) -> dict[str, str]:
    """The training split of a folder and, if present, its test split; empty if the sub-folders are classes.

    Raises:
        ValueError: the folder has both splits and further sub-folders, or its splits hold no classes.
    """
    root = os.path.expanduser(path)
    try:
        folders = {name.casefold(): os.path.join(root, name) for name in _folders(root)}
    except OSError:
        return {}
    found = {part: [folders[name] for name in names if name in folders] for part, names in PARTS.items()}
    if not found["train"] or not (found["test"] or len(folders) == 1):
        return {}
    expected = "a folder whose sub-folders are classes, or parts such as train and test with classes in them"
    if not _folders(found["train"][0]):
        # Next to other classes, "train" may be the name of a class.
        if len(folders) > sum(map(len, found.values())):
            return {}
        raise ValueError(message("load_data", "source", expected, f"{path}, whose parts have no sub-folders"))
    if others := sorted(folders.keys() - {name for names in PARTS.values() for name in names}):
        raise ValueError(message("load_data", "source", expected, f"{path}, with {others[0]!r} beside these"))
    tests = [folder for folder in found["test"] if _folders(folder)]
    return {"train": found["train"][0], **({"test": tests[0]} if tests else {})}


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the OSError of a folder without images into a ValueError that names it."""
    try:
        yield
    except OSError as error:
        # The folder does not exist or holds no images.
        expected = "a folder with a sub-folder of images for each class"
        raise ValueError(message("image_folder", "path", expected, f"{path} ({error})")) from error


def _read_image(path: str) -> Any:
    """Read a file as a PIL image in RGB."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode[0] in "IF":
                    raise ValueError(f"of mode {image.mode}, which is not of 8 bits")
                # Going through RGBA avoids Pillow's warning about palettes with transparency.
                return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except Exception as error:
        # Decoders raise many exception types for damaged files; all mean the same to the caller.
        given = f"{path} ({identify(Path(path)) or error})"
        raise ValueError(message("image_folder", "path", "a folder of readable images", given)) from error


def _folders(path: str | Path) -> list[str]:
    return [entry.name for entry in os.scandir(path) if entry.is_dir() and not _hidden(entry.name)]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN
