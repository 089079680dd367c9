"""The base class of all attacks: their arguments, their checks, and their run."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._core.checks import (
    HALVES,
    check_choice,
    check_flag,
    check_images,
    check_integer,
    check_labels,
    check_radius,
    check_tensor,
    message,
)
from .._core.precision import PRECISIONS, warn_if_slow
from ..defense import Defense, check_model
from ..ops._steps import DTYPES
from ..randomness import check_keys, derive_seed
from .ball import NORMS, Ball, per_image
from .gradient import GRADIENT_MODES, GradientEstimator
from .network import WORTHWHILE, Model, Probe, prepared
from .queue import Batch, State, run_queue
from .trace import Callback, Trace

# No two images are this far apart; squares of larger lengths would overflow.
MAX_LENGTH = 1e6


class Attack(ABC):
    """Base of the attacks: called `attack(images, labels)`.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1", if the attack supports it.
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        steps: iterations.
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

    The model's mode, buffers and requires_grad flags are left as they were, also after an error.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    # Whether a call may name the classes to reach.
    has_targets: ClassVar[bool] = True
    loss: str = "ce"
    n_restarts: int = 1
    # State of one call, set on a copy of the attack.
    trace: Trace | None = None
    targeted: bool = False
    mask: Tensor | None = None  # bool (B, C, H, W)

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        steps: int,
        eot_iter: int = 1,
        gradient: str = "exact",
        substitute: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        early_stop: bool = False,
        precision: str = "float32",
        callback: Callback | None = None,
    ) -> None:
        name = type(self).__name__
        check_model(name, model)
        self.model = model
        self.norm = check_choice(name, "norm", norm, self.norms)
        self.eps = check_radius(name, norm, eps, high=MAX_LENGTH)
        self.steps = check_integer(name, "steps", steps, low=1)
        self.eot_iter = check_integer(name, "eot_iter", eot_iter, low=1)
        self.gradient = check_choice(name, "gradient", gradient, GRADIENT_MODES)
        self.precision = check_choice(name, "precision", precision, list(PRECISIONS))
        self.seed = check_integer(name, "seed", seed, low=-(2**63), high=2**63 - 1)
        self.max_batch = None if max_batch is None else check_integer(name, "max_batch", max_batch, low=1)
        self.early_stop = check_flag(name, "early_stop", early_stop)
        self.substitute, self.callback = substitute, callback
        if callback is not None and not callable(callback):
            raise TypeError(message(name, "callback", "a callable or None", type(callback).__name__))
        if gradient != "exact" and not isinstance(model, Defense):
            raise TypeError(f"{name}: gradient {gradient!r} needs a Defense, got {type(model).__name__}")
        if self.early_stop and isinstance(model, Defense):
            raise ValueError(message(name, "early_stop", "False for a Defense, whose draws differ", True))

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        sample_ids: Tensor | None = None,
        start: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Adversarial images.

        Args:
            images: float32 or float64 (B, C, H, W) in [0, 1].
            labels: int64 (B,), the true classes.
            sample_ids: int64 (B,), the identity of every image; default 0..B-1. With it, an image's result depends
                neither on the other images of the batch nor on their order.
            start: images (B, C, H, W) to start from, instead of the attack's own start; the attacks inside a ball take
                one outside of it to the nearest image inside.
            targets: int64 (B,), other classes than the labels, to be reached: the attack descends the loss of these
                instead of ascending that of the labels, and an image counts as fooled when it is classified as its
                target. FAB, APGDT and PMA choose their targets themselves.
            mask: bool, or 0 and 1, of a shape that broadcasts to that of the images, such as (H, W) or (B, 1, H, W):
                the pixels that may change. The others come back as they were.

        Returns:
            Images of the same shape, within eps of `images` and in [0, 1].

        Raises:
            TypeError, ValueError: naming the argument that is wrong.
        """
        name = type(self).__name__
        images = check_images(name, "images", images)
        check_labels(name, "labels", labels, images)
        _check_dtype(name, images)
        start = None if start is None else _check_start(name, start, images)
        ids, _ = check_keys(name, len(images), images.device, self.seed, sample_ids, 0)
        images = images.detach()
        if targets is not None:
            labels = self._check_targets(targets, labels, images)
        this = copy.copy(self)
        this.targeted, this.mask = targets is not None, None if mask is None else _check_mask(name, mask, images)
        if not len(images):
            return images.clone()
        _check_has_gradients(name, self.model)
        warn_if_slow(name, images.device, self.precision)
        # Streams, and so CUDA graphs, are those of the current GPU.
        on_gpu = torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext()
        # Inference mode has no gradients, and tensors made in it have none.
        with torch.inference_mode(False), on_gpu:
            images, labels, ids = (t.clone() if t.is_inference() else t for t in (images, labels, ids))
            start = start.clone() if start is not None and start.is_inference() else start
            with this.prepared(images, ids) as estimator:
                estimator.largest_label = int(labels.max())
                estimator.argument = "targets" if this.targeted else "labels"
                estimator.replays = True
                if self.callback is not None:
                    this.trace = Trace(self.callback, name, estimator.passes)
                return this.run(estimator, Batch(images, labels, ids, start))

    @property
    def ball(self) -> Ball:
        """The ball around an image in which candidates lie."""
        return Ball(self.norm, self.eps)

    def _check_targets(self, targets: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Raise unless the attack takes targets (B,), and all of them differ from the labels (B,)."""
        name = type(self).__name__
        check_labels(name, "targets", targets, images)
        if not self.has_targets:
            given = "a tensor (APGD, PGD, CW and Square take targets)"
            raise ValueError(message(name, "targets", "None, as the attack chooses its targets itself", given))
        if same := int((targets == labels).sum()):
            raise ValueError(message(name, "targets", "other classes than the labels", f"{same} equal ones"))
        return targets

    def within_mask(self, state: State, x: Tensor) -> Tensor:
        """x (B, C, H, W) inside the call's mask, and the images outside of it; without a mask, x."""
        return torch.where(state["mask"], x, state["x0"]) if "mask" in state else x

    def masked(self, state: State, gradient: Tensor) -> Tensor:
        """A gradient (B, C, H, W), or one for each draw (draws, B, C, H, W), that is 0 outside of the call's mask."""
        return gradient.masked_fill(~state["mask"], 0) if "mask" in state else gradient

    def given(self) -> State:
        """The entries of the rows' state that `begin` does not set."""
        return {} if self.mask is None else {"mask": self.mask}

    def observe(self, loss: Tensor, correct: Tensor) -> None:
        """Report a step to the trace, if there is one: loss and share of correct draws of every row, (B,)."""
        if self.trace is not None:
            self.trace.seen = (loss, correct)

    @contextlib.contextmanager
    def prepared(self, images: Tensor | None = None, ids: Tensor | None = None) -> Iterator[GradientEstimator]:
        """The estimator over the network as attacks call it; gradients are disabled inside the block.

        With the images (B, C, H, W) and their sample ids, int64 (B,), a network that stands in for the model is first
        compared with it: at the first image, and at a random point of the ball around it.
        """
        passes, probe = self.steps * self.eot_iter, None
        if images is not None and ids is not None and images.numel() and passes >= WORTHWHILE:
            # StAdv's bound is on the flow, not on pixel values.
            ball = self.ball if self.norm in NORMS else Ball("Linf", self.eps)
            near = ball.surface_point(images[:1], derive_seed(self.seed, "probe"), ids[:1])
            probe = Probe(torch.cat((images[:1], near)), torch.cat((ids[:1], ids[:1])), self.seed)
        with prepared(self.model, PRECISIONS[self.precision], passes, probe) as network, torch.no_grad():
            yield self.estimator(network)

    def estimator(self, network: Model) -> GradientEstimator:
        """The estimator of one call."""
        estimator = GradientEstimator(
            network,
            self.gradient,
            self.eot_iter,
            self.max_batch,
            self.loss,
            self.precision,
            self.substitute,
            self.seed,
            self.targeted,
        )
        estimator.function = type(self).__name__
        return estimator

    def run(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        """The attack on checked arguments and a prepared network: one search, and `n_restarts` - 1 further ones.

        Restart r has the seed derive_seed(self.seed, "restart", r). It searches the images that the judge's draws, the
        same for every candidate, still classify correctly at least once; see `better_candidate` for what is kept.
        """
        best = self.search(estimator, batch)
        if self.n_restarts == 1:
            return best
        judge = self.judge(estimator)
        judge.passes = estimator.passes
        correct, loss = self.rank(judge, best, batch)
        for restart in range(1, self.n_restarts):
            rows = correct.nonzero()[:, 0]
            if not len(rows):
                break
            again = self.estimator(estimator.model)
            again.passes, again.replays = estimator.passes, estimator.replays
            if self.trace is not None:
                self.trace.restart = restart
            again.seed = derive_seed(self.seed, "restart", restart)
            left = batch.take(rows)
            begun = self.restart_from(again.seed, left.images, left.ids)
            this = copy.copy(self)
            this.mask = None if self.mask is None else self.mask[rows]
            candidate = this.search(again, left._replace(start=begun))
            new_correct, new_loss = self.rank(judge, candidate, left)
            better = better_candidate(new_correct, new_loss, correct[rows], loss[rows])
            rows = rows[better]
            best[rows] = candidate[better]
            correct[rows], loss[rows] = new_correct[better], new_loss[better]
        return best

    def search(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        """One run over the images."""
        return run_queue(self, estimator, batch, self.given())

    def judge(self, estimator: GradientEstimator) -> GradientEstimator:
        """The estimator, of draws that no search sees, by which candidates are ranked."""
        judge = self.estimator(estimator.model)
        judge.loss, judge.seed = estimator.loss, self.selection_seed()
        return judge

    def selection_seed(self) -> int:
        """The key of the judge's draws; not that of the choice in evaluate, whose seed an attack may share."""
        return derive_seed(self.seed, "restart", "selection")

    def rank(self, judge: GradientEstimator, candidates: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The quality of candidates: the share of draws that classify them correctly, (B,), and their loss, (B,)."""
        _, loss, correct = judge.evaluate(candidates, batch.labels, batch.ids, torch.zeros_like(batch.ids))
        return correct, loss

    def restart_from(self, seed: int, images: Tensor, ids: Tensor) -> Tensor | None:
        """The point at which a restart begins, (B, C, H, W); None for the one that `begin` chooses without a start."""
        return None

    def length(self) -> int | None:
        """See queue.Program."""
        return None

    @abstractmethod
    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        """The state of new rows, see queue.Program; its randomness is keyed by (estimator.seed, ids)."""

    @abstractmethod
    def step(self, estimator: GradientEstimator, state: State) -> None:
        """One iteration, see queue.Program; calls `observe` once."""

    def __repr__(self) -> str:
        hidden = ("model", "callback", "trace", "targeted", "mask")
        options: dict[str, Any] = {k: v for k, v in vars(self).items() if k not in hidden}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def initial_state(batch: Batch, x: Tensor) -> State:
    """The entries that all attacks' states share: images, iterates, candidates and progress."""
    return {
        "x0": batch.images,
        "labels": batch.labels,
        "ids": batch.ids,
        "x": x,
        "best": x,
        "t": torch.zeros_like(batch.labels),
        "done": torch.zeros_like(batch.labels, dtype=torch.bool),
    }


def better_candidate(correct: Tensor, loss: Tensor, than_correct: Tensor, than_loss: Tensor) -> Tensor:
    """Whether a candidate is classified correctly in fewer draws, or in as many with a larger loss."""
    return (correct < than_correct) | ((correct == than_correct) & (loss > than_loss))


def keep_candidate(state: State, x: Tensor, correct: Tensor, loss: Tensor, allowed: Tensor) -> None:
    """Make x (B, C, H, W) the candidates of the `allowed` rows, bool (B,), in which it is better than theirs."""
    better = better_candidate(correct, loss, state["candidate_correct"], state["candidate_loss"]) & allowed
    state["best"] = torch.where(per_image(better), x, state["best"])
    state["candidate_correct"] = torch.where(better, correct, state["candidate_correct"])
    state["candidate_loss"] = torch.where(better, loss, state["candidate_loss"])


def _check_dtype(function: str, images: Tensor) -> None:
    """Raise unless the steps of attacks take images of this dtype: in 16 bits they would leave the ball by rounding."""
    if images.dtype not in DTYPES:
        half = HALVES.get(images.dtype, "float")
        expected = f"float32 or float64 (take model.float(), or lambda x: model(x.{half}()))"
        raise TypeError(message(function, "images", expected, images.dtype))


def _check_start(function: str, start: Tensor, images: Tensor) -> Tensor:
    """The images to start from; raise unless they have the shape and the dtype of the images."""
    start = check_images(function, "start", start)
    if start.shape != images.shape:
        expected = f"of the shape of images {tuple(images.shape)}"
        raise ValueError(message(function, "start", expected, tuple(start.shape)))
    if start.dtype != images.dtype:
        raise TypeError(message(function, "start", f"of the dtype of images {images.dtype}", start.dtype))
    return start


def _check_mask(function: str, mask: Tensor, images: Tensor) -> Tensor:
    """The mask as bool of the shape of the images; raise if it is none."""
    check_tensor(function, "mask", mask)
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(message(function, "mask", "bool, or 0 and 1", "other values"))
    try:
        return mask.to(images.device, torch.bool).expand_as(images)
    except RuntimeError:
        expected = f"of a shape that broadcasts to that of images {tuple(images.shape)}"
        raise ValueError(message(function, "mask", expected, tuple(mask.shape))) from None


def _check_has_gradients(function: str, model: Model) -> None:
    """Raise if the model was made in inference mode."""
    if isinstance(model, nn.Module) and any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        expected = "made outside of torch.inference_mode(), or a copy.deepcopy() made there"
        raise ValueError(message(function, "model", expected, "parameters or buffers that can have no gradients"))
