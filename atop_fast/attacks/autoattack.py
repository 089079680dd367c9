"""AutoAttack (Croce and Hein, ICML 2020): a fixed ensemble, each attack on the images that the ones before left."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._core.checks import (
    check_choice,
    check_device,
    check_images,
    check_integer,
    check_labels,
    check_logits,
    check_radius,
    message,
)
from .._core.files import writable_folder
from .._core.precision import PRECISIONS, full_precision
from ..defense import Defense, check_model
from ..randomness import check_keys, derive_seed
from .apgd import APGD
from .apgdt import APGDT
from .ball import NORMS
from .base import Attack
from .draws import draw_logits
from .fab import FAB
from .network import Model, frozen
from .pma import PMA
from .square import Square
from .trace import Callback

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab-t", "square", "apgd-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("pma", "apgd-t3", "probe"),
    "custom": (),
}
NAMES = ("apgd-ce", "apgd-dlr", "apgd-t", "apgd-t3", "fab-t", "square", "pma", "probe")
# The attacks that complete "fast". Its result is in doubt if APGD-T fools more than this share of the images after PMA,
# or if a random search of so many queries fools any image after both.
REST = VERSIONS["standard"]
DOUBT, PROBE = 0.002, 200
DOUBTED = (
    "AutoAttack: 'fast' may leave too many images: APGD-T fooled some that PMA had missed, or a random search some "
    "that both had missed; use complete='auto', or version 'standard'"
)


class AutoAttack:
    """The ensemble, and AutoAttack's own verdict on it.

    - "standard": APGD-CE, APGD-T, FAB-T and Square, for deterministic models.
    - "plus": with APGD-DLR, and five restarts of APGD and FAB-T.
    - "rand": APGD-CE and APGD-DLR with 20 draws a step, for random defenses.
    - "fast": PMA, and APGD-T on what is left (as PMA+ of Xie et al., CVPR 2025), for deterministic models; then
      "probe", a Square of 200 queries. APGD-T has 3 target classes ("apgd-t3") instead of 9. Far fewer passes than
      "standard" for a robust network; its result is, like that of every attack, an upper bound on the robust
      accuracy. It is in doubt if APGD-T fools more than 0.2 % of the images after PMA, a sign that PMA misses some,
      or if the probe fools any after both, a sign of masked gradients.
    - "custom": `attacks_to_run`, each as in "standard".

    An image that one draw of the model gets wrong counts as not robust and is attacked no further. For a random
    defense that verdict is unsound: use atop_fast.evaluate, which judges the same candidates on fresh draws.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits.
        norm: "Linf", "L2" or "L1".
        eps: radius of the ball around the image, in units of [0, 1] pixels.
        version: see above.
        attacks_to_run: for "custom": some of "apgd-ce", "apgd-dlr", "apgd-t", "apgd-t3", "fab-t", "square", "pma" and
            "probe".
        complete: for "fast": True goes on with the attacks of "standard"; "auto" does so in doubt, so that an
            image's result depends on the others of the call; False, the default, warns in doubt.
        seed: key of all randomness.
        device: device of the attacks, such as "cuda"; a model that is a module must be on it. None: the device of the
            images. Results are returned on the images' device in both cases.
        verbose: show a progress bar, and print the accuracy after every attack.
        log_path: file to which the accuracy after every attack is appended, with the time.
        precision: of the networks in the attacks; what counts as fooled is always decided in float32. With "bfloat16"
            or "float16" the images that survive are attacked once more in float32 (`finish` of the attacks).
        finish: attacks of the float32 pass after a screen in lower precision; for a network that is not adversarially
            trained add "apgd-t".
        steps: iterations of the white-box attacks.
        n_queries: queries of Square.
        eot_iter: draws of the model in each gradient and query; None: the version's number.
        max_batch: most rows of one pass; None takes as many as save about 1 GiB for the backward pass.
        callback: called with a TraceStep after each step of every attack, which has the name of its attack in the
            ensemble; on a GPU this synchronizes at every step.

    Attributes:
        accuracy: after a run, {"clean": ..., attack: accuracy after it}, each from single draws.
        in_doubt: after a run of "fast": whether it may have left images that "standard" fools.

    Departures from the original: "plus" has FAB-T in the place of the untargeted FAB; restarts, target classes and
    draws are those of APGD, FAB and Square.
    """

    def __init__(
        self,
        model: Model,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        version: str = "standard",
        attacks_to_run: Sequence[str] | None = None,
        complete: bool | str = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        verbose: bool = False,
        log_path: str | Path | None = None,
        precision: str = "float32",
        finish: Sequence[str] = ("apgd-ce",),
        steps: int = 100,
        n_queries: int = 5000,
        eot_iter: int | None = None,
        max_batch: int | None = None,
        callback: Callback | None = None,
    ) -> None:
        name = "AutoAttack"
        check_model(name, model)
        self.model = model
        self.norm, self.eps = check_choice(name, "norm", norm, NORMS), check_radius(name, norm, eps)
        self.version = check_choice(name, "version", version, list(VERSIONS))
        if bool(attacks_to_run) != (version == "custom"):
            raise ValueError(
                message(name, "attacks_to_run", "given with version 'custom', and only then", attacks_to_run)
            )
        if complete not in (False, True, "auto"):
            raise ValueError(message(name, "complete", "True, False or 'auto'", complete))
        # Others may equal a bool, such as 1.
        self.complete = complete if complete == "auto" else bool(complete)
        if complete and version != "fast":
            raise ValueError(message(name, "complete", "False for all versions but 'fast'", complete))
        self.attacks_to_run = tuple(attacks_to_run or VERSIONS[version]) + (REST if self.complete is True else ())
        for argument, attacks in (("attacks_to_run", self.attacks_to_run), ("finish", finish)):
            for attack in attacks:
                check_choice(name, argument, attack, NAMES)
        self.precision = check_choice(name, "precision", precision, list(PRECISIONS))
        self.finish = tuple(finish)
        self.seed = check_integer(name, "seed", seed, low=-(2**63), high=2**63 - 1)
        self.steps = check_integer(name, "steps", steps, low=1)
        self.n_queries = check_integer(name, "n_queries", n_queries, low=1)
        default = 20 if version == "rand" else 1
        self.eot_iter = default if eot_iter is None else check_integer(name, "eot_iter", eot_iter, low=1)
        self.max_batch = None if max_batch is None else check_integer(name, "max_batch", max_batch, low=1)
        self.device = None if device is None else check_device(name, "device", str(device))
        self.log_path = None if log_path is None else Path(log_path)
        if self.log_path is not None:
            # An unwritable path must be reported now, not after an hour.
            writable_folder(name, "log_path", self.log_path.parent)
        self.verbose, self.callback = bool(verbose), callback
        self.accuracy: dict[str, float] = {}
        self.in_doubt = False

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
            return APGD(self.model, steps=self.steps, loss=loss, n_restarts=restarts, shrink_eps=sparse, **options)
        if attack in ("apgd-t", "apgd-t3"):
            classes = 3 if attack == "apgd-t3" else 5 if sparse else 9
            return APGDT(self.model, steps=self.steps, target_classes=classes, shrink_eps=sparse, **options)
        if attack == "pma":
            return PMA(self.model, steps=self.steps, n_restarts=restarts, **options)
        if attack == "fab-t":
            return FAB(self.model, steps=self.steps, n_restarts=restarts, **options)
        n_queries = min(PROBE, self.n_queries) if attack == "probe" else self.n_queries
        return Square(self.model, n_queries=n_queries, resc_schedule=False, **options)

    def run_standard_evaluation(
        self, images: Tensor, labels: Tensor, bs: int = 250, return_labels: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attack images by the ensemble.

        Args:
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,), the true classes.
            bs: most images that go through the model at a time in verdicts; attacks size their passes themselves. The
                result does not depend on it, unless the model has randomness of its own (see
                atop_fast.attacks.draw_logits).
            return_labels: return also the class of each result in the verdict's draw, int64 (N,).

        Returns:
            Adversarial images; where all attacks fail, the image itself.
        """
        result, predicted, _ = self._evaluate(images, labels, None, bs, self.attacks_to_run)
        return (result, predicted) if return_labels else result

    def run_standard_evaluation_individual(
        self, images: Tensor, labels: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor] | dict[str, tuple[Tensor, Tensor]]:
        """Run each attack of the ensemble by itself, independently of the others.

        Args:
            images: float (N, C, H, W) in [0, 1].
            labels: int64 (N,), the true classes.
            bs: most images that go through the model at a time in verdicts.
            return_labels: return also the class of each result in the verdict's draw, int64 (N,).

        Returns:
            For each attack by name, what run_standard_evaluation returns for it alone. `accuracy` then has the accuracy
            under each of them; `in_doubt` and `complete` mean the same as there.
        """
        results: dict[str, Any] = {}
        accuracy: dict[str, float] = {}
        # The accuracy after each attack if all ran in sequence.
        together: dict[str, float] = {}
        left: Tensor | None = None
        doubt, plan = False, list(self.attacks_to_run)
        for attack in plan:
            result, predicted, robust = self._evaluate(images, labels, None, bs, (attack,))
            accuracy |= self.accuracy
            results[attack] = (result, predicted) if return_labels else result
            left = robust[attack] if left is None else left & robust[attack]
            together[attack] = _share(left)
            if attack == "probe":
                doubt = self._leaves_doubt(together)
                if doubt and self.complete == "auto":
                    plan += REST
        self.accuracy, self.in_doubt = accuracy, doubt
        if self.in_doubt and self.complete is False:
            warnings.warn(DOUBTED, RuntimeWarning, stacklevel=2)
        return results

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor | None = None) -> Tensor:
        """As run_standard_evaluation, with the identities of the images, int64 (N,)."""
        return self._evaluate(images, labels, sample_ids, 250, self.attacks_to_run)[0]

    def _evaluate(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor | None, bs: int, attacks: Sequence[str]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The results of attacks that run in sequence, their classes in the draws that decided, and what each left.

        The last are by the attack's title, bool (N,): the images that are robust after it.
        """
        name, start = "AutoAttack", time.monotonic()
        x = check_images(name, "images", images)
        y = check_labels(name, "labels", labels, x)
        check_integer(name, "bs", bs, low=1)
        ids, _ = check_keys(name, len(x), x.device, self.seed, sample_ids, 0)
        x, y, ids = (t if self.device is None else t.to(self.device) for t in (x.detach(), y, ids))
        result, robust = x.clone(), {}
        plan = [(attack, self.precision) for attack in attacks]
        if self.precision != "float32":
            plan += [(attack, "float32") for attack in self.finish]
        with frozen(self.model):
            if len(x):
                logits = draw_logits(self.model, x[:1], self.seed, ids[:1], range(1), bs, name)[:, 0]
                check_logits(name, logits, 1, int(y.max()))
            predicted = self._predicted(result, ids, "clean", bs)
            self.accuracy, self.in_doubt = {"clean": _share(predicted == y)}, False
            self._log(f"initial accuracy: {self.accuracy['clean']:.2%}")
            for attack, precision in tqdm(plan, desc=name, disable=not self.verbose):
                left = (predicted == y).nonzero()[:, 0]
                if len(left):
                    candidates = self.build(attack, precision)(x[left], y[left], ids[left])
                    classes = self._predicted(candidates, ids[left], attack, bs)
                    fooled = classes != y[left]
                    result[left[fooled]], predicted[left[fooled]] = candidates[fooled], classes[fooled]
                title = self._title(attack, precision)
                robust[title] = predicted == y
                self.accuracy[title] = _share(robust[title])
                seconds = time.monotonic() - start
                self._log(f"robust accuracy after {title}: {self.accuracy[title]:.2%} (total time {seconds:.1f} s)")
                if title == "probe":
                    self.in_doubt = self._leaves_doubt(self.accuracy)
                    if self.in_doubt and self.complete == "auto":
                        plan += [(further, "float32") for further in REST]
        if self.in_doubt and self.complete is False:
            warnings.warn(DOUBTED, RuntimeWarning, stacklevel=3)
        return result.to(images.device), predicted.to(images.device), robust

    def _log(self, line: str) -> None:
        if self.verbose:
            tqdm.write(f"AutoAttack: {line}")
        if self.log_path is not None:
            with open(self.log_path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _leaves_doubt(self, accuracy: Mapping[str, float]) -> bool:
        """Whether "fast" may have left images that "standard" fools, by the accuracies after its attacks."""
        if self.version != "fast" or not {"pma", "apgd-t3", "probe"} <= accuracy.keys():
            return False
        return leaves_doubt(*(accuracy[name] for name in ("pma", "apgd-t3", "probe")))

    def _title(self, attack: str, precision: str | None) -> str:
        return attack if precision in (None, self.precision) else f"{attack} ({precision})"

    def _predicted(self, x: Tensor, ids: Tensor, name: str, bs: int) -> Tensor:
        """The class of each image in one draw of the caller's own model, in float32, int64 (N,)."""
        # Not a key of evaluate's verdicts, whose seed this may share.
        seed = derive_seed(self.seed, "autoattack", name)
        # Without TF32, as in verdicts: an image that only rounding makes wrong must meet the other attacks, too.
        with full_precision(x.device):
            parts = [
                draw_logits(self.model, x[part], seed, ids[part], range(1), bs, "AutoAttack")[:, 0]
                for part in torch.arange(len(x), device=x.device).split(bs)
                if len(part)
            ]
        if not parts:
            return torch.zeros(0, dtype=torch.int64, device=x.device)
        logits = torch.cat(parts)
        # The largest of them would be the first NaN, which is right for images of that class.
        if (wrong := logits.isnan().any(dim=1)).any():
            given = f"NaN for {int(wrong.sum())} of {len(x)} images {name!r}"
            raise ValueError(message("AutoAttack", "model", "a callable without NaN in its logits", given))
        return logits.argmax(dim=1)

    def __repr__(self) -> str:
        hidden = ("model", "verbose", "accuracy", "in_doubt", "callback", "device", "log_path")
        return f"AutoAttack({', '.join(f'{k}={v!r}' for k, v in vars(self).items() if k not in hidden)})"


def leaves_doubt(after_pma: float, after_apgd: float, after_probe: float) -> bool:
    """Whether "fast", by the accuracies after its attacks, may have left images that "standard" fools."""
    return after_pma - after_apgd > DOUBT or after_probe < after_apgd


def _named(callback: Callback | None, name: str) -> Callback | None:
    """The callback, called with steps of this attack's name."""
    return None if callback is None else lambda step: callback(step._replace(attack=name))


def _share(robust: Tensor) -> float:
    return float(robust.double().mean()) if len(robust) else float("nan")
