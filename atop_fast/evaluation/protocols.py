"""Evaluation protocols by name: which attacks, with which settings, judged by how many draws, and who proposed them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .._core.checks import message
from ..attacks import FGSM, PGD, Model
from ..defense import Defense
from ..randomness import derive_seed

AnyAttack = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Entry:
    """One attack of a protocol.

    Attributes:
        attack: name of its class in atop_fast.attacks.
        options: its options besides model and seed.
        deterministic: options that take the place of those for deterministic models.
    """

    attack: str
    options: Mapping[str, Any] = field(default_factory=dict)
    deterministic: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How to evaluate.

    Attributes:
        attacks: name -> Entry, in the order in which they run.
        citation: source of the settings.
        norm, eps: default threat model; eps in units of [0, 1] pixels.
        draws: K, fresh draws of every verdict.
        images: number of images that the source evaluates; None if it does not state one, or uses all.
        headline: the unsound verdict that the source reports, shown beside ours: "single_draw", "fixed_draws" or None.
        cascade: images of a deterministic model that one attack has fooled are not attacked by the next.
    """

    attacks: Mapping[str, Entry]
    citation: str
    norm: str = "Linf"
    eps: float = 8 / 255
    draws: int = 20
    images: int | None = None
    headline: str | None = None
    cascade: bool = False

    def threat(self, norm: str | None, eps: float | None) -> tuple[str, float]:
        """Norm and radius: the given ones, or the protocol's own.

        Raises:
            ValueError: a norm other than the protocol's without a radius. 8/255 in L2 is next to no attack.
        """
        if eps is None and norm not in (None, self.norm):
            expected = f"given with the norm {norm}, as the protocol's {self.eps:.4g} is a radius in {self.norm}"
            raise ValueError(message("evaluate", "eps", expected, None))
        return self.norm if norm is None else norm, self.eps if eps is None else eps


def _apgd(loss: str, **options: Any) -> Entry:
    return Entry("APGD", {"loss": loss, "steps": 100, **options})


# Momentum averages over the draws of all steps, so that a few draws per step suffice. At equal passes, this is stronger
# than constant steps of 4 draws (docs/evaluation.md).
_STRONG: dict[str, Any] = {"momentum": 0.9, "schedule": "cosine"}
_QUICK = Entry("PGD", {"steps": 80, **_STRONG}, {"steps": 20, "momentum": 0.0, "schedule": "constant"})
_RAND = {"apgd_ce": _apgd("ce", eot_iter=20), "apgd_dlr": _apgd("dlr", eot_iter=20)}
_CROCE = "Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse attacks, ICML 2020"
_LEE = "Lee and Kim, Robust evaluation of diffusion-based adversarial purification, ICCV 2023"
_XIE = "Xie et al., Towards million-scale adversarial robustness evaluation with stronger individual attacks, CVPR 2025"
_ATOP = "Lin et al., Adversarial training on purification, ICLR 2024"

