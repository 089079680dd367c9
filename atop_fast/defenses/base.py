"""Base class of defenses that turn images into images."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._images import memory_format
from ..ops.corrupt import check_x
from ..randomness import key_tensors
from ..transforms import RandomTransform


class ImageTransform(RandomTransform):
    """A random function from images to images, for `Defense(transform, None, classifier)`.

    A subclass defines `images`. If its attributes are named like the parameters of its constructor, and it is added to
    transforms.TRANSFORMS, save_defense and load_defense work.
    """

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """The transformed images.

        Args:
            x: images (B, C, H, W), floats in [0, 1].
            seed: int64 (); sample_ids: int64 (B,); draw: int64 () or (B,): the key, of which all random numbers must
                be functions (atop_fast.randomness).

        Returns:
            (B, C, H', W'), differentiable in `x`.
        """
        raise NotImplementedError

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.forward; the mask is 0 everywhere."""
        name = type(self).__name__
        check_x(name, x)
        key = key_tensors(name, len(x), x.device, seed, sample_ids, draw)
        image = 2 * self.images(x.float() / 255 if x.dtype == torch.uint8 else x, *key) - 1
        plane = torch.zeros_like(image[:, :1])
        corrupted = torch.cat((image, torch.ones_like(plane), plane), dim=1)
        return corrupted.contiguous(memory_format=memory_format(x))

    def target(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.target: the images themselves."""
        return 2 * (x.float() / 255 if x.dtype == torch.uint8 else x) - 1


def column(values: Tensor, like: Tensor) -> Tensor:
    """One number for each sample (B,) as (B, 1, 1, 1), in the dtype of `like`."""
    return values.to(like.dtype)[:, None, None, None]
