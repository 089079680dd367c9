"""Square Attack (Andriushchenko et al., ECCV 2020): random search with square-shaped changes, without gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._core.checks import check_flag, check_integer, check_number
from ..defense import Defense
from ..ops import project_l1
from ..ops.square import OP_BUMP, OP_LINF
from ..randomness import Tag, derive_seed, random_bits
from .ball import per_image
from .base import Attack, initial_state
from .gradient import GradientEstimator
from .network import Model
from .queue import Batch, State
from .trace import Callback

# Queries of one step: their random words are drawn together, which costs hardly more than those of one. Images that are
# fooled wait for the end of the step.
QUERIES = 8
# Queries, out of 10,000, at which the share p of the pixels is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class _Square(NamedTuple):
    """The square of one query of every row, as the ops take it. Masks are 0 or 1."""

    signs: Tensor  # (B, C, 1, 1): -1 or 1
    rows: Tensor  # (B, 1, H, 1): mask
    columns: Tensor  # (B, 1, 1, W): mask
    # L2 and L1 only: the mask of another square, the position of this one, and the index of its bump in the table.
    other_rows: Any = None
    other_columns: Any = None
    top: Any = None  # (B, 1, 1, 1)
    left: Any = None  # (B, 1, 1, 1)
    bump: Any = None  # (B, 1, 1, 1)


class Square(Attack):
    """Random search: a change of a random square is kept if it raises the margin loss max_{j != y} z_j - z_y.

        Linf: inside the square, each channel becomes x0 + eps or x0 - eps, at random (algorithm 2 of the paper).
        L2:   the square gets a random bump, and the budget of a second random square, which is cleared (algorithm 3).
        L1:   as L2, with a sharper bump and the projection on the L1 ball (as in AutoAttack).

    Forward passes only; a query is one forward pass of an image with each of `eot_iter` draws. The start (vertical
    stripes for Linf, bumps on a grid for L2 and L1) takes one more, and, with early_stop, the image itself, which comes
    back if it is misclassified. Unlike the original's, squares also reach the last row and column, and every image has
    squares of its own.

    For a random defense a candidate is kept if its estimated loss, of its own `eot_iter` draws, is larger than that
    of the candidate kept last, of other draws: a noisy comparison, which also keeps candidates that were only lucky.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        n_queries: squares that are tried in each run.
        n_restarts: independent runs, each for the images that were not fooled before; of the candidates, the one that
            is classified correctly in fewer of `eot_iter` fresh draws, ties broken by the larger loss.
        p_init: share of the pixels that the first squares cover.
        resc_schedule: shrink the squares at the same fractions of `n_queries` whatever their number, instead of at
            the paper's numbers of queries, which are meant for 10,000. AutoAttack does the latter.
        eot_iter: draws of the model in each query.
        seed: key of the attack's randomness and draws.
        max_batch: most rows of one pass; None takes as many as an attack with gradients would, if the model is a
            module.
        early_stop: an image is done as soon as it is misclassified; by default True, unless the model is a Defense.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
        callback: called with a TraceStep after each step; on a GPU this synchronizes at every step.

    Called as attack(images, labels, sample_ids=None, start=None, targets=None, mask=None); an image that is not fooled
    comes back as the candidate of the largest loss.
    """

    norms = ("Linf", "L2", "L1")
    loss = "margin"

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        *,
        resc_schedule: bool = True,
        eot_iter: int = 1,
        seed: int = 0,
        max_batch: int | None = None,
        early_stop: bool | None = None,
        precision: str = "float32",
        callback: Callback | None = None,
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            steps=check_integer("Square", "n_queries", n_queries, low=1),
            eot_iter=eot_iter,
            seed=seed,
            max_batch=max_batch,
            early_stop=not isinstance(model, Defense) if early_stop is None else early_stop,
            precision=precision,
            callback=callback,
        )
        self.n_queries = self.steps
        self.p_init = check_number("Square", "p_init", p_init, low=0, high=1)
        self.n_restarts = check_integer("Square", "n_restarts", n_restarts, low=1)
        self.resc_schedule = check_flag("Square", "resc_schedule", resc_schedule)

    def search(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        if self.mask is not None:
            # The start is evaluated before the state has the mask.
            images, _, ids, start = batch
            start = self._start(estimator.seed, images, ids) if start is None else start
            batch = batch._replace(start=torch.where(self.mask, start, images))
        return super().search(estimator, batch)

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, labels, ids, start = batch
        x = self._start(estimator.seed, images, ids) if start is None else self.ball.nearest(start, images)
        state = initial_state(batch, x)
        # NaN counts as the lowest loss.
        state["loss"] = self._loss(estimator, x, labels, ids, state["t"]).nan_to_num(nan=-torch.inf)
        if self.early_stop:
            clean = self._loss(estimator, images, labels, ids, state["t"] + 1)
            state["x"] = state["best"] = torch.where(per_image(clean > 0), images, x)
            state["done"] = (clean > 0) | (state["loss"] > 0)
        return state

    def step(self, estimator: GradientEstimator, state: State) -> None:
        x, loss = state["x"].clone(), state["loss"]
        enough = 0 if self.early_stop else torch.inf
        for turn, draws, square in self._squares(estimator.seed, state):
            candidate = self.within_mask(state, self._changed(x, state["x0"], square))
            new = self._loss(estimator, candidate, state["labels"], state["ids"], draws)
            kept = (new > loss) & (loss <= enough) & turn
            _keep(x, candidate, kept)
            loss = torch.where(kept, new, loss)
        state["x"] = state["best"] = x
        state["loss"] = loss
        self.observe(loss, (loss <= 0).float())
        state["t"] = torch.where(state["done"], state["t"], state["t"] + QUERIES)
        state["done"] = state["done"] | (state["t"] >= self.steps) | (loss > enough)

    def _loss(self, estimator: GradientEstimator, x: Tensor, labels: Tensor, ids: Tensor, t: Tensor) -> Tensor:
        """The margin, (B,), averaged over the draws; like estimator.evaluate, in fewer ops."""
        logits = estimator.logits(x, ids, t)
        own = labels[:, None, None].expand(-1, logits.shape[1], 1)
        margin = (logits.scatter(2, own, -torch.inf).amax(dim=2) - logits.gather(2, own)[..., 0]).mean(dim=1)
        return -margin if self.targeted else margin

    def _start(self, seed: int, images: Tensor, ids: Tensor) -> Tensor:
        """Stripes of +-eps (Linf), or a bump in each cell of a grid of about 5 by 5 (L2, L1); keyed by (seed, id)."""
        batch, channels, height, width = images.shape
        if self.norm == "Linf":
            signs = _signs(random_bits(channels * width, seed, ids, 0, Tag.START)).view(batch, channels, 1, width)
            return (images + self.eps * signs.to(images.dtype)).clamp_(0, 1)
        size = max(1, min(height, width) // 5)
        rows, columns = height // size, width // size
        cells = rows * columns
        words = random_bits((channels + 1) * cells, seed, ids, 0, Tag.START).view(batch, channels + 1, rows, columns)
        signs = _signs(words).to(images.dtype)
        signs = signs.repeat_interleave(size, dim=2).repeat_interleave(size, dim=3)
        bump = _bump(size, self.norm, images.device).to(images.dtype)
        flat, upright = (b.repeat(rows, columns)[None, None] for b in (bump, bump.T))
        delta = torch.zeros_like(images)
        top, left = (height - rows * size) // 2, (width - columns * size) // 2
        grid = torch.where(signs[:, :1] > 0, upright, flat) * signs[:, 1:]
        delta[:, :, top : top + rows * size, left : left + columns * size] = grid
        return self._onto_ball(delta, images)

    def _squares(self, seed: int, state: State) -> Iterator[tuple[Tensor, Tensor, _Square]]:
        """For each of the next queries: the rows that have it, bool (B,), the draws t of its evaluation, the square."""
        x, t = state["x"], state["t"] + torch.arange(QUERIES, device=state["t"].device)[:, None]  # (Q, B)
        batch, channels, height, width = x.shape
        at = t * 10000 // self.steps if self.resc_schedule else t
        halvings, table, _ = _tables(self.norm, self.p_init, height, width, x.device)
        level = torch.bucketize(at, halvings)
        size = table[level].view(QUERIES, batch, 1, 1, 1)
        count = channels + (2 if self.norm == "Linf" else 5)
        ids = state["ids"].expand_as(t).reshape(-1)
        words = random_bits(count, derive_seed(seed, "squares"), ids, t.reshape(-1), Tag.START)
        words = words.view(QUERIES, batch, count)
        signs = _signs(words[..., :channels]).to(x.dtype)[..., None, None]
        # A word times n, over 2^32, is uniform on 0 .. n - 1.
        limits = torch.cat((height - size, width - size), dim=2).view(QUERIES, batch, 2) + 1
        corners = [(words[..., i : i + 2] * limits) >> 32 for i in range(channels, count - 1, 2)]
        squares = [signs, *(mask for corner in corners for mask in _masks(corner, size, x))]
        if self.norm != "Linf":
            top, left = corners[0].unbind(2)
            squares += [v[..., None, None, None] for v in (top, left, 2 * level + (words[..., -1] >> 31))]
        turns = (t < self.steps) & ~state["done"]
        return zip(turns, t + 2, map(_Square, *(v.unbind(0) for v in squares)), strict=True)

    def _changed(self, x: Tensor, x0: Tensor, square: _Square) -> Tensor:
        """The candidates: algorithm 2 of the paper (Linf), or 3."""
        if self.norm == "Linf":
            return OP_LINF(x, x0, square.signs, square.rows, square.columns, self.eps)
        _, _, bumps = _tables(self.norm, self.p_init, x.shape[2], x.shape[3], x.device)
        moved = OP_BUMP(x, x0, *square, bumps.to(x.dtype), self.eps, self.norm == "L2")
        return moved if self.norm == "L2" else project_l1(moved, x0, self.eps * (1 - 1e-6))

    def _onto_ball(self, delta: Tensor, x0: Tensor) -> Tensor:
        """x0 + delta scaled to the norm eps and clipped (L2), or the nearest image in the ball (L1)."""
        if self.norm == "L1":
            return project_l1(x0 + delta, x0, self.eps * (1 - 1e-6))
        return (x0 + delta * (self.eps / (per_image(self.ball.length(delta)) + 1e-12))).clamp_(0, 1)


def _keep(x: Tensor, candidate: Tensor, kept: Tensor) -> None:
    """Write the candidates that are kept to x."""
    if not x.is_cpu:
        x.lerp_(candidate, per_image(kept.to(x.dtype)))
        return
    # Few are kept, and finding them on a CPU needs no synchronization.
    rows = kept.nonzero()[:, 0]
    x.index_copy_(0, rows, candidate[rows])


def _signs(words: Tensor) -> Tensor:
    """-1 or 1, by the highest bit of 32-bit words."""
    return 2 * (words >> 31) - 1


def _masks(corners: Tensor, size: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (Q, B, 1, H, 1) and columns (Q, B, 1, 1, W) of the squares with top left corners (Q, B, 2)."""
    top, left = corners[..., None, None, None].unbind(2)
    row = torch.arange(x.shape[2], device=x.device)[:, None] - top
    column = torch.arange(x.shape[3], device=x.device) - left
    return ((row >= 0) & (row < size)).to(x.dtype), ((column >= 0) & (column < size)).to(x.dtype)


