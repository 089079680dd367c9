"""Basis of all checks: findings, a context that leaves the model unchanged, and the statistics of comparisons."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._core.flags import holding
from .._core.hidden import foreign_modules
from ..attacks import PGD, Model
from ..defense import Defense, classifier_alone
from ..ops import attack_loss
from ..randomness import REPEATED_DRAWS, derive_seed, seed_generators, seeded, watched_generators

Status = Literal["pass", "warn", "fail"]
# Standard errors of a comparison beyond which a check warns or fails.
WARN, FAIL = 2.0, 3.0
# Required expected cosine of an n-draw gradient with the true mean, and the maximum number of draws tried.
COSINE, MOST_DRAWS = 0.9, 64
# Maximum number of draws in each gradient of the attacks here, unless the caller sets it.
ATTACK_DRAWS = 8


@dataclass(frozen=True)
class Finding:
    """The result of one check; dataclasses.asdict makes it JSON-ready.

    Attributes:
        name: the check.
        status: "pass", "warn" (results are in doubt) or "fail" (results would be wrong or meaningless).
        reason: the reason, with numbers and advice.
        numbers: the measurements.
    """

    name: str
    status: Status
    reason: str
    numbers: dict[str, Any]


class Probe:
    """A model and the images on which it is examined.

    Randomness is keyed by (seed, sample id, draw) for a Defense. For another callable a draw seeds the global
    generators of torch, Python and numpy, which `untouched` restores.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        x: images (B, C, H, W); y: int64 classes (B,); ids: int64 (B,), the identity of every image.
        norm, eps: threat model; eps in units of [0, 1] pixels.
        seed: key of all randomness.
        steps: PGD steps.
        eot_iter: draws in each gradient of an attack; None takes what the gradient's noise asks for, at most 8.
        total: images whose evaluation is planned.

    Attributes:
        training: the same model on some of its training images, if they are known.
    """

    training: Probe | None = None

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        ids: Tensor,
        *,
        norm: str,
        eps: float,
        seed: int,
        steps: int,
        eot_iter: int | None,
        total: int,
    ) -> None:
        self.model, self.x, self.y, self.ids = model, x, y, ids
        self.norm, self.eps, self.seed, self.steps, self.total = norm, eps, seed, steps, total
        self._eot_iter = eot_iter
        self._adversarial: dict[tuple[object, ...], Tensor] = {}
        self._attacked: dict[tuple[object, ...], Tensor] = {}

    @cached_property
    def alone(self) -> Probe:
        """The same images under the classifier of a Defense, without transform and purifier; for another model itself.

        A classifier that draws gets the key that it gets in the Defense.
        """
        if not isinstance(self.model, Defense):
            return self
        return self.of(classifier_alone(self.model), self._eot_iter)

    def of(self, model: Model, eot_iter: int | None) -> Probe:
        """The same images and threat model for another model."""
        options: dict[str, Any] = {"norm": self.norm, "eps": self.eps, "seed": self.seed, "steps": self.steps}
        return Probe(model, self.x, self.y, self.ids, **options, eot_iter=eot_iter, total=self.total)

    def logits(self, x: Tensor, draw: int = 0, purpose: str = "probe", ids: Tensor | None = None) -> Tensor:
        """Logits (B, classes), float32, under one draw; equal (purpose, draw) give equal randomness.

        x must be self.x or a modification of it, unless ids are given.
        """
        return self.output(x, draw, purpose, ids).float()

    def output(self, x: Tensor, draw: int = 0, purpose: str = "probe", ids: Tensor | None = None) -> Any:
        """The model's raw output; logits, if it keeps the contract. See `logits`."""
        seed = derive_seed(self.seed, purpose)
        # A model may write into its input.
        x = x.clone()
        if isinstance(self.model, Defense):
            return self.model(x, seed, self.ids if ids is None else ids, draw)
        seed_generators(derive_seed(seed, draw), x.device)
        return self.model(x)

    def gradient(
        self, x: Tensor, loss: str = "ce", draw: int = 0, count: int | None = None
    ) -> tuple[Tensor, Tensor, bool]:
        """Loss (B,), its input gradient (B, C, H, W), and whether the logits are attached to the images at all.

        `loss` is "ce", or "margin" = max_{j != y} z_j - z_y. Only the first `count` images are taken.
        """
        leaf = x[:count].detach().clone().requires_grad_()
        with torch.enable_grad():
            z = self.logits(leaf, draw, ids=self.ids[:count])
            value = attack_loss(z, self.y[:count], loss).losses
            if not value.requires_grad:
                return value, torch.zeros_like(leaf), False
            (gradient,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
        attached = gradient is not None
        return value.detach(), gradient if attached else torch.zeros_like(leaf), attached

    @cached_property
    def random(self) -> bool:
        """Whether another draw gives other logits."""
        return self.change() > 1e-4

    def change(self) -> float:
        """How much the logits of draw 0 differ from those of the first draw that is another, or of all that are tried.

        A model that draws from the global generators may draw once for a whole batch, and its draws may seldom differ;
        each image of a Defense has draws of its own.
        """
        key = (derive_seed(self.seed, "probe"), self.ids, 0) if isinstance(self.model, Defense) else ()
        with torch.no_grad():
            # Not by `logits`, which seeds the generators.
            with watched_generators() as generators:
                self.model(self.x.clone(), *key)
            alone = isinstance(self.model, Defense) and not generators.drawn
            others = -(-REPEATED_DRAWS // len(self.x)) if alone else REPEATED_DRAWS if generators.drawn else 1
            first, largest = self.logits(self.x), 0.0
            for draw in range(1, 1 + others):
                largest = max(largest, difference(first, self.logits(self.x, draw)))
                if largest > 1e-4:
                    break
        return largest

    @cached_property
    def reproducible(self) -> bool:
        """Whether the same draw gives the same logits; if not, the model's randomness cannot be controlled."""
        with torch.no_grad():
            first, second = self.logits(self.x), self.logits(self.x)
        return same(first, second)

    @property
    def draws(self) -> int:
        """The number of draws that judge an image."""
        return 8 if self.random or not self.reproducible else 1

    def correct(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Share of fresh draws (B,) in which images are classified correctly: by the labels, or as `outputs` (B,)."""
        expected = self.y if outputs is None else outputs
        with torch.no_grad():
            hits = [self.logits(x, draw, "verdict").argmax(dim=1) == expected for draw in range(self.draws)]
        return torch.stack(hits).float().mean(dim=0)

    @cached_property
    def clean(self) -> Tensor:
        """Share of fresh draws (B,) in which the clean images are classified correctly."""
        return self.correct(self.x)

    def attacked(self, eps: float, attack: type[PGD] = PGD, gradient: str = "exact") -> Tensor:
        """Share of fresh draws (B,) that are correct under an attack; cached."""
        key = (attack, eps, gradient)
        if key not in self._attacked:
            self._attacked[key] = self.correct(self.adversarial(eps, attack, gradient))
        return self._attacked[key]

    def adversarial(self, eps: float, attack: type[PGD] = PGD, gradient: str = "exact") -> Tensor:
        """Adversarial images (B, C, H, W); cached."""
        key = (attack, eps, gradient)
        if key not in self._adversarial:
            options: dict[str, Any] = {"eot_iter": self.eot_iter, "seed": derive_seed(self.seed, "attack")}
            if attack is PGD:
                options["steps"] = self.steps
            run = attack(self.model, norm=self.norm, eps=eps, gradient=gradient, **options)
            self._adversarial[key] = run(self.x, self.y, self.ids)
        return self._adversarial[key]

    @property
    def eot_iter(self) -> int:
        """The number of draws in each gradient of an attack."""
        if not self.random and self.reproducible:
            return 1
        if self._eot_iter is not None:
            return self._eot_iter
        return next((n for n, cosine in self.cosines.items() if cosine >= COSINE or n == ATTACK_DRAWS))

    @cached_property
    def cosines(self) -> dict[int, float]:
        """Expected cosine of the mean of n = 1, 2, 4 .. 64 gradients with the true mean gradient.

        With mu the mean of one draw's gradient and v its variance (the trace of its covariance), the signal-to-noise
        ratio is SNR(n) = |mu|^2 / (v / n), and the cosine about |mu| / sqrt(|mu|^2 + v / n) = sqrt(SNR / (1 + SNR)).
        The average is over 8 of the images, except those without a gradient. |mu|^2 is estimated from N = 64 draws per
        image, whose squared mean exceeds it by v / N.
        """
        sizes = [2**k for k in range(MOST_DRAWS.bit_length())]
        if not self.random and self.reproducible:
            return dict.fromkeys(sizes, 1.0)
        draws = [self.gradient(self.x, "ce", draw, 8)[1].flatten(1) for draw in range(MOST_DRAWS)]
        # Gradients of saturated images are as small as 1e-30; their squares would underflow in float32.
        g = torch.stack(draws).double()
        variance = g.var(dim=0).sum(dim=1)
        signal = (g.mean(dim=0).square().sum(dim=1) - variance / len(g)).clamp_min(0)
        moving = variance + signal > 0
        if not moving.any():
            return dict.fromkeys(sizes, 0.0)
        share = {n: n * signal / (n * signal + variance) for n in sizes}
        return {n: float(s[moving].sqrt().mean()) for n, s in share.items()}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two sets of logits, relative to their size."""
    return float((a - b).abs().max() / torch.maximum(a.abs().max(), b.abs().max()).clamp_min(1e-30))


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two sets of logits are equal up to rounding, for example due to another order of summation."""
    return difference(a, b) <= 1e-4


def excess(a: Tensor, b: Tensor) -> float:
    """The difference of the means of a and b in standard errors, for accuracies (B,) on the same images.

    It is sum d / sqrt(sum d^2) with d = a - b. For yes/no values, this is McNemar's statistic (1947), in which only
    images count on which the two differ: (n10 - n01) / sqrt(n10 + n01).
    """
    d = (a - b).double()
    return float(d.sum() / d.square().sum().sqrt().clamp_min(1e-12))


def judged(errors: float) -> Status:
    """The status of an expectation that is violated by this many standard errors."""
    return "fail" if errors > FAIL else "warn" if errors > WARN else "pass"


@contextlib.contextmanager
def untouched(model: object, device: torch.device, evaluation: bool = True) -> Iterator[None]:
    """Leave a model and the global generators exactly as they were, also after an error.

    Inside, parameters ask for no gradient, and with `evaluation` every module is in evaluation mode. Modes,
    requires_grad, the buffers with their contents, and the generators of Python, of numpy, and of torch for the CPU and
    `device` are restored; threads take turns for the generators. Of the networks that a plain function calls, only the
    buffers are restored.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    # Frozen TorchScript has no mode.
    training = [getattr(m, "training", None) for m in modules]
    flags: list[tuple[object, str, bool]] = [(p, "requires_grad", False) for p in parameters]
    flags += [
        (m, "training", False) for m, mode in zip(modules, training, strict=True) if evaluation and mode is not None
    ]
    owners = [*modules, *(m for network in foreign_modules(model) for m in network.modules())]
    buffers = [{k: (b, None if b is None else b.clone()) for k, b in m._buffers.items()} for m in owners]
    try:
        with holding(flags), seeded(0, device):
            yield
    finally:
        for m, mode in zip(modules, training, strict=True):
            if not evaluation and mode is not None:
                m.training = mode
        for m, kept in zip(owners, buffers, strict=True):
            # A module may have modified or replaced a buffer.
            for k, (b, contents) in kept.items():
                m._buffers[k] = b
                if contents is not None:
                    with torch.no_grad():
                        b.copy_(contents)