PROTOCOLS: dict[str, Protocol] = {
    "quick": Protocol(
        {"fgsm": Entry("FGSM", {"eot_iter": 4}), "pgd_eot": _QUICK},
        "Goodfellow et al., ICLR 2015; Madry et al., ICLR 2018; Athalye et al., ICML 2018; Dong et al., CVPR 2018: a "
        "first look",
    ),
    "pgd-eot": Protocol(
        {"pgd200_eot20": Entry("PGD", {"steps": 200, "alpha": 0.007, "eot_iter": 20, "random_start": False})},
        _LEE,
        images=512,
    ),
    "autoattack-rand": Protocol(_RAND, _CROCE + " (version rand)", headline="single_draw"),
    "autoattack-fixed": Protocol(_RAND, _LEE + " (AutoAttack rand, judged by 20 draws)", headline="fixed_draws"),
    "bpda-eot": Protocol(
        {"bpda50_eot15": Entry("PGD", {"steps": 50, "alpha": 2 / 255, "eot_iter": 15, "gradient": "bpda",
                                       "random_start": False})},
        "Hill et al., Stochastic security, ICLR 2021; Nie et al., DiffPure, ICML 2022",
        draws=150,
    ),
    "paper": Protocol(
        {
            "apgd_ce": _apgd("ce"),
            "apgd_t": Entry("APGDT", {"steps": 100, "target_classes": 9}),
            "fab_t": Entry("FAB", {"steps": 100, "target_classes": 9}),
            "square": Entry("Square", {"n_queries": 5000}),
        },
        _ATOP + "; " + _CROCE + " (version standard)",
        images=512,
        headline="single_draw",
        cascade=True,
    ),
    "unseen": Protocol(
        {
            "apgd_ce_l2": _apgd("ce", eot_iter=20),
            "pgd100_eot20_l2": Entry("PGD", {"steps": 100, "eot_iter": 20}),
            "stadv": Entry("StAdv", {"bound": 0.05, "steps": 100, "eot_iter": 20}),
        },
        _ATOP + "; Xiao et al., Spatially transformed adversarial examples, ICLR 2018",
        norm="L2",
        eps=0.5,
    ),
    "eot-fast": Protocol(
        {"pgd100_eot4": Entry("PGD", {"steps": 100, "eot_iter": 4, **_STRONG})},
        "Athalye et al., ICML 2018; Dong et al., CVPR 2018: few draws a step, averaged by momentum over steps",
    ),
    "fast": Protocol(
        {
            "pma": Entry("PMA", {"steps": 100}),
            "apgd_t": Entry("APGDT", {"steps": 100, "target_classes": 3}),
            # Fools nothing after the others, unless their gradients mislead.
            "square": Entry("Square", {"n_queries": 200, "resc_schedule": False}),
        },
        _XIE + " (PMA+); Andriushchenko et al., ECCV 2020",
        cascade=True,
    ),
}  # fmt: skip

# The cheapest attack that is not easily masked: what the curve of accuracy against eps repeats.
CURVE = _QUICK


def build_attack(
    entry: Entry,
    model: Model,
    norm: str,
    eps: float,
    seed: int,
    deterministic: bool = False,
    max_batch: int | None = None,
) -> AnyAttack:
    """The attack of an entry on a model.

    For a deterministic model, it takes a single draw and stops at an image as soon as it is fooled.
    """
    attack = getattr(importlib.import_module("atop_fast.attacks"), entry.attack)
    options: dict[str, Any] = {**entry.options, "seed": derive_seed(seed, "attack")}
    if deterministic:
        options |= entry.deterministic
    if entry.attack != "StAdv":
        options |= {"norm": norm, "eps": eps}
    if max_batch is not None:
        options["max_batch"] = max_batch
    if deterministic and "eot_iter" in options:
        options["eot_iter"] = 1
    # A Defense whose draws do not differ is deterministic, but its attacks cannot know.
    options["early_stop"] = deterministic and not isinstance(model, Defense)
    return attack(model, **options)


def build_attacks(
    protocol: Protocol,
    model: Model,
    norm: str,
    eps: float,
    seed: int,
    deterministic: bool = False,
    max_batch: int | None = None,
) -> dict[str, AnyAttack]:
    """The attacks of a protocol by name; see build_attack."""
    return {
        name: build_attack(entry, model, norm, eps, seed, deterministic, max_batch)
        for name, entry in protocol.attacks.items()
    }


def quick_attacks(
    model: Model,
    norm: str = "Linf",
    eps: float = 8 / 255,
    seed: int = 0,
    gradient: str = "exact",
    steps: int = 80,
    eot_iter: int = 1,
    max_batch: int | None = None,
) -> dict[str, AnyAttack]:
    """The attacks of the protocol quick for random models, through the whole model: {"fgsm", "pgd_eot"}.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm, eps: threat model, "Linf" or "L2"; eps in units of [0, 1] pixels.
        seed: key of the evaluation.
        gradient: "exact"; or, for a Defense alone, "checkpointed", "bpda" or "blind".
        steps, eot_iter: of PGD, with momentum 0.9 and cosine steps; FGSM takes 4 draws, or eot_iter if that is more.
        max_batch: maximum number of rows in one pass; None takes as many as save about 1 GiB for the backward pass.
    """
    options: dict[str, Any] = {"gradient": gradient, "seed": derive_seed(seed, "attack")}
    if max_batch is not None:
        options["max_batch"] = max_batch
    fgsm = FGSM(model, eps, norm=norm, eot_iter=max(4, eot_iter), **options)
    pgd = PGD(model, eps, norm=norm, steps=steps, eot_iter=eot_iter, **_STRONG, **options)
    return {"fgsm": fgsm, "pgd_eot": pgd}
