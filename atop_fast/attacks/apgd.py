"""Auto-PGD (Croce and Hein, ICML 2020; for L1 ICML 2021): momentum, and step sizes that adapt themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._core.checks import check_choice, check_flag, check_integer, check_number
from ..ops import apgd_step_l2, apgd_step_linf, pgd_step_l1, project_l1
from .ball import NORMS, Ball, per_image
from .base import Attack, initial_state, keep_candidate
from .gradient import Estimate, GradientEstimator
from .network import Model
from .queue import Batch, Schedule, State
from .trace import Callback

MOMENTUM = 0.75


class APGD(Attack):
    """Auto-PGD on the cross-entropy, the margin or the difference-of-logits ratio.

        z = P(x + eta dir(g)),   x <- P(x + 0.75 (z - x) + 0.25 (x - x_previous))        Algorithm 1 of the 2020 paper

    eta starts at 2 eps. At checkpoints it is halved, and the search goes back to the best point, if the loss rose
    in too few of the steps since the last one, or if neither eta nor the best loss has changed since. For L1 the
    step goes along the largest entries of the gradient alone, their number following the best point's sparsity (Croce
    and Hein, 2021, section 3).

    The candidate of an image is the iterate that fewest draws classify correctly, ties broken by the larger loss. With
    a deterministic model that is a misclassified one, if there is any.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        steps: iterations; there is one evaluation more.
        n_restarts: number of runs; further ones start at random points, for images that some draw still gets right.
        seed: key of the attack's randomness and draws.
        loss: "ce", "margin", "dlr" or "pm", see atop_fast.ops.attack_loss for their formulas. With `targets`, the
            margin replaces dlr, which has no gradient for a class that ranks third.
        eot_iter: draws of the model in each gradient, which is their mean.
        rho: share of the steps since the last checkpoint in which the loss must rise.
        shrink_eps: for L1, spend 3/10 of the steps in the ball of radius 3 eps, 3/10 in 2 eps and the rest in eps, as
            AutoAttack does.
        gradient: "exact"; or, for a Defense alone, "checkpointed" (the same with less memory and more passes), "bpda"
            (the derivative of `substitute` instead of those of transform and purifier) or "blind" (the classifier
            alone is attacked).
        substitute: for "bpda", a differentiable map from images to an approximation of the purified images; None is the
            identity.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        early_stop: an image is done as soon as it is misclassified. For deterministic models: one lucky draw says
            little about a random one.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); returns adversarial images.

    Departures from the original: losses and decisions of a random defense rest on the mean over the draws, not on the
    last one, and an image's random start is a function of (seed, sample id).
    """

    norms = NORMS
    # Repetitions of the schedule, each with another target class.
    rounds = 1

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        loss: str = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        *,
        shrink_eps: bool = False,
        gradient: str = "exact",
        substitute: Callable[[Tensor], Tensor] | None = None,
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
        self.loss = check_choice(name, "loss", loss, ("ce", "margin", "dlr", "pm"))
        self.n_restarts = check_integer(name, "n_restarts", n_restarts, low=1)
        self.rho = check_number(name, "rho", rho, low=0, high=1)
        self.shrink_eps = check_flag(name, "shrink_eps", shrink_eps) and norm == "L1"

    def length(self) -> int | None:
        evaluations = sum(steps + 1 for _, steps in _stages(self.eps, self.steps, self.shrink_eps))
        return None if self.early_stop else self.rounds * evaluations

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, labels, ids, start = batch
        radius, _ = _stages(self.eps, self.steps, self.shrink_eps)[0]
        ball = Ball(self.norm, radius)
        start = ball.surface_point(images, estimator.seed, ids) if start is None else ball.nearest(start, images)
        state = initial_state(batch, start.clone())
        numbers = torch.zeros_like(labels, dtype=torch.float32)
        state |= {name: torch.zeros_like(images) for name in ("x_previous", "gradient", "x_best", "gradient_best")}
        state |= {"start": start, "best": images.clone(), "reduced": torch.ones_like(state["done"])}
        names = ("eta", "loss_best", "loss_at_check", "loss_last", "rises", "candidate_loss", "sparsity", "share")
        state |= {name: numbers.clone() for name in names}
        state["eta"] = state["eta"].to(images.dtype)
        return state | {"candidate_correct": numbers + 2}

    def step(self, estimator: GradientEstimator, state: State) -> None:
        tables = self._tables(state["x"])
        now = tables.at(state["t"])
        self._move(state, now)
        estimate = estimator(state["x"], state["labels"], state["ids"], state["t"], self.targets(state, now))
        self.observe(estimate.loss, estimate.correct)
        keep_candidate(state, state["x"], estimate.correct, estimate.loss, now["is_candidate"] & ~state["done"])
        self._keep_best(state, estimate, now)
        self._adapt(state, now)
        if self.early_stop:
            state["done"] |= (estimate.correct == 0) & now["is_candidate"]
        state["t"] += ~state["done"]
        state["done"] |= state["t"] >= tables.length
        # The index must stay inside the tables for rows that are done but not yet fetched.
        state["t"].clamp_(max=tables.length - 1)

    def targets(self, state: State, now: State) -> Tensor | None:
        """The target classes (B,) of a targeted loss."""
        return None

    def _tables(self, x: Tensor) -> _Tables:
        return _tables(self.steps, self.norm, self.eps, self.shrink_eps, self.rounds, x.device, x.dtype)

    def _move(self, state: State, now: State) -> None:
        """The next iterate; at the first evaluation of a stage, its start."""
        x, x0, gradient, eps = state["x"], state["x0"], state["gradient"], now["eps"]
        first = per_image(now["is_first"])
        if self.norm == "L1":
            count = (state["share"] * x[0].numel()).long().clamp(1, x[0].numel())
            moved = pgd_step_l1(x, gradient, x0, state["eta"], eps, count)
            begun = torch.where(per_image(now["begins_round"]), state["start"], project_l1(state["x_best"], x0, eps))
        else:
            # The step from a stage's start has no momentum.
            momentum = torch.where(now["is_second"], 1.0, MOMENTUM).to(x.dtype)
            step = apgd_step_linf if self.norm == "Linf" else apgd_step_l2
            moved = step(x, state["x_previous"], gradient, x0, state["eta"], self.eps, momentum)
            begun = state["start"]
        state["x_previous"] = self.within_mask(state, torch.where(first, begun, x))
        state["x"] = self.within_mask(state, torch.where(first, begun, moved))

    def _keep_best(self, state: State, estimate: Estimate, now: State) -> None:
        """Keep the point of the largest loss, to which the search goes back; the start of a stage resets it."""
        first, loss = now["is_first"], estimate.loss
        assert estimate.gradient is not None
        state["gradient"] = self.masked(state, torch.nan_to_num(estimate.gradient))
        better = first | (loss > state["loss_best"])
        state["x_best"] = torch.where(per_image(better), state["x"], state["x_best"])
        state["gradient_best"] = torch.where(per_image(better), state["gradient"], state["gradient_best"])
        state["loss_best"] = torch.where(better, loss, state["loss_best"])
        # As in the original, the first step counts as a rise if its loss is above 0.
        state["rises"] = torch.where(first, 0.0, state["rises"] + (loss > state["loss_last"]))
        state["loss_last"] = torch.where(first, 0.0, loss)
        state["loss_at_check"] = torch.where(first, loss, state["loss_at_check"])
        state["reduced"] |= first
        state["eta"] = torch.where(first, (1.0 if self.norm == "L1" else 2.0) * now["eps"], state["eta"])
        if self.norm == "L1":
            sparsity = _nonzero(state["x_best"] - state["x0"])
            starts_sparse = now["starts_sparse"] & first
            all_of_it = float(state["x"][0].numel())
            state["sparsity"] = torch.where(first, torch.where(starts_sparse, sparsity, all_of_it), state["sparsity"])
            share = torch.where(starts_sparse, sparsity / all_of_it / 1.5, 0.2)
            state["share"] = torch.where(first, share, state["share"])

    def _adapt(self, state: State, now: State) -> None:
        """At checkpoints: new step sizes, and back to the best point."""
        check = now["is_check"]
        if self.norm == "L1":
            back = self._adapt_l1(state, now)
        else:
            stuck = ~state["reduced"] & (state["loss_at_check"] >= state["loss_best"])
            back = check & ((state["rises"] <= now["window"] * self.rho) | stuck)
            state["eta"] = torch.where(back, state["eta"] / 2, state["eta"])
            state["reduced"] = torch.where(check, back, state["reduced"])
            state["loss_at_check"] = torch.where(check, state["loss_best"], state["loss_at_check"])
        state["rises"] = torch.where(check, 0.0, state["rises"])
        state["x"] = torch.where(per_image(back), state["x_best"], state["x"])
        state["gradient"] = torch.where(per_image(back), state["gradient_best"], state["gradient"])

    def _adapt_l1(self, state: State, now: State) -> Tensor:
        """The number of entries follows the sparsity of the best point; eta falls while that is stable."""
        check, eps = now["is_check"], now["eps"]
        sparsity = _nonzero(state["x_best"] - state["x0"])
        back = check & (sparsity < 0.95 * state["sparsity"])
        eta = torch.where(back, eps, state["eta"] / 1.5).clamp(eps / 10, eps)
        state["eta"] = torch.where(check, eta, state["eta"])
        state["share"] = torch.where(check, sparsity / state["x"][0].numel() / 1.5, state["share"])
        state["sparsity"] = torch.where(check, sparsity, state["sparsity"])
        return back


@dataclass(frozen=True)
class _Tables(Schedule):
    """The schedule of all rounds and stages: one entry for each evaluation of a row, (length,)."""

    eps: Tensor  # radius of the stage
    is_first: Tensor  # the evaluation of the stage's start
    is_second: Tensor  # the one after it
    begins_round: Tensor  # first of its round
    starts_sparse: Tensor  # the stage's start is sparse (L1): its sparsity sets the number of entries
    is_candidate: Tensor  # the stage's ball is the attack's, so that its iterates are candidates
    is_check: Tensor  # checkpoint
    window: Tensor  # steps since the checkpoint before
    round: Tensor


# Never freed: CUDA graphs read this memory.
@functools.cache
def _tables(
    steps: int, norm: str, eps: float, shrink_eps: bool, rounds: int, device: torch.device, dtype: torch.dtype
) -> _Tables:
    stages = _stages(eps, steps, shrink_eps)
    rows = []
    for number in range(rounds):
        for stage, (radius, length) in enumerate(stages):
            windows = _windows(length, norm)
            for i in range(length + 1):
                head = (radius, i == 0, i == 1, i == 0 and stage == 0, shrink_eps, stage == len(stages) - 1)
                rows.append((*head, i in windows, windows.get(i, 0), number))
    kinds = (dtype, *(torch.bool,) * 6, torch.float32, torch.int64)
    columns = zip(zip(*rows, strict=True), kinds, strict=True)
    return _Tables(*(torch.tensor(column, dtype=dtype, device=device) for column, dtype in columns))


def _stages(eps: float, steps: int, shrink_eps: bool) -> list[tuple[float, int]]:
    """Radius and steps of each stage of a round."""
    if not shrink_eps:
        return [(eps, steps)]
    part = math.ceil(0.3 * steps)
    return [(3 * eps, part), (2 * eps, part), (eps, max(0, steps - 2 * part))]


def _windows(steps: int, norm: str) -> dict[int, int]:
    """The checkpoints among the steps 1 .. steps, and how many steps each looks back (section 3.1 of the paper)."""
    window = max(int((0.04 if norm == "L1" else 0.22) * steps), 1)
    shorter, least = max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    found, last = {}, 0
    while last + window <= steps:
        last += window
        found[last] = window
        if norm != "L1":
            window = max(window - shorter, least)
    return found


def _nonzero(delta: Tensor) -> Tensor:
    return (delta != 0).flatten(1).sum(dim=1).float()
