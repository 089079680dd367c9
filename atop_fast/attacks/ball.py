"""The ball around an image in which an attack searches: lengths, projections and random points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import project_l1, random_normal
from ..randomness import Tag, derive_seed, random_uniform

NORMS = ("Linf", "L2", "L1")
ORDERS = {"Linf": torch.inf, "L2": 2, "L1": 1}


@dataclass(frozen=True)
class Ball:
    """The images within `eps` of an image in a norm.

    Images and perturbations have shape (B, C, H, W), sample ids (B,). Random points are functions of (seed, sample id),
    clipped to [0, 1].

    Attributes:
        norm: one of NORMS.
        eps: radius, in units of [0, 1] pixels.
    """

    norm: str
    eps: float

    def length(self, delta: Tensor) -> Tensor:
        """The norm (B,) of each perturbation (B, C, H, W)."""
        return torch.linalg.vector_norm(delta.flatten(1), ORDERS[self.norm], dim=1)

    def project(self, x: Tensor, center: Tensor) -> Tensor:
        """The nearest image of the ball around `center`; for L2 the nearest point of the ball, clipped to [0, 1]."""
        if self.norm == "Linf":
            return torch.clamp(x, center - self.eps, center + self.eps).clamp_(0, 1)
        if self.norm == "L1":
            return project_l1(x, center, self.eps)
        delta = x - center
        scale = (self.eps / per_image(self.length(delta)).clamp_min(1e-12)).clamp_max(1)
        return (center + delta * scale).clamp_(0, 1)

    def nearest(self, x: Tensor, center: Tensor) -> Tensor:
        """x (B, C, H, W), where it lies in the ball around `center`; elsewhere its projection."""
        projected = self.project(x, center)
        if self.norm == "Linf":
            return projected
        return torch.where(per_image(self.length(x - center) <= self.eps), x, projected)

    def random_point(self, images: Tensor, seed: int | Tensor, sample_ids: Tensor) -> Tensor:
        """A uniformly random point of the ball around each image; for L1 the projection of Gaussian noise."""
        if self.norm == "L1":
            return self.project(images + _noise(images, seed, sample_ids), images)
        uniform = _uniform(images, seed, sample_ids)
        if self.norm == "Linf":
            return (images + self.eps * (2 * uniform - 1)).clamp_(0, 1)
        direction = _noise(images, derive_seed(seed, "direction"), sample_ids)
        radius = self.eps * uniform[:, :1, :1, :1] ** (1 / max(1, images.shape[1:].numel()))
        length = per_image(self.length(direction)).clamp_min(1e-12)
        return self.project(images + radius * direction / length, images)

    def surface_point(self, images: Tensor, seed: int | Tensor, sample_ids: Tensor) -> Tensor:
        """A random point of the ball's surface around each image; for L1 as `random_point`."""
        if self.norm == "L1":
            return self.random_point(images, seed, sample_ids)
        if self.norm == "Linf":
            direction = 2 * _uniform(images, seed, sample_ids) - 1
            direction /= per_image(self.length(direction)).clamp_min(1e-12)
            return (images + self.eps * direction).clamp_(0, 1)
        direction = _noise(images, seed, sample_ids)
        return (images + self.eps * direction / per_image(self.length(direction)).clamp_min(1e-12)).clamp_(0, 1)


def per_image(values: Tensor) -> Tensor:
    """Values (B,) as (B, 1, 1, 1), which broadcast with images."""
    return values[:, None, None, None]


def _uniform(images: Tensor, seed: int | Tensor, ids: Tensor) -> Tensor:
    return random_uniform(images.shape[1:], seed, ids, 0, Tag.START).to(images.dtype)


def _noise(images: Tensor, seed: int | Tensor, ids: Tensor) -> Tensor:
    return random_normal(images.shape[1:], seed, ids, 0, Tag.START).to(images.dtype)
