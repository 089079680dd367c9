"""The probability margin attack (Xie et al., CVPR 2025)."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._core.checks import check_integer
from ..ops import pgd_step_l1, pgd_step_l2, pgd_step_linf
from ..randomness import derive_seed
from .ball import NORMS, per_image
from .base import Attack, initial_state, keep_candidate
from .gradient import GradientEstimator
from .losses import likeliest_others
from .network import Model
from .queue import Batch, Schedule, State, run_queue
from .trace import Callback

# The losses that a row may ascend in a step; a step refers to them by index.
PARTS = ("pm", "pm-label", "pm-other")
MARGIN, LABEL, OTHER = range(3)
# Share of the entries that a step in L1 moves, at the start of a half and at its end.
SHARES = (0.1, 0.01)


class PMA(Attack):
    """Probability Margin Attack: signed or normalized steps on P = max_{k != y} p_k - p_y, p the softmax.

    Two runs from random starts. The first step of each descends -p_y; the others of the first half ascend -p_y in
    one run and max_{k != y} p_k in the other, and those of the second half ascend P. In both halves of N / 2 steps the
    step size falls from 2 eps to 0:

        x <- P(x + alpha_i dir(g)),   alpha_i = eps (1 + cos(pi (i - 1) / (N / 2))),   i = 0 .. N / 2, in each half

    The gradients are those of the log-odds of P, p_y and p_k (atop_fast.ops.attack_loss), which have the directions of
    the paper's and do not vanish with confident predictions.

    The candidate of an image is the iterate that fewest draws classify correctly, ties broken by the larger P; an
    iterate of a first half loses to one of a second half with as many.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        steps: N, of each run; there is one evaluation more.
        n_restarts: pairs of runs from further random points, of the images that some draw still classifies correctly.
        target_classes: 0 for the two runs above; n for n runs, each towards one of the n most likely classes
            besides y at the image itself: the first half ascends p_t, the second p_t - p_y.
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

    Called as attack(images, labels, sample_ids=None, start=None, mask=None); returns adversarial images.

    Departures from the original: an image's random starts are functions of (seed, sample id); a class that ties is the
    lowest; L2 and L1, which the paper does not have. A step in L1 moves the largest tenth of the gradient's entries,
    falling to a hundredth within each half.
    """

    norms = NORMS
    loss = "pm"
    has_targets = False
    # Repetitions of the schedule.
    rounds = 2

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        *,
        target_classes: int = 0,
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
        self.n_restarts = check_integer("PMA", "n_restarts", n_restarts, low=1)
        self.target_classes = check_integer("PMA", "target_classes", target_classes, low=0)

    def search(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        if not self.target_classes:
            return super().search(estimator, batch)
        clean = estimator.logits(batch.images, batch.ids, torch.zeros_like(batch.labels)).mean(dim=1)
        # One copy for each call: the number of classes belongs to the call.
        this = copy.copy(self)
        this.rounds = min(self.target_classes, clean.shape[1] - 1)
        order = likeliest_others(clean, batch.labels)[:, : this.rounds]
        return run_queue(this, estimator, batch, {"order": order, **self.given()})

    def length(self) -> int | None:
        return None if self.early_stop else self.rounds * (self.steps + 1)

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, labels, ids, start = batch
        ball = self.ball
        start = ball.random_point(images, estimator.seed, ids) if start is None else ball.nearest(start, images)
        again = self.ball.random_point(images, derive_seed(estimator.seed, "round"), ids)
        state = initial_state(batch, start.clone())
        loss = torch.full(labels.shape, -torch.inf, device=labels.device)
        return state | {
            "best": images.clone(),
            "start": start,
            "again": again,
            "candidate_correct": torch.full_like(loss, 2.0),
            "candidate_loss": loss,
        }

    def step(self, estimator: GradientEstimator, state: State) -> None:
        tables = _tables(self.steps, self.rounds, bool(self.target_classes), state["x"].device)
        now = tables.at(state["t"])
        begun = torch.where(per_image(now["is_odd"]), state["again"], state["start"])
        x = self.within_mask(state, torch.where(per_image(now["is_first"]), begun, state["x"]))
        targets = state["order"].gather(1, now["round"][:, None])[:, 0] if "order" in state else None
        keyed = (state["labels"], state["ids"], state["t"])
        estimate = estimator(x, *keyed, targets, loss=PARTS, which=now["part"], summed=False)
        self.observe(estimate.loss, estimate.correct)
        # The first half ascends other losses, which are not comparable: its iterates lose ties.
        loss = torch.where(now["part"] == MARGIN, estimate.loss, -torch.inf)
        keep_candidate(state, x, estimate.correct, loss, ~state["done"])
        if self.early_stop:
            state["done"] |= estimate.correct == 0
        assert estimate.gradient is not None
        state["x"] = self._moved(x, self.masked(state, estimate.gradient), state["x0"], now)
        state["t"] += ~state["done"]
        state["done"] |= state["t"] >= tables.length
        # The index must stay inside the tables for rows that are done but not yet fetched.
        state["t"].clamp_(max=tables.length - 1)

    def _moved(self, x: Tensor, gradient: Tensor, x0: Tensor, now: State) -> Tensor:
        alpha = (self.eps * now["alpha"]).to(x.dtype)
        if self.norm == "L1":
            count = (now["share"] * x[0].numel()).long().clamp(min=1)
            return pgd_step_l1(x, gradient, x0, alpha, self.eps, count)
        step = pgd_step_linf if self.norm == "Linf" else pgd_step_l2
        return step(x, gradient, x0, alpha, self.eps)


@dataclass(frozen=True)
class _Tables(Schedule):
    """The schedule of all rounds: one entry for each evaluation of a row, (length,)."""

    is_first: Tensor  # the evaluation of the round's start
    is_odd: Tensor  # whether the round is odd
    part: Tensor  # loss that the step after it ascends, an index into PARTS
    alpha: Tensor  # length of that step, in units of eps; negative to descend
    share: Tensor  # share of the entries that it moves in L1
    round: Tensor


# Never freed: CUDA graphs read this memory.
@functools.cache
def _tables(steps: int, rounds: int, targeted: bool, device: torch.device) -> _Tables:
    half, rows = steps / 2, []
    for number in range(rounds):
        first_part = OTHER if targeted or number % 2 else LABEL
        for i in range(steps + 1):
            part = LABEL if i == 0 and i < steps else (first_part if i < half else MARGIN)
            turn = (i - 1) / half if i <= half else (i - half - 1) / half
            size = 1 + math.cos(math.pi * turn)
            share = SHARES[1] + (SHARES[0] - SHARES[1]) * size / 2
            rows.append((i == 0, number % 2 == 1, part, -size if i == 0 else size, share, number))
    kinds = (torch.bool, torch.bool, torch.int64, torch.float32, torch.float32, torch.int64)
    columns = zip(zip(*rows, strict=True), kinds, strict=True)
    return _Tables(*(torch.tensor(column, dtype=dtype, device=device) for column, dtype in columns))
