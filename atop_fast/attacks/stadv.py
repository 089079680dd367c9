"""StAdv (Xiao et al., ICLR 2018): an attack that moves pixels instead of changing them, with EOT."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_choice, check_number, message
from .adam import adam_step
from .ball import per_image
from .base import Attack, initial_state
from .gradient import GradientEstimator
from .network import Model
from .queue import Batch, State
from .trace import Callback


class StAdv(Attack):
    """Finds a flow field along which the image is resampled.

        max_f loss(x sampled at p + f(p), y) - smoothness * roughness(f)      subject to |f|_inf <= bound

    by Adam from the zero flow, each step clipped to the bound (Xiao et al., 2018, equations 1 to 4; their attack has
    the roughness but no bound, the evaluations of purifiers have the bound but no roughness). An image's result is its
    last iterate, as PGD's; no ball around the image's pixels holds it.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        bound: largest move of a pixel along each axis, in units of the grid on which the image spans [-1, 1]: 2 / W is
            one pixel.
        steps: Adam steps; each is one forward and backward pass for each draw.
        lr: step size of Adam, in the unit of bound; default 5 * bound / steps.
        smoothness: weight tau of the roughness, the sum over pixels of the flow's distance to the flow of each of the
            up to four neighbors, in the unit of bound.
        loss: "ce", or "margin" (the paper's, without its threshold), whose gradient does not vanish where a classifier
            is certain.
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

    Called as attack(images, labels, sample_ids=None, targets=None, mask=None); there is no `start`.
    """

    # The bound is on the flow: no norm of the pixels.
    norms = ("flow",)

    def __init__(
        self,
        model: Model,
        bound: float = 0.05,
        steps: int = 100,
        lr: float | None = None,
        *,
        smoothness: float = 0.0,
        loss: str = "ce",
        eot_iter: int = 1,
        gradient: str = "exact",
        substitute: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        max_batch: int | None = None,
        early_stop: bool = False,
        precision: str = "float32",
        callback: Callback | None = None,
    ) -> None:
        self.bound = check_number("StAdv", "bound", bound, low=0)
        super().__init__(
            model,
            "flow",
            self.bound,
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
        self.lr = 5 * self.bound / self.steps if lr is None else check_number("StAdv", "lr", lr, low=0)
        self.smoothness = check_number("StAdv", "smoothness", smoothness, low=0)
        self.loss = check_choice("StAdv", "loss", loss, ("ce", "margin"))

    def begin(self, estimator: GradientEstimator, batch: Batch) -> State:
        images, _, _, start = batch
        if start is not None:
            raise ValueError(message("StAdv", "start", "None, as flows start at zero", type(start).__name__))
        flow = images.new_zeros((len(images), 2, *images.shape[2:]))
        moments = {key: torch.zeros_like(flow) for key in ("m", "v")}
        return initial_state(batch, images.clone()) | {"flow": flow} | moments

    def step(self, estimator: GradientEstimator, state: State) -> None:
        estimate = estimator(state["x"], state["labels"], state["ids"], state["t"])
        self.observe(estimate.loss, estimate.correct)
        if self.early_stop:
            state["done"] |= estimate.correct == 0
        assert estimate.gradient is not None
        gradient = self._through_warp(state, self.masked(state, torch.nan_to_num(estimate.gradient)))
        m, v, change = adam_step(state["m"], state["v"], gradient, state["t"], self.lr)
        flow = (state["flow"] + change).clamp_(-self.bound, self.bound)
        new = {"m": m, "v": v, "flow": flow, "x": self.within_mask(state, warp(state["x0"], flow))}
        for key, value in new.items():
            state[key] = torch.where(per_image(state["done"]), state[key], value)
        state["best"] = state["x"]
        state["t"] += ~state["done"]
        state["done"] |= state["t"] >= self.steps

    def _through_warp(self, state: State, gradient: Tensor) -> Tensor:
        """Gradient of the objective with respect to the flow, from that of the loss with respect to the image."""
        with torch.enable_grad():
            flow = state["flow"].detach().requires_grad_()
            objective = (warp(state["x0"], flow) * gradient).sum()
            if self.smoothness:
                objective = objective - self.smoothness * roughness(flow).sum()
        return torch.autograd.grad(objective, flow)[0]


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Images resampled bilinearly, result[p] = image[p + flow[p]].

    Args:
        images: (B, C, H, W).
        flow: (B, 2, H, W), the move along x and along y, on the grid on which [-1, 1] spans the image from edge to
            edge (align_corners=False): pixel j of W is at (2 j + 1) / W - 1. Edge pixels are repeated beyond the edge.

    Returns:
        Images of the same shape, in the range of the given ones; the zero flow gives the images back.
    """
    height, width = images.shape[2:]
    # In float32 a pixel's position would be off by 1e-7 of the width, and the zero flow would blur.
    x, y = ((2 * torch.arange(n, device=images.device, dtype=torch.float64) + 1) / n - 1 for n in (width, height))
    grid = torch.stack((x + flow[:, 0], y[:, None] + flow[:, 1]), dim=-1)
    return F.grid_sample(images.double(), grid, "bilinear", "border", align_corners=False).to(images.dtype)


def roughness(flow: Tensor) -> Tensor:
    """sum_p sum_{q next to p} |f(p) - f(q)|_2 of flows (B, 2, H, W), (B,): Xiao et al., 2018, equation 4."""
    # The root's slope is infinite where neighbors move alike.
    pairs = (flow.diff(dim=dim).square().sum(dim=1).add(1e-12).sqrt().flatten(1).sum(dim=1) for dim in (2, 3))
    # Each pair counts from both of its ends.
    return 2 * sum(pairs, flow.new_zeros(len(flow)))
