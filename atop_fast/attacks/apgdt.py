"""Auto-PGD against one target class after the other (Croce and Hein, ICML 2020; Melamed et al., NeurIPS 2024)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .._core.checks import check_choice, check_integer
from .apgd import APGD
from .gradient import GradientEstimator
from .losses import likeliest_others
from .network import Model
from .queue import Batch, State, run_queue
from .trace import Callback

# MALT: classes considered for each image, and pairs of an image and a class in one pass.
CANDIDATES = 100
PAIRS = 256


class APGDT(APGD):
    """Auto-PGD on the targeted difference-of-logits ratio, one target class after the other (Croce and Hein, 2020).

        loss = -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2),   z_1 >= z_2 >= ... the sorted logits

    With order="logits" the target classes of an image are the most likely ones besides y at the image itself. With
    order="malt" they are the nearest ones by the network's linearization there (Melamed et al., NeurIPS 2024):

        those of the least (z_y - z_t) / |grad_x (z_y - z_t)|,  t among the 100 largest logits besides y

    in the norm that is dual to the attack's: L1 for Linf, as in the paper, L2 for L2, and Linf for L1. That takes a
    forward and a backward pass for each of these classes, with as many draws as a step has. With fewer than four
    classes, the loss is the plain difference z_t - z_y.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        steps: iterations against every target class, each from the same random start.
        n_restarts: number of runs; further ones start at random points, for images that some draw still gets right.
        seed: key of the attack's randomness and draws.
        eot_iter: draws of the model in each gradient, which is their mean.
        rho: share of the steps since the last checkpoint in which the loss must rise.
        target_classes: number of target classes, at most the number of classes less one.
        order: "logits" or "malt". With ten classes and nine targets it only changes their order.
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

    Called as attack(images, labels, sample_ids=None, start=None, mask=None); returns adversarial images.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 100,
        n_restarts: int = 1,
        seed: int = 0,
        eot_iter: int = 1,
        rho: float = 0.75,
        *,
        target_classes: int = 9,
        order: str = "logits",
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
            steps,
            n_restarts,
            seed,
            "dlr",
            eot_iter,
            rho,
            shrink_eps=shrink_eps,
            gradient=gradient,
            substitute=substitute,
            max_batch=max_batch,
            early_stop=early_stop,
            precision=precision,
            callback=callback,
        )
        self.order = check_choice("APGDT", "order", order, ("logits", "malt"))
        self.target_classes = check_integer("APGDT", "target_classes", target_classes, low=1)

    has_targets = False

    def search(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        clean = estimator.logits(batch.images, batch.ids, torch.zeros_like(batch.labels)).mean(dim=1)
        # One copy for each call: the number of classes belongs to the call.
        this = copy.copy(self)
        if self.order == "malt":
            order = self._nearest_classes(estimator, clean, batch)
        else:
            order = likeliest_others(clean, batch.labels)
        order = order[:, : self.target_classes]
        this.rounds = order.shape[1]
        return run_queue(this, estimator, batch, {"order": order, **self.given()})

    def _nearest_classes(self, estimator: GradientEstimator, logits: Tensor, batch: Batch) -> Tensor:
        """The classes besides y of the CANDIDATES largest logits (B, K), the nearest first, (B, up to CANDIDATES)."""
        images, labels, ids, _ = batch
        classes = likeliest_others(logits, labels)[:, :CANDIDATES]
        order = {"Linf": 1, "L2": 2, "L1": torch.inf}[self.norm]
        distances = torch.empty(classes.shape, dtype=torch.float32, device=images.device)
        # Pairs of an image and a class, in chunks of a few images.
        for part in torch.arange(classes.numel(), device=images.device).split(PAIRS):
            rows, columns = part // classes.shape[1], part % classes.shape[1]
            ahead = (labels[rows], ids[rows], torch.zeros_like(rows), classes[rows, columns])
            gradient, loss, _ = estimator(images[rows], *ahead, loss="margin")
            assert gradient is not None
            slope = torch.linalg.vector_norm(gradient.flatten(1).float(), order, dim=1)
            # A class with zero gradient cannot be reached.
            distance = torch.where(slope > 0, -loss / slope, torch.inf)
            distances[rows, columns] = distance.masked_fill(distance.isnan(), torch.inf)
        return classes.gather(1, distances.argsort(dim=1, stable=True))

    def targets(self, state: State, now: State) -> Tensor | None:
        return state["order"].gather(1, now["round"][:, None])[:, 0]
