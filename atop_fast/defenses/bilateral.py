"""Gaussian noise and then repeated bilateral filters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._core.checks import check_float_tensor, check_integer, check_number, message
from ..ops import random_normal
from .base import ImageTransform


class NoisyBilateral(ImageTransform):
    """Noise that hides the perturbation, and bilateral filters, `repeats` times, that remove both.

    Args:
        sigma: standard deviation of the noise, in units of [0, 1] pixels; it is not clipped.
        repeats: number of filters, one after the other; the paper takes 20 to 100.
        radius: a pixel is an average over (2 radius + 1)^2 pixels.
        sigma_space: standard deviation of the weights over distances, in pixels.
        sigma_color: standard deviation of the weights over differences of color, in units of [0, 1] pixels.

    Calls are documented in RandomTransform.forward.

    Source: Stalder et al., A combination of noise and bilateral filters achieve supralinear and scalable adversarial
    robustness in CNNs, arXiv 2606.02267, 2026; Tomasi and Manduchi, ICCV 1998. The defaults are those of this library,
    for 32x32 pixels. The paper trains the network behind the filters adversarially; here, the caller trains it.
    """

    def __init__(
        self,
        sigma: float = 0.1,
        repeats: int = 20,
        radius: int = 1,
        sigma_space: float = 1.0,
        sigma_color: float = 0.1,
    ) -> None:
        super().__init__()
        name = "NoisyBilateral"
        self.sigma = check_number(name, "sigma", sigma, low=0)
        self.repeats = check_integer(name, "repeats", repeats, low=0)
        self.radius, self.sigma_space, self.sigma_color = _checked(name, radius, sigma_space, sigma_color)

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        x = x + self.sigma * random_normal(x.shape[1:], seed, sample_ids, draw).to(x.dtype)
        for _ in range(self.repeats):
            x = bilateral_filter(x, self.radius, self.sigma_space, self.sigma_color)
        return x


def bilateral_filter(x: Tensor, radius: int, sigma_space: float, sigma_color: float) -> Tensor:
    """Bilateral filter of images (B, C, H, W), border pixels repeated; differentiable once.

    y_p = sum_q w_pq x_q / sum_q w_pq,    w_pq = exp(-|p - q|^2 / (2 sigma_space^2) - |x_p - x_q|^2 / (2 sigma_color^2))

    over the (2 radius + 1)^2 pixels q around p; |x_p - x_q|^2 is summed over the channels. The backward pass keeps the
    images, not the weights.

    Args:
        x: floats (B, C, H, W), of any range.
        radius, sigma_space, sigma_color: see NoisyBilateral.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    name = "bilateral_filter"
    if check_float_tensor(name, "x", x).dim() != 4:
        raise ValueError(message(name, "x", "images of shape (B, C, H, W)", tuple(x.shape)))
    radius, sigma_space, sigma_color = _checked(name, radius, sigma_space, sigma_color)
    padded = F.pad(x, (radius,) * 4, mode="replicate")
    result: Tensor = _Bilateral.apply(padded, radius, sigma_space, sigma_color)
    return result


def _checked(name: str, radius: int, sigma_space: float, sigma_color: float) -> tuple[int, float, float]:
    return (
        check_integer(name, "radius", radius, low=1),
        check_number(name, "sigma_space", sigma_space, low=1e-3),
        check_number(name, "sigma_color", sigma_color, low=1e-3),
    )


class _Bilateral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, radius: int, sigma_space: float, sigma_color: float) -> Tensor:
        size = (padded.shape[2] - 2 * radius, padded.shape[3] - 2 * radius)
        center = padded[:, :, radius : radius + size[0], radius : radius + size[1]]
        total, weights = torch.zeros_like(center), torch.zeros_like(center[:, :1])
        for rows, columns, near in _windows(size, radius, sigma_space):
            other = padded[:, :, rows, columns]
            weight = near * torch.exp((other - center).square().sum(1, keepdim=True) / (-2 * sigma_color**2))
            total += weight * other
            weights += weight
        y = total / weights
        ctx.save_for_backward(padded, y, weights)
        ctx.options = (radius, sigma_space, sigma_color)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        padded, y, weights = ctx.saved_tensors
        radius, sigma_space, sigma_color = ctx.options
        size, inner = y.shape[2:], slice(radius, -radius)
        center, dx, scaled = padded[:, :, inner, inner], torch.zeros_like(padded), dy / weights
        for rows, columns, near in _windows(size, radius, sigma_space):
            other = padded[:, :, rows, columns]
            difference = other - center
            weight = near * torch.exp(difference.square().sum(1, keepdim=True) / (-2 * sigma_color**2))
            # dL/dw_pq, then through w_pq: to x_q with minus this sign, to x_p with plus.
            dw = (scaled * (other - y)).sum(1, keepdim=True)
            through = (dw * weight / sigma_color**2) * difference
            dx[:, :, rows, columns] += weight * scaled - through
            dx[:, :, inner, inner] += through
        return dx, None, None, None


def _windows(size: Any, radius: int, sigma_space: float) -> Iterator[tuple[slice, slice, float]]:
    """The slices of the pixels q in the padded images, and their weights by distance."""
    for i in range(2 * radius + 1):
        for j in range(2 * radius + 1):
            distance = (i - radius) ** 2 + (j - radius) ** 2
            yield slice(i, i + size[0]), slice(j, j + size[1]), math.exp(-distance / (2 * sigma_space**2))
