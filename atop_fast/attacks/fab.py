"""FAB-T (Croce & Hein, ICML 2020): the fast adaptive boundary attack, targeted, which looks for the nearest point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._core.checks import check_integer, check_number
from ..ops import hyperplane_step, random_normal
from ..randomness import Tag, random_uniform
from .ball import per_image
from .base import Attack, initial_state
from .gradient import GradientEstimator
from .losses import likeliest_others
from .network import Model
from .queue import Batch, State
from .trace import Callback


class FAB(Attack):
    """Projections onto the linearized decision boundary between the class y and a target class.

        d1, d2 = smallest steps from x, x0 to { z : f(x) + grad f(x) . (z - x) = 0 },   f = z_target - z_y
        x <- clip((1 - a)(x + eta d1) + a (x0 + eta d2)),   a = min(|d1| / (|d1| + |d2|), alpha_max)
        x <- x0 + beta (x - x0)   where x is adversarial                  Croce & Hein, 2020, algorithm 1

    The attack minimizes the norm. Its result is the nearest adversarial point that it met, if that is within eps,
    and the image itself otherwise. Targeted only: the untargeted FAB needs the gradients of all logits in every step.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        steps: iterations against each target class; each takes two forward passes and one backward.
        n_restarts: number of runs; all but the first take the images that were not fooled before, and start from
            random points at distance eps / 2.
        alpha_max, eta, beta: see above.
        target_classes: number of target classes: the most likely ones besides y, by the clean image's logits, one
            after the other; an image that is fooled within eps skips the rest.
        eot_iter: draws of the model in each gradient, which is their mean. With a random defense, a point is
            adversarial if more than half of as many other draws are misclassified.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image is done at its first adversarial point within eps, which is not the nearest. For
            deterministic models.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, mask=None); `start`, if it is given, is the
    starting point of the first run against each class. An image that is misclassified is returned unchanged.
    """

    norms = ("Linf", "L2", "L1")
    loss = "margin"
    has_targets = False

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        *,
        target_classes: int = 9,
        eot_iter: int = 1,
        gradient: str = "exact",
        substitute: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        early_stop: bool = False,
        precision: str = "float32",
        callback: Callback | None = None,
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            steps=steps,
            eot_iter=eot_iter,
            gradient=gradient,
            substitute=substitute,
            seed=seed,
            max_batch=max_batch,
            early_stop=early_stop,
            precision=precision,
            callback=callback,
        )
        self.target_classes = check_integer("FAB", "target_classes", target_classes, low=1)
        self.n_restarts = check_integer("FAB", "n_restarts", n_restarts, low=1)
        self.alpha_max = check_number("FAB", "alpha_max", alpha_max, low=0, high=1)
        self.eta = check_number("FAB", "eta", eta, low=0)
        self.beta = check_number("FAB", "beta", beta, low=0, high=1)

    def rank(self, judge: GradientEstimator, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """An unchanged image is not fooled; any other image is, and its first result is kept."""
        unchanged = (candidates == batch.images).flatten(1).all(dim=1).float()
        return unchanged, torch.zeros_like(unchanged)

    def restart_from(self, seed: int, images: Tensor, ids: Tensor) -> Tensor:
        if self.norm == "Linf":
            direction = 2 * random_uniform(images.shape[1:], seed, ids, 0, Tag.START) - 1
        else:
            direction = random_normal(images.shape[1:], seed, ids, 0, Tag.START)
        direction = direction.to(images.dtype)
        length = per_image(self.ball.length(direction)).clamp_min(1e-12)
        return (images + self.eps / 2 * direction / length).clamp_(0, 1)

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, labels, ids, start = batch
        state = initial_state(batch, images)
        state["start"] = images if start is None else start
        logits = estimator.logits(images, ids, state["t"])
        correct = (logits.argmax(dim=2) == labels[:, None]).float().mean(dim=1)
        state["targets"] = likeliest_others(logits.mean(dim=1), labels)[:, : self.target_classes]
        # A replayed step keeps all types, and norms of float64 images are float64.
        state["norm"] = torch.full_like(correct, torch.inf, dtype=torch.promote_types(images.dtype, torch.float32))
        state["done"] = correct < 0.5
        return state

    def step(self, estimator: GradientEstimator, state: State) -> None:
        x0, labels, ids, t = state["x0"], state["labels"], state["ids"], state["t"]
        classes = state["targets"].shape[1]
        number = (t // self.steps).clamp_max(classes - 1)
        target = state["targets"].gather(1, number[:, None])[:, 0]
        x = self.within_mask(state, torch.where(per_image(t % self.steps == 0), state["start"], state["x"]))
        gradient, gap, _ = estimator(x, labels, ids, 2 * t, target)
        assert gradient is not None
        moved = self.within_mask(state, self._moved(x, x0, self.masked(state, gradient), gap))
        fooled = estimator.evaluate(moved, labels, ids, 2 * t + 1).correct < 0.5
        norm = self.ball.length(moved - x0)
        nearer = fooled & (norm <= self.eps) & (norm < state["norm"]) & ~state["done"]
        state["best"] = torch.where(per_image(nearer), moved, state["best"])
        state["norm"] = torch.where(nearer, norm, state["norm"])
        self.observe(gap, state["norm"].isinf().float())
        back = torch.where(per_image(fooled), x0 + (moved - x0) * self.beta, moved)
        state["x"] = torch.where(per_image(state["done"]), state["x"], back)
        state["t"] = t = t + ~state["done"]
        over = (t % self.steps == 0) | self.early_stop
        state["done"] = state["done"] | (over & (state["norm"] < torch.inf)) | (t >= classes * self.steps)

    def _moved(self, x: Tensor, x0: Tensor, gradient: Tensor, gap: Tensor) -> Tensor:
        """The next point, given f and its gradient at x."""
        w, gap = (torch.nan_to_num(v, nan=0, posinf=0, neginf=0) for v in (gradient.flatten(1), gap))
        # From x, f must change by -f; from x0, by that and the way from x0 to x.
        change = torch.cat((-gap, (w * (x - x0).flatten(1)).sum(dim=1) - gap)).to(w.dtype)
        both = torch.cat((x, x0))
        steps = hyperplane_step(self.norm, both.flatten(1), torch.cat((w, w)), change).view_as(both)
        size1, size2 = per_image(self.ball.length(steps)).clamp_min(1e-8).chunk(2)
        alpha = (size1 / (size1 + size2)).clamp_max(self.alpha_max)
        ahead = (both + self.eta * steps).chunk(2)
        return torch.lerp(*ahead, alpha).clamp_(0, 1)