# Never freed: CUDA graphs read this memory.
@functools.cache
def _tables(norm: str, p_init: float, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """HALVINGS; the side of the squares at every level, 0 .. 9; and the bumps of every level with their transposes,
    (20, S, S), in the top left corner."""
    sizes = []
    for level in range(len(HALVINGS) + 1):
        size = round(math.sqrt(p_init / 2**level * height * width))
        # Bumps have a middle, and two halves.
        size = max(1, size) if norm == "Linf" else max(3, size) // 2 * 2 + 1
        sizes.append(min(size, height, width))
    bumps = torch.zeros(2 * len(sizes), max(sizes), max(sizes), device=device)
    for level, size in enumerate(sizes if norm != "Linf" else ()):
        bumps[2 * level, :size, :size] = _bump(size, norm, device)
        bumps[2 * level + 1, :size, :size] = _bump(size, norm, device).T
    return torch.tensor(HALVINGS, device=device), torch.tensor(sizes, device=device), bumps


@functools.cache
def _bump(size: int, norm: str, device: torch.device) -> Tensor:
    """A hill above a valley, float32 (size, size), of norm 1 (equation 2 of the paper; for L1 with the power 4).

    At Chebyshev distance m from the middle of a half, the height is sum_{k >= m} 1 / (k + 1)^2.
    """
    half = size // 2
    bump = torch.cat((_hill(half, size, norm), -_hill(size - half, size, norm)))
    return (bump / torch.linalg.vector_norm(bump, 2 if norm == "L2" else 1)).float().to(device)


def _hill(height: int, width: int, norm: str) -> Tensor:
    """One half of a bump, float64 (height, width), of norm 1."""
    if not height:
        return torch.zeros(0, width, dtype=torch.float64)
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-2.0 if norm == "L2" else -4.0)
    rows = (torch.arange(height) - height // 2).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()
    hill = terms.flip(0).cumsum(0).flip(0)[torch.maximum(rows, columns)]
    return hill / torch.linalg.vector_norm(hill, 2 if norm == "L2" else 1)
