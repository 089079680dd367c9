"""GAT (Poursaeed et al., ICCV 2021): training attacks that change colors, move pixels and add noise at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_number, message
from ..attacks.ball import per_image
from ..attacks.base import Attack, initial_state
from ..attacks.gradient import GradientEstimator
from ..attacks.network import Model
from ..attacks.queue import Batch, State
from ..attacks.stadv import warp
from ..randomness import Tag, derive_seed, random_uniform


class Semantic(Attack):
    """A change of colors, of positions and of pixels, each within its bound, found together by signed gradient steps.

        x' = clip(warp(clip((1 + g) x + b), f) + d)      |g|, |b| <= color,  |f| <= flow,  |d| <= eps

    with a gain g and a shift b for each channel, a flow f of all pixels as in StAdv, and a perturbation d of pixels.
    All start at a random point within the bounds; each step moves every parameter by `rate` times its bound, in the
    direction of its gradient's sign. Images are clipped to [0, 1]. A part whose bound is 0 does not change the image.
    The result need not lie in any norm ball around the image.

    The paper trains on perturbations of the latent variables of a generator, at coarse levels (color, layout) and at
    fine ones (noise), so that a classifier withstands attacks that it has not seen. Colors and flows take the place of
    the generator here.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        eps: bound of d, in units of [0, 1] pixels.
        color: bound of gain and shift; the shift is in units of [0, 1] pixels.
        flow: bound of the moves, in units of the grid on which the image spans [-1, 1]: 2 / W is one pixel.
        steps: gradient steps; each is one forward and backward pass for each draw.
        rate: size of a step, in units of the bounds; default 1.25 / steps.
        eot_iter: draws of the model in each gradient, which is their mean.
        gradient: "exact", "checkpointed", "bpda" or "blind", as PGD has them.
        seed: key of the attack's randomness and draws.
        precision: "float32", or "bfloat16" or "float16" for the networks alone.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Source: Poursaeed et al., Robustness and generalization via generative adversarial training, ICCV 2021.
    """

    norms = ("semantic",)

    def __init__(
        self,
        model: Model,
        eps: float = 8 / 255,
        color: float = 0.1,
        flow: float = 0.05,
        steps: int = 1,
        rate: float | None = None,
        *,
        eot_iter: int = 1,
        gradient: str = "exact",
        seed: int = 0,
        precision: str = "float32",
    ) -> None:
        options: dict[str, Any] = {"gradient": gradient, "seed": seed, "precision": precision}
        super().__init__(model, "semantic", eps, steps=steps, eot_iter=eot_iter, **options)
        self.color = check_number("Semantic", "color", color, low=0, high=1)
        self.flow = check_number("Semantic", "flow", flow, low=0)
        self.rate = 1.25 / self.steps if rate is None else check_number("Semantic", "rate", rate, low=0)

    @property
    def bounds(self) -> dict[str, float]:
        """The bound of each part's parameters."""
        return {"gain": self.color, "shift": self.color, "flow": self.flow, "delta": self.eps}

    def length(self) -> int:
        return self.steps

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, _, ids, start = batch
        if start is not None:
            raise ValueError(message("Semantic", "start", "None, as changes start at random", type(start).__name__))
        channels, *size = images.shape[1:]
        shapes = {"gain": (channels, 1, 1), "shift": (channels, 1, 1), "flow": (2, *size), "delta": (channels, *size)}
        parts = {}
        for name, bound in self.bounds.items():
            uniform = random_uniform(shapes[name], derive_seed(estimator.seed, name), ids, 0, Tag.START)
            parts[name] = bound * (2 * uniform - 1).to(images)
        return initial_state(batch, changed(images, **parts)) | parts

    def step(self, estimator: GradientEstimator, state: State) -> None:
        state["x"] = self.within_mask(state, state["x"])
        estimate = estimator(state["x"], state["labels"], state["ids"], state["t"])
        self.observe(estimate.loss, estimate.correct)
        assert estimate.gradient is not None
        gradient = self.masked(state, torch.nan_to_num(estimate.gradient))
        parts = {name: state[name].detach().requires_grad_() for name in self.bounds}
        with torch.enable_grad():
            objective = (changed(state["x0"], **parts) * gradient).sum()
        slopes = torch.autograd.grad(objective, list(parts.values()))
        for (name, bound), slope in zip(self.bounds.items(), slopes, strict=True):
            moved = (state[name] + self.rate * bound * torch.nan_to_num(slope).sign()).clamp_(-bound, bound)
            state[name] = torch.where(per_image(state["done"]), state[name], moved)
        x = self.within_mask(state, changed(state["x0"], *(state[name] for name in self.bounds)))
        state["x"] = torch.where(per_image(state["done"]), state["x"], x)
        state["best"] = state["x"]
        state["t"] += ~state["done"]
        state["done"] |= state["t"] >= self.steps


def changed(images: Tensor, gain: Tensor, shift: Tensor, flow: Tensor, delta: Tensor) -> Tensor:
    """clip(warp(clip((1 + gain) images + shift), flow) + delta), see Semantic; differentiable in all arguments.

    Args:
        images, delta: (B, C, H, W); gain, shift: (B, C, 1, 1); flow: (B, 2, H, W), as of attacks.stadv.warp.
    """
    colored = ((1 + gain) * images + shift).clamp(0, 1)
    return (warp(colored, flow) + delta).clamp(0, 1)
