"""FGSM (Goodfellow et al., ICLR 2015), PGD (Madry et al., ICLR 2018) and MI-FGSM (Dong et al., CVPR 2018), with EOT."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_choice, check_flag, check_integer, check_number
from ..ops import pgd_step_l2, pgd_step_linf
from .ball import per_image
from .base import MAX_LENGTH, Attack, initial_state
from .gradient import GradientEstimator
from .network import Model
from .queue import Batch, State
from .trace import Callback

SCHEDULES = ("constant", "cosine")


class PGD(Attack):
    """Projected gradient ascent on the cross-entropy.

        Linf: x <- clip(x + alpha sign(g), x0 +- eps)        L2: x <- project(x + alpha g / |g|_2, ball of radius eps)

    each clipped to [0, 1], with g the GradientEstimator's gradient (Madry et al., 2018, equation 2). With momentum
    the step goes along m instead of g (Dong et al., 2018, equation 6), with m = 0 at the start:

        m <- momentum m + g / mean|g|

    With a random model, momentum averages over the draws of all steps so far: one to four draws per step then suffice
    (docs/evaluation.md).

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        alpha: step size in the unit of eps; default 2.5 * eps / steps, and eps for the cosine.
        steps: gradient steps.
        random_start: start from a uniformly random point of the ball instead of the image; restarts always do.
        norm: "Linf" or "L2".
        momentum: 0 for none; 0.9 is recommended for random models.
        schedule: of the step sizes: "constant", or "cosine" for alpha (1 + cos(pi t / steps)) / 2 at step t = 0, 1, ...
        n_restarts: runs; all but the first are of the images that some of `selection_draws` draws, which no attack step
            has seen, still classifies correctly. The candidate of an image is the one that is classified correctly in
            the fewest of them, ties broken by the larger mean cross-entropy.
        selection_draws: draws of the choice among restarts; with early_stop one, as all are the same.
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image is done as soon as it is misclassified, or, in Linf with constant steps and no momentum,
            when an iterate recurs: further steps would only repeat iterates that were classified correctly. For
            deterministic models: one lucky draw says little about a random one.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); returns adversarial images.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 20,
        random_start: bool = True,
        *,
        norm: str = "Linf",
        momentum: float = 0.0,
        schedule: str = "constant",
        n_restarts: int = 1,
        selection_draws: int = 8,
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
        name = type(self).__name__
        self.momentum = check_number(name, "momentum", momentum, low=0)
        self.schedule = check_choice(name, "schedule", schedule, SCHEDULES)
        if alpha is None:
            alpha = 2.5 * self.eps / self.steps if schedule == "constant" else self.eps
        self.alpha = check_number(name, "alpha", alpha, low=0, high=2.5 * MAX_LENGTH)
        self.n_restarts = check_integer(name, "n_restarts", n_restarts, low=1)
        self.selection_draws = check_integer(name, "selection_draws", selection_draws, low=1)
        self.random_start = check_flag(name, "random_start", random_start)

    def judge(self, estimator: GradientEstimator) -> GradientEstimator:
        draws = 1 if self.early_stop else self.selection_draws
        options: dict[str, Any] = {"max_batch": self.max_batch, "precision": self.precision, "targeted": self.targeted}
        return GradientEstimator(estimator.model, eot_iter=draws, seed=self.selection_seed(), **options)

    def restart_from(self, seed: int, images: Tensor, ids: Tensor) -> Tensor:
        return self.ball.random_point(images, seed, ids)

    def length(self) -> int | None:
        return None if self.early_stop else self.steps

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        x = self._start(estimator, batch)
        state = initial_state(batch, x)
        if self.momentum:
            state["momentum"] = torch.zeros_like(batch.images)
        elif self.early_stop and self.norm == "Linf" and self.schedule == "constant":
            state["earlier"] = x.clone()
        return state

    def _start(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        """The first iterate (B, C, H, W)."""
        images, _, ids, start = batch
        if start is not None:
            return self.ball.nearest(start, images)
        return self.ball.random_point(images, estimator.seed, ids) if self.random_start else images.clone()

    def step(self, estimator: GradientEstimator, state: State) -> None:
        state["x"] = self.within_mask(state, state["x"])
        # The sign and the direction of a sum over draws are those of the mean.
        estimate = estimator(state["x"], state["labels"], state["ids"], state["t"], summed=self.momentum > 0)
        self.observe(estimate.loss, estimate.correct)
        if self.early_stop:
            state["done"] |= estimate.correct == 0
        assert estimate.gradient is not None
        moved = self._moved(state, self.masked(state, estimate.gradient))
        state["x"] = state["best"] = torch.where(per_image(state["done"]), state["x"], moved)
        state["t"] += ~state["done"]
        state["done"] |= state["t"] >= self.steps
        if "earlier" in state:
            self._end_cycles(state)

    def _moved(self, state: State, gradient: Tensor) -> Tensor:
        if self.momentum:
            gradient = torch.nan_to_num(gradient)
            scale = per_image(gradient.flatten(1).abs().mean(dim=1)).clamp_min(1e-30)
            gradient = state["momentum"] = self.momentum * state["momentum"] + gradient / scale
        step = pgd_step_linf if self.norm == "Linf" else pgd_step_l2
        return step(state["x"], gradient, state["x0"], self._step_size(state), self.eps)

    def _step_size(self, state: State) -> float | Tensor:
        if self.schedule == "constant":
            return self.alpha
        return self.alpha / 2 * (1 + torch.cos(state["t"].to(state["x"].dtype) * (math.pi / self.steps)))

    def _end_cycles(self, state: State) -> None:
        """End images whose iterate equals that of step 2^k, the latest power of two (Brent's cycle detection, 1980)."""
        x, earlier, t = state["x"], state["earlier"], state["t"]
        state["done"] |= (x == earlier).flatten(1).all(dim=1)
        state["earlier"] = torch.where(per_image((t & (t - 1)) == 0), x, earlier)


class FGSM(PGD):
    """One signed (Linf) or normalized (L2) gradient step of size eps from the image (Goodfellow et al., 2015).

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        eps: length of the step, in units of [0, 1] pixels.
        norm: "Linf" or "L2".
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image is done as soon as it is misclassified. For deterministic models: one lucky draw says
            little about a random one.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); returns adversarial images.
    """

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        *,
        norm: str = "Linf",
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
            eps,
            eps,
            1,
            False,
            norm=norm,
            eot_iter=eot_iter,
            gradient=gradient,
            substitute=substitute,
            seed=seed,
            max_batch=max_batch,
            early_stop=early_stop,
            precision=precision,
            callback=callback,
        )


