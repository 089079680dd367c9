"""The L2 attack of Carlini & Wagner (S&P 2017): the smallest perturbation that fools, with EOT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._core.checks import check_integer, check_number
from .adam import adam_step
from .ball import per_image
from .base import Attack, initial_state
from .gradient import GradientEstimator
from .network import Model
from .queue import Batch, State
from .trace import Callback

# Bound of |2 x - 1|, within which atanh is finite (the factor of the authors' code).
INSIDE = 0.999999
LARGEST_C = 1e10


class CW(Attack):
    """Minimizes the distance and the margin, in a space in which every point is an image.

        x' = (tanh(w) + 1) / 2,    min_w |x' - x|_2^2 + c max(z_y - max_{j != y} z_j, -kappa)

    by Adam from w = atanh(2 x - 1) (Carlini & Wagner, 2017, section V.C; untargeted). With search_steps > 1 each image
    has a c of its own: after every run it is multiplied by 10 until the first success, then halfway between the
    largest that failed and the smallest that succeeded; of 10 or more runs the last one repeats the latter.

    A minimum-norm attack: an image's result is its nearest adversarial point seen, or the image itself if none was.
    A point is adversarial if it is misclassified in more than half of the draws, by a mean margin of at least kappa;
    for a random model, max(., -kappa) applies to the mean margin over the draws.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        c: weight of the margin, in the first run.
        kappa: the margin that counts as adversarial (the paper's confidence), in units of the logits.
        steps: Adam steps of one run; each is one forward and backward pass for each draw.
        lr: step size of Adam, in units of w.
        search_steps: number of runs, each with another c; 1 disables the search.
        eps: None for no bound; otherwise only adversarial points within eps count as results. Neither the objective
            nor the search depends on it.
        norm: "L2".
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image ends a run when its objective has not fallen by 0.01 % since the last check; there are 10
            checks a run (the authors' abort_early, for each image instead of each batch). For deterministic models, and
            for an lr at which the objective does not oscillate. Misclassification does not end an image.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); `start` replaces the image
    as the start of every run.
    """

    norms = ("L2",)
    loss = "margin"

    def __init__(
        self,
        model: Model,
        c: float = 1.0,
        kappa: float = 0.0,
        steps: int = 100,
        lr: float = 0.01,
        *,
        search_steps: int = 1,
        eps: float | None = None,
        norm: str = "L2",
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
            0.0 if eps is None else eps,
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
        self.eps = math.inf if eps is None else self.eps
        self.c = check_number("CW", "c", c, low=0, high=LARGEST_C)
        self.kappa = check_number("CW", "kappa", kappa, low=0)
        self.lr = check_number("CW", "lr", lr, low=0)
        self.search_steps = check_integer("CW", "search_steps", search_steps, low=1)

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, labels, _, start = batch
        w = torch.atanh((2 * (images if start is None else start) - 1).clamp(-INSIDE, INSIDE))
        numbers = images.new_zeros(len(images), dtype=torch.float32)
        # Distances of float64 images are float64 from the start: a replayed step keeps all types.
        infinity = numbers.to(torch.promote_types(images.dtype, torch.float32)) + torch.inf
        # "t" numbers the steps of all runs; a run that ends early skips the rest of its numbers.
        return initial_state(batch, images.clone()) | {
            "x": w,
            "start": w,
            "m": torch.zeros_like(w),
            "v": torch.zeros_like(w),
            "distance": infinity,
            "objective": infinity.clone(),
            "found": torch.zeros_like(labels, dtype=torch.bool),
            "c": numbers + self.c,
            "lower": numbers,
            "upper": numbers + torch.inf,
        }

    def step(self, estimator: GradientEstimator, state: State) -> None:
        x0, t, c, tanh = state["x0"], state["t"], state["c"], state["x"].tanh()
        x = self.within_mask(state, (tanh + 1) / 2)
        estimate = estimator(x, state["labels"], state["ids"], t)
        assert estimate.gradient is not None
        distance = (x - x0).square().flatten(1).sum(dim=1)
        adversarial = (estimate.correct < 0.5) & (estimate.loss >= self.kappa)
        self.observe(estimate.loss, (state["distance"].isinf() & ~adversarial).float())
        closer = adversarial & (distance < state["distance"]) & (distance <= self.eps**2)

        pull = per_image(c * (estimate.loss <= self.kappa))
        gradient = 2 * (x - x0) - pull * self.masked(state, torch.nan_to_num(estimate.gradient))
        m, v, change = adam_step(state["m"], state["v"], gradient * (1 - tanh * tanh) / 2, t % self.steps, self.lr)
        new = {
            "x": state["x"] - change,
            "m": m,
            "v": v,
            "t": t + 1,
            "found": state["found"] | adversarial,
            "best": torch.where(per_image(closer), x, state["best"]),
            "distance": torch.where(closer, distance, state["distance"]),
        }
        if self.early_stop:
            self._look(state, new, distance + c * (-estimate.loss).clamp_min(-self.kappa))
        if self.search_steps > 1:
            self._end_runs(state, new)
        for key, value in new.items():
            done = per_image(state["done"]) if value.dim() == 4 else state["done"]
            state[key] = torch.where(done, state[key], value)
        state["done"] = state["t"] >= self.steps * self.search_steps

    def _look(self, state: State, new: State, objective: Tensor) -> None:
        """End the runs whose objective no longer falls."""
        look = state["t"] % self.steps % max(1, self.steps // 10) == 0
        still = look & (objective > 0.9999 * state["objective"])
        new["objective"] = torch.where(look, objective, state["objective"])
        new["t"] = torch.where(still, (state["t"] // self.steps + 1) * self.steps, new["t"])

    def _end_runs(self, state: State, new: State) -> None:
        """Begin the next run of images whose run is over: set its c, and reset the rest of the state."""
        over, c = new["t"] % self.steps == 0, state["c"]
        new["upper"] = torch.where(over & new["found"], c, state["upper"])
        new["lower"] = torch.where(over & ~new["found"], c, state["lower"])
        following = torch.where(new["upper"].isinf(), 10 * c, (new["lower"] + new["upper"]) / 2)
        if self.search_steps >= 10:
            last = new["t"] // self.steps == self.search_steps - 1
            following = torch.where(last, new["upper"], following)
        new["c"] = torch.where(over, following.clamp_max(LARGEST_C), c)
        new["x"] = torch.where(per_image(over), state["start"], new["x"])
        for key in ("m", "v"):
            new[key] = new[key].masked_fill(per_image(over), 0)
        new["found"] = new["found"] & ~over
        new["objective"] = new.get("objective", state["objective"]).masked_fill(over, torch.inf)
