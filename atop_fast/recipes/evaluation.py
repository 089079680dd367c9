"""The evaluation's options, which the command `evaluate` and the recipes share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from .._core.checks import check_choice, check_integer, message
from ..attacks import Model
from ..data import Dataset
from ..evaluation import PROTOCOLS, Report, evaluate, quick_attacks

# Options that build the attacks of the protocol "quick".
QUICK = ("steps", "eot_iter", "gradient")


@dataclass(frozen=True)
class EvaluationConfig:
    """How a model is attacked and judged.

    Attributes:
        protocol: quick, pgd-eot, autoattack-rand, autoattack-fixed, bpda-eot, paper, unseen, eot-fast or fast
            (docs/evaluation.md).
        norm: norm of the threat model; default the protocol's.
        eps: its radius, in units of [0, 1] pixels; default the protocol's, required with another norm.
        steps: PGD steps of the protocol quick; default 80 for random models and 20 for others.
        eot_iter: draws in each gradient of PGD in the protocol quick; default 1.
        gradient: of the protocol quick: exact (default), bpda (identity through transform and purifier) or blind.
        images: how many held-out images, at most; default as many as the protocol names, or all.
        draws: K, fresh draws of the verdict; default the protocol's.
        selection_draws: draws of the choice among an image's candidates.
        randomness: fresh, or fixed: mask and noise are fixed for each image and known to the attacker.
        interval: of the means: wilson or bootstrap.
        curve: radii of a curve of accuracy against eps, such as [0, 0.05, 0.1].
        batch_size: images attacked together.
        diagnostics: examine a defense as the command doctor does, for the report.
    """

    protocol: str = "quick"
    norm: Literal["Linf", "L2", "L1"] | None = None
    eps: float | None = None
    steps: int | None = None
    eot_iter: int | None = None
    gradient: Literal["exact", "bpda", "blind"] | None = None
    images: int | None = None
    draws: int | None = None
    selection_draws: int = 20
    randomness: Literal["fresh", "fixed"] = "fresh"
    interval: Literal["wilson", "bootstrap"] = "wilson"
    curve: tuple[float, ...] = ()
    batch_size: int = 100
    diagnostics: bool = True

    def __post_init__(self) -> None:
        check_choice("evaluate", "protocol", self.protocol, list(PROTOCOLS))
        for name in ("images", "steps", "eot_iter"):
            if (value := getattr(self, name)) is not None:
                check_integer("evaluate", name, value, low=1)
        if self.quick and self.protocol != "quick":
            expected = "left out for protocols other than quick"
            raise ValueError(message("evaluate", next(iter(self.quick)), expected, self.protocol))
        _ = self.threat

    @property
    def quick(self) -> dict[str, Any]:
        """The given options of the protocol "quick"."""
        return {name: value for name in QUICK if (value := getattr(self, name)) is not None}

    @property
    def threat(self) -> tuple[str, float]:
        """Norm and radius, the protocol's unless given."""
        return PROTOCOLS[self.protocol].threat(self.norm, self.eps)

    def part(self, data: Dataset) -> Dataset:
        """The images to attack: the first of the held-out ones."""
        return data.take(slice(0, PROTOCOLS[self.protocol].images if self.images is None else self.images))

    def run(self, model: Model, data: Dataset, *, seed: int, **options: Any) -> Report:
        """Evaluate a model on all images of `data`; `options` are further ones of atop_fast.evaluate."""
        norm, eps = self.threat
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in (*QUICK, "images"):
            del own[name]
        if self.quick:
            own["attacks"] = lambda attacked: quick_attacks(attacked, norm, eps, seed, **self.quick)
        return evaluate(model, data, **{**own, "norm": norm, "eps": eps}, seed=seed, **options)
