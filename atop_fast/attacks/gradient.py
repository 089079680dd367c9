"""The gradient estimator under every attack: exact, BPDA or blind, averaged over draws (EOT)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_choice, check_integer
from ..defense import Defense
from ..ops import resize

Model = Callable[..., Tensor]
GRADIENT_MODES = ("exact", "bpda", "blind")


class GradientEstimator:
    """Gradient of the summed cross-entropy with respect to the images, averaged over draws of the defence.

        g(x) = 1/n sum_draw grad_x CE(model(x; draw), y)                 EOT, Athalye et al., ICML 2018

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits. The draws of a Defense are keyed
            by (seed, sample id, draw); those of another callable are repeated calls, whatever its randomness is.
        mode: "exact" differentiates transform, purifier and classifier; "bpda" takes the derivative of transform and
            purifier as the identity (Athalye et al., 2018); "blind" attacks the classifier alone. The last two need a
            Defense.
        eot_iter: number n of draws.
        max_batch: most images in one forward pass; the draws are folded into the batch up to it.

    Raises:
        TypeError: "bpda" or "blind" for a model that is no Defense.
    """

    def __init__(self, model: Model, mode: str = "exact", eot_iter: int = 1, max_batch: int = 1024) -> None:
        check_choice("GradientEstimator", "mode", mode, GRADIENT_MODES)
        check_integer("GradientEstimator", "eot_iter", eot_iter, low=1)
        check_integer("GradientEstimator", "max_batch", max_batch, low=1)
        if mode != "exact" and not isinstance(model, Defense):
            raise TypeError(f"GradientEstimator: mode {mode!r} needs a Defense, got {type(model).__name__}")
        self.model, self.mode, self.max_batch = model, mode, max_batch
        self.eot_iter = 1 if mode == "blind" else eot_iter

    def __call__(self, x: Tensor, labels: Tensor, seed: int, sample_ids: Tensor, step: int) -> Tensor:
        """Gradient (B, C, H, W) at images x; step t uses the draws t * eot_iter .. (t + 1) * eot_iter - 1."""
        total = torch.zeros_like(x)
        for draws in _folds(range(step * self.eot_iter, (step + 1) * self.eot_iter), x, self.max_batch):
            gradients = self._gradients(x, labels, seed, sample_ids, draws)
            total += gradients.unflatten(0, (len(draws), len(x))).sum(dim=0)
        return total.div_(self.eot_iter)

    def _gradients(self, x: Tensor, labels: Tensor, seed: int, sample_ids: Tensor, draws: Tensor) -> Tensor:
        """Gradients (n * B, C, H, W), draw by draw."""
        leaf = x.detach().repeat(len(draws), 1, 1, 1).requires_grad_()
        with torch.enable_grad():
            logits = self._forward(leaf, seed, sample_ids, draws)
            loss = F.cross_entropy(logits.float(), labels.repeat(len(draws)), reduction="sum")
        return torch.autograd.grad(loss, leaf)[0]

    def _forward(self, leaf: Tensor, seed: int, sample_ids: Tensor, draws: Tensor) -> Tensor:
        if not isinstance(self.model, Defense):
            return torch.cat([self.model(part) for part in leaf.chunk(len(draws))])
        if self.mode == "blind":
            return self.model.classifier(leaf)
        key = _folded_key(seed, sample_ids, draws)
        if self.mode == "exact":
            return self.model(leaf, *key)
        purified = self.model.purify(leaf.detach(), *key).detach()
        # A transform may have resized the images; then the "identity" is the resize alone.
        identity = leaf if leaf.shape == purified.shape else resize(leaf, (purified.shape[2], purified.shape[3]))
        return self.model.classifier(purified + (identity - identity.detach()))


def draw_logits(model: Model, x: Tensor, seed: int, sample_ids: Tensor, draws: range, max_batch: int = 1024) -> Tensor:
    """Logits (B, draws, classes) of images x under the given draws, no gradients; `model` as in GradientEstimator."""
    if not isinstance(model, Defense):
        with torch.no_grad():
            return torch.stack([model(x).float() for _ in draws], dim=1)
    parts = []
    for part in _folds(draws, x, max_batch):
        with torch.no_grad():
            logits = model(x.repeat(len(part), 1, 1, 1), *_folded_key(seed, sample_ids, part))
        parts.append(logits.float().unflatten(0, (len(part), len(x))))
    return torch.cat(parts).transpose(0, 1)


def _folds(draws: range, x: Tensor, max_batch: int) -> Iterator[Tensor]:
    """The draws in parts (n,) with which the batch x, repeated n times, stays within max_batch images."""
    fold = max(1, max_batch // max(1, len(x)))
    for first in range(0, len(draws), fold):
        yield torch.tensor(draws[first : first + fold], device=x.device)


def _folded_key(seed: int, sample_ids: Tensor, draws: Tensor) -> tuple[int, Tensor, Tensor]:
    """The key of a batch repeated once for each of the draws (n,), draw by draw."""
    return seed, sample_ids.repeat(len(draws)), draws.repeat_interleave(len(sample_ids))


@contextlib.contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; both restored afterwards, also after an error."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    parameters = [p for model in models if isinstance(model, nn.Module) for p in model.parameters()]
    training, requires_grad = [m.training for m in modules], [p.requires_grad for p in parameters]
    try:
        for m in modules:
            m.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for m, was in zip(modules, training, strict=True):
            m.training = was
        for p, was in zip(parameters, requires_grad, strict=True):
            p.requires_grad_(was)
