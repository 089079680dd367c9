"""N-FGSM (de Jorge et al., NeurIPS 2022): one-step adversarial training without catastrophic overfitting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_number
from ..attacks import PGD, Ball
from ..attacks.base import MAX_LENGTH
from ..attacks.gradient import GradientEstimator
from ..attacks.network import Model
from ..attacks.queue import Batch, State
from ..ops._steps import sum_of_draws


class NFGSM(PGD):
    """One signed step from noise larger than the ball, without projection onto the ball.

        s = clip(x + n),  n uniform in [-noise eps, noise eps],      x' = clip(s + alpha sign(gradient at s))

    each clipped only to [0, 1] (de Jorge et al., 2022, algorithm 1). The images lie up to noise eps + alpha from x: the
    attack is meant for training, not for a threat model.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        eps: radius in Linf, in units of [0, 1] pixels.
        alpha: step size; None uses eps, as the paper does.
        noise: k of the paper, the bound of the noise in units of eps.
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact", "checkpointed", "bpda" or "blind", as PGD has them.
        seed: key of the attack's randomness and draws.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.
    """

    norms = ("Linf",)

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        alpha: float | None = None,
        noise: float = 2.0,
        *,
        eot_iter: int = 1,
        gradient: str = "exact",
        seed: int = 0,
        precision: str = "float32",
    ) -> None:
        options: dict[str, Any] = {"gradient": gradient, "seed": seed, "precision": precision}
        super().__init__(model, eps, eps if alpha is None else alpha, 1, eot_iter=eot_iter, **options)
        self.noise = check_number("NFGSM", "noise", noise, low=0, high=MAX_LENGTH)

    def _start(self, estimator: GradientEstimator, batch: Batch) -> Tensor:
        images, _, ids, start = batch
        if start is not None:
            return start.clone()
        return Ball("Linf", self.noise * self.eps).random_point(images, estimator.seed, ids)

    def _moved(self, state: State, gradient: Tensor) -> Tensor:
        direction = torch.nan_to_num(sum_of_draws(gradient, state["x"])).sign()
        return (state["x"] + self.alpha * direction).clamp_(0, 1)
