"""AutoAttack (Croce and Hein, ICML 2020): a fixed ensemble, each attack on the images that the ones before left."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._core.checks import check_choice, check_images, check_integer, check_labels, check_logits, check_radius, message
from .._core.precision import PRECISIONS
from ..defense import Defense, refuse_wrapped
from ..randomness import check_keys, derive_seed
from .apgd import APGD, APGDT
from .base import NORMS, Attack
from .fab import FAB
from .gradient import draw_logits
from .network import Model, frozen
from .pma import PMA
from .square import Square
from .trace import Callback

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab-t", "square", "apgd-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("pma", "apgd-t", "probe"),
    "custom": (),
}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "pma", "probe")
# What completes "fast", which is in doubt where APGD-T fools more than this share of the images after PMA, or a random
# search of so many queries any image after both.
REST = ("apgd-ce", "fab-t", "square")
DOUBT, PROBE = 0.002, 200
DOUBTED = (
    "AutoAttack: 'fast' may leave too many images: APGD-T fooled some that PMA had left, or a random search some that "
    "both had; use complete='auto', or version 'standard'"
)


class AutoAttack:
    """The ensemble, and AutoAttack's own verdict on it.

    - "standard": APGD-CE, APGD-T, FAB-T and Square, for deterministic models.
    - "plus": with APGD-DLR, and five restarts of APGD and FAB-T.
    - "rand": APGD-CE and APGD-DLR with 20 draws a step, for random defences.
    - "fast": PMA, and APGD-T on what is left (as PMA+ of Xie et al., CVPR 2025), for deterministic models; then
      "probe", a Square of 200 queries. Far fewer passes than "standard" for a robust network; its result is, like that
      of every attack, an upper bound on the robust accuracy. It is in doubt if APGD-T fools more than 0.2 % of the
      images after PMA, which then has missed something, or the probe an image after both, whose gradients then mislead.
    - "custom": `attacks_to_run`, each as in "standard".

    An image that one draw of the model gets wrong counts as not robust and is attacked no further. For a random
    defence that verdict is unsound: use atop_fast.evaluate, which judges the same candidates on fresh draws.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm, eps: threat model, "Linf", "L2" or "L1"; eps in units of [0, 1] pixels.
        version: see above.
        attacks_to_run: for "custom": some of "apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "pma", "probe".
        complete: for "fast": True goes on with "apgd-ce", "fab-t" and "square"; "auto" does so in doubt, so that an
            image's result depends on the others of the call; False, the default, warns in doubt.
        seed: key of all randomness.
        precision: of the networks in the attacks; what counts as fooled is always decided in float32. With "bfloat16"
            or "float16" the images that survive are attacked once more in float32 (`finish` of the attacks).
        finish: attacks of the float32 pass after a screen in lower precision; for a network that is not adversarially
            trained add "apgd-t".
        steps, queries, eot_iter: instead of 100 steps of the white-box attacks, 5,000 queries of Square, and the
            version's number of draws.
        max_batch: see Attack.
        progress: show a progress bar, and print the accuracy after every attack.
        callback: see Attack; a TraceStep has the name of its attack in the ensemble.

    Attributes:
        accuracy: after a run, {"clean": ..., attack: accuracy after it}, each from single draws.

    Departures from the original: "plus" has FAB-T in the place of the untargeted FAB; restarts, target classes and
    draws as APGD, FAB and Square say.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        version: str = "standard",
        attacks_to_run: Sequence[str] | None = None,
        seed: int = 0,
        precision: str = "float32",
        finish: Sequence[str] = ("apgd-ce",),
        steps: int = 100,
        queries: int = 5000,
        eot_iter: int | None = None,
        max_batch: int | None = None,
        progress: bool = False,
        callback: Callback | None = None,
        complete: bool | str = False,
    ) -> None:
        name = "AutoAttack"
        refuse_wrapped(name, model)
        self.model = model
        self.norm, self.eps = check_choice(name, "norm", norm, NORMS), check_radius(name, norm, eps)
        self.version = check_choice(name, "version", version, list(VERSIONS))
        if (attacks_to_run is not None) != (version == "custom"):
            raise ValueError(
                message(name, "attacks_to_run", "given with version 'custom', and only then", attacks_to_run)
            )
        if complete not in (False, True, "auto"):
            raise ValueError(message(name, "complete", "True, False or 'auto'", complete))
        self.complete = complete
        if complete and version != "fast":
            raise ValueError(message(name, "complete", "False for all versions but 'fast'", complete))
        self.attacks_to_run = tuple(attacks_to_run or VERSIONS[version]) + (REST if complete is True else ())
        for argument, attacks in (("attacks_to_run", self.attacks_to_run), ("finish", finish)):
            for attack in attacks:
                check_choice(name, argument, attack, NAMES)
        self.precision = check_choice(name, "precision", precision, list(PRECISIONS))
        self.finish = tuple(finish)
        self.seed = check_integer(name, "seed", seed, low=-(2**63), high=2**63 - 1)
        self.steps = check_integer(name, "steps", steps, low=1)
        self.queries = check_integer(name, "queries", queries, low=1)
        default = 20 if version == "rand" else 1
        self.eot_iter = default if eot_iter is None else check_integer(name, "eot_iter", eot_iter, low=1)
        self.max_batch = None if max_batch is None else check_integer(name, "max_batch", max_batch, low=1)
        self.progress, self.callback = bool(progress), callback
        self.accuracy: dict[str, float] = {}

    def build(self, attack: str, precision: str | None = None) -> Attack:
        """One attack of the ensemble, with this version's settings."""
        options: dict[str, Any] = {
            "norm": self.norm,
            "eps": self.eps,
            "seed": derive_seed(self.seed, attack),
            "early_stop": not isinstance(self.model, Defense) and self.version != "rand",
            "precision": precision or self.precision,
            "max_batch": self.max_batch,
            "eot_iter": self.eot_iter,
            "callback": _named(self.callback, self._title(attack, precision)),
        }
        # AutoAttack's own settings for L1.
        sparse = self.norm == "L1" and self.version in ("standard", "custom", "fast")
        restarts = 5 if self.version == "plus" or (sparse and attack == "apgd-ce") else 1
        if attack in ("apgd-ce", "apgd-dlr"):
            loss = attack.removeprefix("apgd-")
            return APGD(self.model, steps=self.steps, loss=loss, restarts=restarts, shrink_eps=sparse, **options)
        if attack == "apgd-t":
            classes = 5 if sparse else 9
            return APGDT(self.model, steps=self.steps, target_classes=classes, shrink_eps=sparse, **options)
        if attack == "pma":
            return PMA(self.model, steps=self.steps, restarts=restarts, **options)
        if attack == "fab-t":
            return FAB(self.model, steps=self.steps, restarts=restarts, **options)
        queries = min(PROBE, self.queries) if attack == "probe" else self.queries
        return Square(self.model, queries=queries, resc_schedule=False, **options)

    def run_standard_evaluation(self, x: Tensor, y: Tensor, bs: int = 250) -> Tensor:
        """Adversarial images of x (N, C, H, W) in [0, 1] with labels y, int64 (N,); where all attacks fail, x itself.

        `bs` images at most go through the model at a time in verdicts; attacks size their passes themselves. The result
        does not depend on it, unless the model has randomness of its own (see atop_fast.attacks.draw_logits).
        """
        return self._evaluate(x, y, None, bs)

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """As run_standard_evaluation, with the identities of the images, int64 (N,)."""
        return self._evaluate(images, labels, sample_ids, 250)

    def _evaluate(self, x: Tensor, y: Tensor, sample_ids: Tensor | None, bs: int) -> Tensor:
        name = "AutoAttack"
        x = check_images(name, "x", x)
        check_labels(name, "y", y, x)
        check_integer(name, "bs", bs, low=1)
        ids, _ = check_keys(name, len(x), x.device, self.seed, sample_ids, 0)
        result = x.detach().clone()
        plan = [(attack, self.precision) for attack in self.attacks_to_run]
        if self.precision != "float32":
            plan += [(attack, "float32") for attack in self.finish]
        with frozen(self.model):
            if len(x):
                logits = draw_logits(self.model, x[:1], self.seed, ids[:1], range(1), bs, name)[:, 0]
                check_logits(name, logits, 1, int(y.max()), "y")
            robust = self._right(result, y, ids, "clean", bs)
            self.accuracy = {"clean": _share(robust)}
            for attack, precision in tqdm(plan, desc=name, disable=not self.progress):
                left = robust.nonzero()[:, 0]
                if len(left):
                    candidates = self.build(attack, precision)(x[left], y[left], ids[left])
                    right = self._right(candidates, y[left], ids[left], attack, bs)
                    result[left[~right]] = candidates[~right]
                    robust[left[~right]] = False
                title = self._title(attack, precision)
                self.accuracy[title] = _share(robust)
                if self.progress:
                    tqdm.write(f"{name}: robust accuracy after {title}: {self.accuracy[title]:.4f}")
                if attack == "probe" and self.complete == "auto" and self.in_doubt:
                    plan += [(further, "float32") for further in REST]
        if self.version == "fast" and self.complete is False and self.in_doubt:
            warnings.warn(DOUBTED, RuntimeWarning, stacklevel=3)
        return result

    @property
    def in_doubt(self) -> bool:
        """After a run of "fast": whether it may have left images that "standard" fools."""
        after_pma, after_both, after_probe = (self.accuracy[name] for name in ("pma", "apgd-t", "probe"))
        return after_pma - after_both > DOUBT or after_probe < after_both

    def _title(self, attack: str, precision: str | None) -> str:
        return attack if precision in (None, self.precision) else f"{attack} ({precision})"

    def _right(self, x: Tensor, y: Tensor, ids: Tensor, name: str, bs: int) -> Tensor:
        """Whether one draw of the caller's own model, in float32, is right, bool (N,)."""
        # Not a key of evaluate's verdicts, whose seed this may share.
        seed = derive_seed(self.seed, "autoattack", name)
        parts = [
            draw_logits(self.model, x[part], seed, ids[part], range(1), bs, "AutoAttack")[:, 0].argmax(dim=1) == y[part]
            for part in torch.arange(len(x), device=x.device).split(bs)
            if len(part)
        ]
        return torch.cat([*parts, torch.zeros(0, dtype=torch.bool, device=x.device)])

    def __repr__(self) -> str:
        hidden = ("model", "progress", "accuracy", "callback")
        return f"AutoAttack({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k not in hidden)})"


def _named(callback: Callback | None, name: str) -> Callback | None:
    """The callback, called with steps of this attack's name."""
    return None if callback is None else lambda step: callback(step._replace(attack=name))


def _share(robust: Tensor) -> float:
    return float(robust.double().mean()) if len(robust) else float("nan")
