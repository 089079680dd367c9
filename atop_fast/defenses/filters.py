"""One of a few small residual filters, drawn for each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_integer, message
from ..defense import Defense
from ..randomness import Tag, key_tensors, random_bits
from .base import ImageTransform


class FilterDraw(ImageTransform):
    """Draws one of `count` filters for the ResidualFilters behind it; the images are not changed.

    Args:
        count: number of filters, all equally likely.

    Calls are documented in RandomTransform.forward, except that the mask holds the number of the filter, 0..count-1.
    """

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.count = check_integer("FilterDraw", "count", count, low=1, high=256)

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        return x

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.forward."""
        corrupted = super().forward(x, seed, sample_ids, draw)
        key = key_tensors("FilterDraw", len(x), x.device, seed, sample_ids, draw)
        number = random_bits(1, *key, Tag.MASK)[:, 0] * self.count >> 32
        corrupted[:, -1] = number[:, None, None].to(corrupted.dtype)
        return corrupted


class ResidualFilters(nn.Module):
    """x + conv(relu(conv(x))), 3x3, one of `count` such filters for each image: the purifier behind a FilterDraw.

    Args:
        count: number of filters, as in FilterDraw.
        channels: C of the images.
        width: channels inside of a filter; 16 makes the paper's 883 parameters.

    It maps (B, C + 2, H, W), whose last channel holds the number of each image's filter, to (B, C, H, W): NaN for a
    number >= count, which a FilterDraw of more filters draws. All filters run on all images, so that rounding does not
    depend on what other images have drawn.

    Source: Guesmi and Shafique, DRIFT: Divergent response in filtered transformations, ICLR 2026. Its training, which
    separates the filters' Jacobians and logits, is not part of this module: `finetune` trains the filters on an attack
    of the whole Defense. Untrained filters are close to the identity.
    """

    def __init__(self, count: int = 4, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        name = "ResidualFilters"
        check_integer(name, "count", count, low=1, high=256)
        check_integer(name, "channels", channels, low=1)
        check_integer(name, "width", width, low=1)
        self.count, self.channels = count, channels
        self.first = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for _ in range(count))
        self.second = nn.ModuleList(nn.Conv2d(width, channels, 3, padding=1) for _ in range(count))
        with torch.no_grad():
            for conv in self.second:
                conv.weight.mul_(0.1)  # type: ignore[union-attr, operator]
                conv.bias.zero_()  # type: ignore[union-attr, operator]

    def forward(self, z: Tensor) -> Tensor:
        if z.shape[1] != self.channels + 2:
            raise ValueError(message("ResidualFilters", "z", f"of {self.channels + 2} channels", tuple(z.shape)))
        x, number = z[:, : self.channels], z[:, -1, :1, :1, None]
        result = x
        for k, (first, second) in enumerate(zip(self.first, self.second, strict=True)):
            result = result + torch.where(number == k, second(F.relu(first(x))), 0)
        # An error here would wait for a GPU, and NaN in logits is one.
        return torch.where(number < self.count, result, torch.nan)


def mean_logits(defense: Defense, images: Tensor) -> Tensor:
    """The exact mean of the logits (B, classes) over all filters, which EOT estimates from draws.

    Args:
        defense: Defense(FilterDraw(n), ResidualFilters(n), classifier).
        images: (B, C, H, W), floats in [0, 1].

    `lambda x: mean_logits(defense, x)` is a deterministic model for attacks, whose candidates the Defense is judged on.

    Raises:
        TypeError: `defense` is not such a Defense.
    """
    drawn = isinstance(defense, Defense) and type(defense.transform) is FilterDraw and defense.purifier is not None
    if not drawn or getattr(defense.classifier, "keyed", False):
        expected = "a Defense of FilterDraw, ResidualFilters and a classifier that does not draw"
        raise TypeError(message("mean_logits", "defense", expected, repr(defense)))
    assert isinstance(defense.transform, FilterDraw)
    assert defense.purifier is not None
    corrupted, total = defense.transform(images), 0
    for k in range(defense.transform.count):
        chosen = torch.cat((corrupted[:, :-1], torch.full_like(corrupted[:, -1:], k)), dim=1)
        total = total + defense.classifier((defense.purifier(chosen) + 1) / 2)
    return total / defense.transform.count