class MIFGSM(PGD):
    """PGD along accumulated gradients, from the image.

        m <- decay m + g / mean|g|,   x <- clip(x + alpha sign(m), x0 +- eps)         Dong et al., 2018, equations 6, 7

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        alpha: step size in the unit of eps; default eps / steps, the paper's.
        steps: gradient steps.
        decay: mu of the paper.
        norm: "Linf".
        n_restarts: runs; all but the first start from random points and are of the images that some of
            `selection_draws` draws, which no attack step has seen, still classifies correctly. The candidate of an
            image is the one that is classified correctly in the fewest of them, ties broken by the larger mean
            cross-entropy.
        selection_draws: draws of the choice among restarts; with early_stop one, as all are the same.
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image is done as soon as it is misclassified. For deterministic models: one lucky draw says
            little about a random one.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); returns adversarial images.
    """

    norms = ("Linf",)

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        *,
        norm: str = "Linf",
        n_restarts: int = 1,
        selection_draws: int = 8,
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
            eps,
            alpha,
            steps,
            False,
            norm=norm,
            momentum=check_number("MIFGSM", "decay", decay, low=0),
            n_restarts=n_restarts,
            selection_draws=selection_draws,
            eot_iter=eot_iter,
            gradient=gradient,
            substitute=substitute,
            seed=seed,
            max_batch=max_batch,
            early_stop=early_stop,
            precision=precision,
            callback=callback,
        )
        self.alpha = self.eps / self.steps if alpha is None else self.alpha
