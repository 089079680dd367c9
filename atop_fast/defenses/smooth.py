"""Total-variation smoothing of images with randomly dropped pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_integer, check_number
from ..randomness import Tag, random_uniform
from .base import ImageTransform, column


class TotalVariation(ImageTransform):
    """An image with small total variation that is close to the pixels that were not dropped.

        argmin_z  1/2 sum_p kept_p (z_p - x_p)^2 + weight sum_p sqrt(|grad z|_p^2 + smooth^2)

    Args:
        weight: how much total variation counts; 0 with drop=0 returns the images.
        drop: share of values that are dropped, each independently, in [0, 1); 0 makes the transform deterministic.
        steps: accelerated gradient steps towards the minimum, all of which are differentiated.
        smooth: width of the rounded corner of the absolute value, in units of [0, 1] pixels.

    Calls are documented in RandomTransform.forward.

    Source: Guo et al., Countering adversarial images using input transformations, ICLR 2018 (weight 0.03, drop 0.5);
    Rudin et al., Physica D, 1992. The paper solves for the unsmoothed variation by split Bregman; here, a fixed number
    of steps (Nesterov, 1983) keeps gradients exact.
    """

    def __init__(self, weight: float = 0.03, drop: float = 0.5, steps: int = 30, smooth: float = 0.03) -> None:
        super().__init__()
        name = "TotalVariation"
        self.weight = check_number(name, "weight", weight, low=0)
        self.drop = check_number(name, "drop", drop, low=0, high=1 - 1e-6)
        self.steps = check_integer(name, "steps", steps, low=0)
        self.smooth = check_number(name, "smooth", smooth, low=1e-6)

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        kept = torch.ones_like(x)
        if self.drop:
            kept = (random_uniform(x.shape[1:], seed, sample_ids, draw, Tag.MASK) >= self.drop).to(x.dtype)
        return smoothed(x, kept, self.weight, self.steps, self.smooth)


def smoothed(x: Tensor, kept: Tensor, weight: float, steps: int, smooth: float) -> Tensor:
    """TotalVariation of images x (B, C, H, W), of which the values with kept = 0 are not used."""
    # Start from the neighbors' mean, because gradient steps fill a dropped pixel slowly.
    one, few = x.new_ones(len(x)), 1e-3
    filled = (blurred(x * kept, one) + 0.5 * few) / (blurred(kept, one) + few)
    z = ahead = torch.where(kept > 0, x, filled)
    # The Lipschitz constants of the two gradients: 1 and 8 weight / smooth.
    rate, t = 1 / (1 + 8 * weight / smooth), 1.0
    for _ in range(steps):
        step = ahead - rate * (kept * (ahead - x) + weight * variation_gradient(ahead, smooth))
        following = (1 + (1 + 4 * t * t) ** 0.5) / 2
        z, ahead, t = step, step + (t - 1) / following * (step - z), following
    return z


def variation_gradient(z: Tensor, smooth: float) -> Tensor:
    """Gradient of sum_p sqrt(|grad z|_p^2 + smooth^2), with forward differences that are 0 at the border."""
    down = F.pad(z[:, :, 1:] - z[:, :, :-1], (0, 0, 0, 1))
    right = F.pad(z[:, :, :, 1:] - z[:, :, :, :-1], (0, 1))
    norm = (down.square() + right.square() + smooth**2).sqrt()
    down, right = down / norm, right / norm
    return F.pad(down, (0, 0, 1, 0))[:, :, :-1] - down + F.pad(right, (1, 0))[:, :, :, :-1] - right


def blurred(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur (5, 5) of images (B, C, H, W), with a sigma (B,) in pixels for each; border pixels are repeated."""
    offsets = torch.arange(-2, 3, device=x.device)
    weights = torch.exp(-(offsets**2) / (2 * sigma.to(x.dtype)[:, None] ** 2))
    weights = weights / weights.sum(dim=1, keepdim=True)
    for dim, border in ((2, (0, 0, 2, 2)), (3, (2, 2, 0, 0))):
        padded, size = F.pad(x, border, mode="replicate"), x.shape[dim]
        x = column(weights[:, 0], x) * padded.narrow(dim, 0, size)
        for k in range(1, 5):
            x = x + column(weights[:, k], x) * padded.narrow(dim, k, size)
    return x
