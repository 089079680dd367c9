"""A random series of transforms with random parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_integer
from ..ops import random_normal
from ..randomness import Tag, derive_seed, random_ranks, random_uniform
from .base import ImageTransform, column
from .smooth import blurred


class RandomSeries(ImageTransform):
    """Between 0 and `most` of seven transforms, one after the other, in random order, each with random parameters.

    Args:
        most: largest number of transforms, 1 to 7; each sample and draw has its own number, uniform in 0..most, its own
            choice and its own order.

    Calls are documented in RandomTransform.forward. Pixels are clipped to [0, 1] after each transform.

    Source: Raff et al., Barrage of random transforms for adversarially robust defense, CVPR 2019. The paper draws from
    ten groups of transforms, some without gradients, and trains the classifier on them. This class has seven
    groups with gradients, one transform each.
    """

    def __init__(self, most: int = 5) -> None:
        super().__init__()
        self.most = check_integer("RandomSeries", "most", most, low=1, high=len(STEPS))

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        key = (derive_seed(seed, "series"), sample_ids, draw)
        ranks = random_ranks(len(STEPS), *key, Tag.ORDER)
        parameters = random_uniform((len(STEPS) + 1, 4), *key, Tag.RATIO)
        count = (parameters[:, -1, 0] * (self.most + 1)).long()
        for position in range(self.most):
            for number, step in enumerate(STEPS):
                rows = ((ranks[:, number] == position) & (position < count)).nonzero()[:, 0]
                if len(rows):
                    part = (seed, sample_ids[rows], draw.expand(len(x))[rows])
                    changed = step(x[rows], parameters[rows, number].to(x.dtype), part)
                    x = x.index_copy(0, rows, changed.clamp(0, 1))
        return x


# Images (B, C, H, W), four uniform numbers for each, (B, 4), and the key of more.
Key = tuple[Tensor, Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Key], Tensor]


def noise(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Gaussian noise of sigma 0 to 0.1."""
    return x + column(0.1 * u[:, 0], x) * random_normal(x.shape[1:], *key).to(x.dtype)


def swirl(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Rotation around a random point, by an angle that decreases with the distance: scikit-image's swirl.

    Strength 0.01 to 2, radius 0.05 to 0.9 of the image's side.
    """
    rows, columns = _grid(x)
    strength, radius = 0.01 + 1.99 * u[:, 0], (0.05 + 0.85 * u[:, 1]) * max(x.shape[2:]) * math.log(2) / 5
    down, right = (axis - column(u[:, k], x)[:, 0] * axis.numel() for k, axis in ((2, rows), (3, columns)))
    angle = column(strength, x)[:, 0] * torch.exp(-(down**2 + right**2).sqrt() / column(radius, x)[:, 0])
    cosine, sine = angle.cos(), angle.sin()
    return _sampled(x, rows + (cosine - 1) * down + sine * right, columns + (cosine - 1) * right - sine * down)


def zoom(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Cropping by up to 15 % on each side, and resizing to the original size."""
    rows, columns = _grid(x)
    top, bottom, left, right = (column(0.15 * u[:, k], x)[:, 0] for k in range(4))
    rows, columns = top * x.shape[2] + rows * (1 - top - bottom), left * x.shape[3] + columns * (1 - left - right)
    return _sampled(x, *torch.broadcast_tensors(rows, columns))


def color(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Up to 0.05 added to each of Y, U and V, or to each channel if there are not three."""
    shift = 0.1 * u - 0.05
    if x.shape[1] != 3:
        return x + shift[:, torch.arange(x.shape[1], device=x.device) % 4, None, None]
    y, cb, cr = shift[:, 0], shift[:, 1], shift[:, 2]
    return x + torch.stack((y + 1.13983 * cr, y - 0.39465 * cb - 0.5806 * cr, y + 2.03211 * cb), 1)[:, :, None, None]


def contrast(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Contrast: 0.7 to 1.3 times the difference from the image's mean."""
    # In float64, so that rounding does not depend on the batch.
    mean = column(x.flatten(1).double().mean(dim=1), x)
    return mean + column(0.7 + 0.6 * u[:, 0], x) * (x - mean)


def gray(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Mixture, by a random share, with a gray image of random channel weights."""
    weights = u[:, torch.arange(x.shape[1], device=x.device) % 3]
    weights = (weights / weights.sum(dim=1, keepdim=True))[:, :, None, None]
    return x + column(u[:, 3], x) * ((weights * x).sum(dim=1, keepdim=True) - x)


def blur(x: Tensor, u: Tensor, key: Key) -> Tensor:
    """Gaussian blur of sigma 0.2 to 1 pixels."""
    return blurred(x, 0.2 + 0.8 * u[:, 0])


STEPS: tuple[Step, ...] = (noise, swirl, zoom, color, contrast, gray, blur)


def _grid(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centers of the rows (H, 1) and columns (1, W), in pixels from the border."""
    rows, columns = (torch.arange(size, device=x.device, dtype=x.dtype) + 0.5 for size in x.shape[2:])
    return rows[:, None], columns[None, :]


def _sampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Bilinear values of the images at positions (B, H, W), in pixels from the border; border pixels are repeated."""
    grid = torch.stack((2 * columns / x.shape[3] - 1, 2 * rows / x.shape[2] - 1), dim=3)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
