"""FGSM (Goodfellow et al., ICLR 2015) and PGD (Madry et al., ICLR 2018) in the Linf and L2 balls, with EOT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_images, check_integer, check_labels, check_number
from ..ops import pgd_step_linf_, random_normal
from ..randomness import Tag, check_keys, derive_seed, random_uniform
from .gradient import GradientEstimator, Model, draw_logits, frozen

NORMS = ("Linf", "L2")


class PGD:
    """Projected gradient ascent on the cross-entropy.

        Linf: x <- clip(x + alpha sign(g), x0 +- eps)        L2: x <- project(x + alpha g / |g|_2, ball of radius eps)

    each clipped to [0, 1], with g the GradientEstimator's gradient.

    Args:
        model: a Defense, or any callable from images in [0, 1] to logits.
        norm: "Linf" or "L2".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        alpha: step size in the same unit; default 2.5 * eps / steps.
        steps: gradient steps.
        restarts: independent runs; the candidate of an image is the one that is classified correctly in the fewest of
            `selection_draws` draws that no attack step has seen, ties broken by the larger mean cross-entropy.
        random_start: start from a uniformly random point of the ball instead of the image; restarts always do.
        eot_iter, gradient, max_batch: see GradientEstimator (`gradient` is its mode).
        selection_draws: draws of the choice among restarts.
        seed: key of the random starts and of the attack's draws.

    Called as `attack(images, labels)`; the model's mode and requires_grad flags are left as they were.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 20,
        restarts: int = 1,
        random_start: bool = True,
        eot_iter: int = 1,
        gradient: str = "exact",
        selection_draws: int = 8,
        seed: int = 0,
        max_batch: int = 1024,
    ) -> None:
        name = type(self).__name__
        self.norm = check_choice(name, "norm", norm, NORMS)
        self.eps = check_number(name, "eps", eps, low=0)
        self.steps = check_integer(name, "steps", steps, low=1)
        self.alpha = 2.5 * eps / steps if alpha is None else check_number(name, "alpha", alpha, low=0)
        self.restarts = check_integer(name, "restarts", restarts, low=1)
        self.selection_draws = check_integer(name, "selection_draws", selection_draws, low=1)
        self.seed = check_integer(name, "seed", seed)
        self.random_start = bool(random_start)
        self.estimator = GradientEstimator(model, gradient, eot_iter, max_batch)

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """Adversarial images.

        Args:
            images: float (B, C, H, W) in [0, 1].
            labels: int64 (B,), the true classes.
            sample_ids: int64 (B,), the identity of every image; default 0..B-1. With it, an image's result does not
                depend on the other images of the batch beyond rounding.

        Returns:
            Images of the same shape within eps of `images` and in [0, 1].

        Raises:
            TypeError, ValueError: naming the argument that is wrong.
        """
        name = type(self).__name__
        check_images(name, "images", images)
        check_labels(name, "labels", labels, images)
        ids, _ = check_keys(name, len(images), images.device, self.seed, sample_ids, 0)
        images = images.detach()
        if not len(images):
            return images.clone()
        with frozen(self.estimator.model):
            candidates = [self._run(images, labels, ids, restart) for restart in range(self.restarts)]
            return candidates[0] if self.restarts == 1 else self._select(candidates, labels, ids)

    def __repr__(self) -> str:
        options = {k: v for k, v in vars(self).items() if k != "estimator"}
        options |= {"eot_iter": self.estimator.eot_iter, "gradient": self.estimator.mode}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"

    def _run(self, images: Tensor, labels: Tensor, ids: Tensor, restart: int) -> Tensor:
        x = self._start(images, ids, restart) if self.random_start or restart else images.clone()
        for step in range(restart * self.steps, (restart + 1) * self.steps):
            g = self.estimator(x, labels, self.seed, ids, step)
            if self.norm == "Linf":
                pgd_step_linf_(x, g, images, self.alpha, self.eps)
            else:
                g = torch.nan_to_num(g)
                x = _project_l2(x + self.alpha * g / _norm(g).clamp_min(1e-12), images, self.eps)
        return x

    def _start(self, images: Tensor, ids: Tensor, restart: int) -> Tensor:
        """A uniformly random point of the ball, clipped to [0, 1]."""
        shape = images.shape[1:]
        uniform = random_uniform(shape, self.seed, ids, restart, Tag.START).to(images.dtype)
        if self.norm == "Linf":
            return (images + self.eps * (2 * uniform - 1)).clamp_(0, 1)
        direction = random_normal(shape, derive_seed(self.seed, "direction"), ids, restart, Tag.START).to(images.dtype)
        radius = self.eps * uniform[:, :1, :1, :1] ** (1 / max(1, shape.numel()))
        return _project_l2(images + radius * direction / _norm(direction).clamp_min(1e-12), images, self.eps)

    def _select(self, candidates: list[Tensor], labels: Tensor, ids: Tensor) -> Tensor:
        seed, draws = derive_seed(self.seed, "selection"), range(self.selection_draws)
        correct, loss = [], []
        for x in candidates:
            logits = draw_logits(self.estimator.model, x, seed, ids, draws, self.estimator.max_batch)
            target = labels[:, None].expand(logits.shape[:2])
            correct.append((logits.argmax(dim=2) == target).float().mean(dim=1))
            loss.append(
                F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(1)
            )
        fewest = torch.stack(correct)
        rank = torch.stack(loss).masked_fill(fewest > fewest.amin(dim=0), -torch.inf)
        return torch.stack(candidates)[rank.argmax(dim=0), torch.arange(len(labels), device=labels.device)]


class FGSM(PGD):
    """One signed (Linf) or normalised (L2) gradient step of size eps from the image. See PGD for the arguments."""

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        eot_iter: int = 1,
        gradient: str = "exact",
        seed: int = 0,
        max_batch: int = 1024,
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            alpha=eps,
            steps=1,
            random_start=False,
            eot_iter=eot_iter,
            gradient=gradient,
            seed=seed,
            max_batch=max_batch,
        )


def _norm(x: Tensor) -> Tensor:
    """L2 norm of every sample, (B, 1, 1, 1)."""
    return x.flatten(1).norm(dim=1)[:, None, None, None]


def _project_l2(x: Tensor, center: Tensor, eps: float) -> Tensor:
    delta = x - center
    return (center + delta * (eps / _norm(delta).clamp_min(1e-12)).clamp_max(1)).clamp(0, 1)
