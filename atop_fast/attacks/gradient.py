"""The gradient estimator under every attack: exact, checkpointed, BPDA or blind, averaged over draws (EOT)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._core.checks import check_choice, check_integer, check_logits, check_same_dtype, message
from .._core.flags import put_back
from .._core.memory import bytes_saved, halve_chunk
from .._core.precision import PRECISIONS, lowered
from ..defense import Defense
from ..ops import AttackLoss, attack_loss
from ..ops._images import widen
from ..randomness import Draws, derive_seed, seeded, watched_generators
from .chains import checkpointed, straight_through
from .contract import accumulated, is_a_chain
from .losses import chosen, row_sizes, targeted
from .network import Model, is_copy
from .passes import MOST_ROWS, ROWS, UNMEASURED_ROWS, Pass, Passes, counter, room

GRADIENT_MODES = ("exact", "checkpointed", "bpda", "blind")
T = TypeVar("T")


class Estimate(NamedTuple):
    """The result of one evaluation of the model at B images."""

    gradient: Tensor | None  # (B, C, H, W): of the mean loss, or as asked for
    loss: Tensor  # (B,) float32: mean over the draws
    correct: Tensor  # (B,) float32: share of the draws that are classified correctly


class GradientEstimator:
    """Loss, and its gradient with respect to the images, averaged over draws of the defense.

        g(x) = 1/n sum_draw grad_x loss(model(x; draw), y)                 EOT, Athalye et al., ICML 2018

    The draws are folded into the batch, in passes whose size is set by memory and not by their number; the graph of a
    pass is freed before the next. Gradients are summed draw by draw, in order, however passes divide the draws.

    The model gets copies of the images, and may write into them. Its errors propagate unchanged.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits. The draws of a Defense are keyed
            by (seed, sample id, draw). Those of another callable, and of a Defense whose networks draw, are repeated
            calls, for which the generators of torch, Python and numpy are seeded and afterwards restored.
        gradient: "exact" differentiates transform, purifier and classifier; "checkpointed" does the same, computing the
            purifier and the classifier twice instead of keeping both graphs; "bpda" takes the derivative of transform
            and purifier from `substitute` (Athalye et al., 2018); "blind" attacks the classifier alone. The last three
            need a Defense.
        eot_iter: number n of draws.
        max_batch: most rows of one pass, at least 8 and rounded down to a multiple of it; by default as many as save
            about 1 GiB for the backward pass, or an eighth of a GPU's memory. A pass that does not fit into memory is
            halved, and so are those after it, with a warning; this changes only the draws of a model with its own
            randomness.
        loss: "ce", "margin", "dlr" or "pm", see atop_fast.ops.attack_loss. If the model has too few classes for dlr
            (it needs 3, or 4 with targets), the margin replaces it, with a warning if there are no targets; and also if
            `targeted`, as the dlr of a class that ranks third is 1, and has no gradient.
        precision: "float32", or "bfloat16" or "float16" for the networks alone; images, losses and gradients stay
            float32.
        substitute: differentiable map from images to an approximation of the purified images; the identity by default.
        seed: key of the draws, an int or an int64 scalar tensor.
        targeted: the labels are classes to be reached: losses and their gradients have the other sign, and a draw
            counts as correct until it gives the label.

    Raises:
        TypeError: a gradient that needs a Defense for a model that is none; a model that does not return a tensor.
        ValueError: a model whose logits are not of shape (B, classes), or have no gradient.
    """

    def __init__(
        self,
        model: Model,
        gradient: str = "exact",
        eot_iter: int = 1,
        max_batch: int | None = None,
        loss: str = "ce",
        precision: str = "float32",
        substitute: Callable[[Tensor], Tensor] | None = None,
        seed: int | Tensor = 0,
        targeted: bool = False,
    ) -> None:
        name = "GradientEstimator"
        check_choice(name, "gradient", gradient, GRADIENT_MODES)
        check_choice(name, "precision", precision, list(PRECISIONS))
        check_integer(name, "eot_iter", eot_iter, low=1)
        if max_batch is not None:
            check_integer(name, "max_batch", max_batch, low=1)
        if gradient != "exact" and not isinstance(model, Defense):
            raise TypeError(f"{name}: gradient {gradient!r} needs a Defense, got {type(model).__name__}")
        if gradient in ("checkpointed", "bpda") and not is_a_chain(model):
            expected = f"a Defense without hooks and with the forward of Defense, for gradient {gradient!r}"
            raise TypeError(message(name, "model", expected, type(model).__name__))
        self.model, self.gradient, self.loss, self.seed = model, gradient, loss, seed
        self.precision, self.substitute, self.targeted = precision, substitute, targeted
        self.eot_iter = 1 if gradient == "blind" else eot_iter
        # For errors: the name of the caller, the largest of its labels, and the name of that argument.
        self.function, self.largest_label, self.argument = name, 0, "labels"
        self.passes = counter() or Passes()
        # 0: not known yet.
        self._rows = self._forward_rows = 0 if max_batch is None else max(ROWS, max_batch // ROWS * ROWS)
        self._calls, self._warned = 0, False
        # The seed of repeated calls, if it differs from that of keyed draws.
        self.calls_seed: int | None = None
        # Whether steps of attacks may be replayed as CUDA graphs.
        self.replays = False
        self._known = is_copy(model)
        # For a Defense: whether a call was watched, and whether it draws from the global generators.
        self._watched = self._random = False
        # See _recovers.
        self._thawed = self._accumulates = False

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        t: Tensor,
        targets: Tensor | None = None,
        loss: str | Sequence[str] | None = None,
        summed: bool = True,
        which: Tensor | None = None,
    ) -> Estimate:
        """Loss and gradient.

        Args:
            images: (B, C, H, W).
            labels, sample_ids: int64 (B,).
            t: int64 (B,); row b uses the draws t[b] * eot_iter .. t[b] * eot_iter + eot_iter - 1.
            targets: int64 (B,), the other class of a targeted loss.
            loss: overrides the estimator's loss; or several losses, from which `which` selects one for each row.
            summed: False for callers that ignore the gradient's scale: they get the sum over the draws, or, if one pass
                holds all draws, the gradients of all (eot_iter, B, C, H, W), which the step ops add up.
            which: int64 (B,), indices into `loss`.
        """
        self._measure(images)
        first_draws = t * self.eot_iter
        total: Tensor | None = None
        sums = images.new_zeros((2, len(images)), dtype=torch.float32)

        def differentiated(part: Pass) -> tuple[Tensor, AttackLoss]:
            return self._differentiated(part, images, labels, sample_ids, first_draws, targets, loss, which)

        for part, (gradient, result) in self._passes(images, differentiated, graph=True):
            if not summed and self.eot_iter > 1 and part.count == self.eot_iter * len(images):
                return self._draw_by_draw(part, gradient, result)
            for rows, samples in part.pieces():
                sums[0, samples] += result.losses[rows]
                sums[1, samples] += result.correct[rows]
            if self.eot_iter == 1 and part.samples is None:
                # A single pass over single draws leaves nothing to add up.
                total = gradient
                continue
            total = torch.zeros_like(images) if total is None else total
            for rows, samples in part.pieces():
                total[samples] += gradient[rows]
        if summed and self.eot_iter > 1 and total is not None:
            total.div_(self.eot_iter)
        return Estimate(total, *sums.div_(self.eot_iter))

    def _draw_by_draw(self, part: Pass, gradient: Tensor, result: AttackLoss) -> Estimate:
        shape = (self.eot_iter, part.batch)
        means = (v[: part.count].float().view(shape).mean(dim=0) for v in (result.losses, result.correct))
        return Estimate(gradient[: part.count].unflatten(0, shape), *means)

    def _differentiated(
        self,
        part: Pass,
        x: Tensor,
        labels: Tensor,
        ids: Tensor,
        first_draws: Tensor,
        targets: Tensor | None,
        loss: str | Sequence[str] | None,
        which: Tensor | None,
    ) -> tuple[Tensor, AttackLoss]:
        """One pass forward and backward: the gradients and losses of its rows."""
        leaf = part.take(x).detach().requires_grad_()
        with torch.enable_grad(), lowered(x.device, self.precision):
            logits = widen(self._forward(leaf, part, ids, first_draws))
        rivals, selected = (None if t is None else part.take(t) for t in (targets, which))
        result = self._losses(logits.detach(), part.take(labels), rivals, loss, selected)
        # Confident networks have gradients near the smallest numbers, which are slow on CPUs and underflow in float16:
        # the backward pass gets rows scaled to size 1.
        size = row_sizes(result.gradient)
        try:
            gradient = self._gradient(logits, leaf, result.gradient / size[:, None])
        except RuntimeError as error:
            if not self._recovers(error):
                raise
            return self._differentiated(part, x, labels, ids, first_draws, targets, loss, which)
        self.passes.backward += len(leaf)
        return gradient * size.to(gradient.dtype)[:, None, None, None], result

    def _gradient(self, logits: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
        gradient = None
        if logits.requires_grad and self._accumulates:
            gradient = accumulated(logits, leaf, upstream, self.model)
        elif logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits, leaf, upstream, allow_unused=True)
        if gradient is None:
            given = (
                "logits that do not depend on them for autograd (detach, argmax, no_grad); Square needs no gradient, "
                "and BPDA(model, step) replaces that of a step (for a Defense: gradient='bpda')"
            )
            raise ValueError(message(self.function, "model", "differentiable with respect to its images", given))
        return gradient

    def _recovers(self, error: RuntimeError) -> bool:
        """Whether the pass that ended in the error may be repeated in a way that suits functions that recompute.

        Functions that recompute over parameters need the gradients of these, which are frozen; torch's reentrant
        checkpoints need gradients to be accumulated.
        """
        if not isinstance(self.model, nn.Module):
            return False
        if "does not require grad" in str(error) and not self._thawed:
            self._thawed = True
            put_back((p, "requires_grad") for p in self.model.parameters())
            return True
        if "use_reentrant" in str(error) and not self._accumulates:
            self._accumulates = True
            return True
        return False

    def evaluate(
        self,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor,
        t: Tensor,
        targets: Tensor | None = None,
        loss: str | None = None,
    ) -> Estimate:
        """Like a call, without the gradient and its pass."""
        logits = self.logits(images, sample_ids, t)
        n = logits.shape[1]
        repeated = None if targets is None else targets.repeat_interleave(n)
        result = self._losses(logits.flatten(0, 1), labels.repeat_interleave(n), repeated, loss)
        means = (v.float().view(-1, n).mean(dim=1) for v in (result.losses, result.correct))
        return Estimate(None, *means)

    def _losses(
        self,
        logits: Tensor,
        labels: Tensor,
        targets: Tensor | None,
        loss: str | Sequence[str] | None,
        which: Tensor | None = None,
    ) -> AttackLoss:
        """The losses of rows; see the arguments of a call."""
        if which is None:
            assert loss is None or isinstance(loss, str)
            result = attack_loss(logits, labels, self._loss(loss, logits, targets), targets)
        else:
            assert loss is not None
            result = chosen(logits, labels, targets, loss, which)
        return targeted(result) if self.targeted else result

    def _loss(self, loss: str | None, logits: Tensor, targets: Tensor | None) -> str:
        """The loss of a call: for classes to be reached, or too few classes, the margin in the place of dlr."""
        loss, needed, classes = loss or self.loss, 3 if targets is None else 4, logits.shape[1]
        if loss != "dlr" or (classes >= needed and not self.targeted):
            return loss
        if targets is None and not self.targeted and not self._warned:
            warnings.warn(f"{self.function}: loss is 'margin', as 'dlr' needs 3 classes, got {classes}", stacklevel=2)
            self._warned = True
        return "margin"

    def logits(self, images: Tensor, sample_ids: Tensor, t: Tensor) -> Tensor:
        """Logits (B, eot_iter, classes) of the draws that a call with t uses, float32 or float64; no gradients."""
        return self._logits(images, sample_ids, t * self.eot_iter)

    def _logits(self, x: Tensor, ids: Tensor, first_draws: Tensor) -> Tensor:
        # A callable that is no module may not be differentiable, and its memory cannot be measured.
        if isinstance(self.model, nn.Module):
            self._measure(x)

        def forward(part: Pass) -> Tensor:
            logits = self._forward(part.take(x), part, ids, first_draws)[: part.count]
            # Copied: a model may return the same memory in every call.
            return widen(logits.clone())

        with torch.no_grad(), lowered(x.device, self.precision):
            parts = [logits for _, logits in self._passes(x, forward, graph=False)]
        return torch.cat(parts).view(self.eot_iter, len(x), -1).transpose(0, 1)

    @property
    def rows(self) -> int:
        """Most rows of a pass with gradients; 0 before the first one."""
        return self._rows

    @property
    def forward_rows(self) -> int:
        """Most rows of a pass without gradients, as far as it is known: the first pass over images measures it."""
        return self._forward_rows or MOST_ROWS

    def _passes(self, x: Tensor, work: Callable[[Pass], T], graph: bool) -> Iterator[tuple[Pass, T]]:
        """The eot_iter * B rows, draw by draw, in passes, with the result of `work` on each.

        A pass that runs out of memory is divided, and no later pass is larger than its parts.
        """
        batch, count = len(x), self.eot_iter * len(x)
        # A model with randomness of its own gets one draw a pass.
        span = count if isinstance(self.model, Defense) and not self._random else batch
        # The passes of a network are padded; other callables may not tolerate padding.
        multiple = ROWS if isinstance(self.model, nn.Module) else 1
        first = 0
        while first < count:
            most = self._rows if graph else self.forward_rows
            part = Pass(first, min(most, span - first % span), batch, multiple, x.device)
            try:
                with self._watching() as generators:
                    result = work(part)
            except (RuntimeError, MemoryError) as error:
                most = halve_chunk("GradientEstimator", "rows", part.size, error, ROWS)
                if graph:
                    self._rows = most
                else:
                    self._forward_rows = most
                continue
            if self._draws(generators):
                span = batch
                continue
            yield part, result
            first += part.count

    def _forward(self, x: Tensor, part: Pass, ids: Tensor, first_draws: Tensor) -> Tensor:
        self.passes.forward += len(x)
        try:
            with self._seeded(x.device):
                logits = self._called(self._given(x), part, ids, first_draws)
        except RuntimeError as error:
            check_same_dtype(self.function, "images", x, self.model, error)
            raise
        return check_logits(self.function, logits, len(x), self.largest_label, self.argument)

    def _given(self, x: Tensor) -> Tensor:
        """The tensor for a network, which may write into it."""
        return x if self._known else x.clone()

    def _called(self, x: Tensor, part: Pass, ids: Tensor, first_draws: Tensor) -> Tensor:
        if not isinstance(self.model, Defense):
            return self.model(x)
        key = (self.seed, part.take(ids), part.take(first_draws) + part.draws)
        if self.gradient == "blind":
            return self.model.classify(x, *key)
        if self.gradient == "exact" or not x.requires_grad:
            return self.model(x, *key)
        if self.gradient == "checkpointed":
            # A CUDA graph cannot save the state of a generator.
            return checkpointed(self.model, x, key, keeps_generators=not self._known)
        return straight_through(self.model, x, self._given(x.detach()), key, self.substitute)

    def _seeded(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The global generators seeded for one call of a model that may draw from them."""
        if self._known or isinstance(self.seed, Tensor) or (isinstance(self.model, Defense) and not self._random):
            return contextlib.nullcontext()
        self._calls += 1
        key = self.seed if self.calls_seed is None else self.calls_seed
        return seeded(derive_seed(key, "call", self._calls), device)

    def _watching(self) -> contextlib.AbstractContextManager[Draws | None]:
        """Watches whether a Defense draws from the global generators, during its first call."""
        watch = isinstance(self.model, Defense) and not self._known and not self._watched
        return watched_generators() if watch else contextlib.nullcontext()

    def _draws(self, generators: Draws | None) -> bool:
        """Whether the watched call drew without a seed, so that it must be repeated."""
        if generators is None:
            return False
        self._watched, self._random = True, generators.drawn
        return self._random

    def _measure(self, x: Tensor) -> None:
        """Measure, once, how many rows of images like x a pass may have; see passes.room."""
        if self._rows:
            return
        part = Pass(0, ROWS, 1, ROWS, x.device)
        zero = torch.zeros(1, dtype=torch.int64, device=x.device)
        most = UNMEASURED_ROWS
        with torch.inference_mode(False), self._watching() as generators:
            leaf = part.take(x[:1]).detach().requires_grad_()
            try:
                with torch.enable_grad(), lowered(x.device, self.precision):
                    needed = bytes_saved(lambda: self._forward(leaf, part, zero, zero), self.model)
                most = room(x.device) * ROWS // max(1, needed)
            except RuntimeError as error:
                # torch.func does not support these hooks.
                if "saved tensor hooks" not in str(error):
                    raise
        self._draws(generators)
        self._rows = max(ROWS, min(MOST_ROWS, most) // ROWS * ROWS)
        # Without a graph, several times as many rows fit.
        self._forward_rows = min(self.forward_rows, 4 * self._rows)
