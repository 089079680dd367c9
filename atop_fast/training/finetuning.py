"""One update of adversarial fine-tuning.

    L = gan * L_G(D(g(t(x')))) + l1 * |g(t(x')) - target|_1 + lambda * CE(f(g(t(x'))), y) + clean * CE(f(g(t(x))), y)

with x' an adversarial image, the target x' or x, the classifier f frozen, and the first two terms as in pre-training.
If the last term is present, the first two are means over x' and x.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from .._core.capture import Logs
from .._core.checks import check_fits, message
from ..attacks import APGD, FGSM, PGD, frozen
from ..attacks.base import Attack
from ..attacks.folding import fold_batch_norm
from ..attacks.network import Probe, agrees
from ..defense import Defense
from ..randomness import Tag, derive_seed, random_uniform
from .config import FinetuneConfig
from .gat import Semantic
from .nfgsm import NFGSM
from .step import PretrainStep, run_attack


class FinetuneStep(PretrainStep):
    """Attack, restore, and classify the result with the frozen classifier (AToP, equation 8).

    The attack and the loss use a copy of the classifier with folded batch norm, made once: the classifier must be
    frozen and in evaluation mode when the step is constructed.

    Args:
        defense, discriminator, config, seed: see finetune.
    """

    config: FinetuneConfig

    def __init__(self, defense: Defense, discriminator: nn.Module | None, config: FinetuneConfig, seed: int) -> None:
        if defense.purifier is None:
            raise ValueError(message("finetune", "defense", "a Defense with a purifier", "one without"))
        super().__init__(defense.transform, defense.purifier, discriminator, config, seed)
        self.given = defense.classifier
        self.classifier = fold_batch_norm(defense.classifier, self.dtype)
        self.pipeline = Defense(defense.transform, defense.purifier, self.classifier)
        self.attack_seed = derive_seed(seed, "attack")
        # The attack's seed in this epoch, and whether the epoch has classification losses; see prepare.
        self.attack_key = torch.zeros((), dtype=torch.int64, device=self.device)
        self.judged = True
        self.attacker = self._attacker()

    def prepare(self, epoch: int) -> Hashable:
        self.attack_key.fill_(derive_seed(self.attack_seed, epoch))
        self.judged = epoch >= self.config.ce_from_epoch
        return self.judged

    def losses(self, x: Tensor, y: Tensor, ids: Tensor, epoch: Tensor) -> Logs:
        with record_function("attack"):
            adversarial = self.attack(x, y, ids, epoch)
        target = adversarial if self.config.target == "adversarial" else x
        clean = self.config.clean_weight > 0
        if clean:
            adversarial, target, ids = torch.cat((adversarial, x)), torch.cat((target, x)), torch.cat((ids, ids))
        image, loss, logs = self.restore(adversarial, target, ids, epoch)
        with record_function("losses"):
            with self.autocast():
                logits, *others = self.pipeline.classify(image, self.seed, ids, epoch).float().split(len(y))
            logs["ce"] = F.cross_entropy(logits, y)
            judgment = self.config.ce_weight * logs["ce"]
            if clean:
                logs["clean_ce"] = F.cross_entropy(others[0], y)
                judgment = judgment + self.config.clean_weight * logs["clean_ce"]
        if self.judged:
            loss = loss + judgment
        self.update(loss, "purifier")
        logs["accuracy"] = _accuracy(logits, y)
        return {**logs, "clean_accuracy": _accuracy(others[0], y)} if clean else logs

    def l1_weight(self) -> float | Tensor:
        first, last = self.config.l1_weight, self.config.l1_final
        return first if last is None else first + (last - first) * self.progress

    def attack(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int | Tensor) -> Tensor:
        """The training images of an epoch (a number, or the tensor of the current one), a share of them adversarial."""
        if isinstance(epoch, int):
            self.prepare(epoch)
            self.epoch.fill_(epoch)
        adversarial = run_attack(self.attacker, self.attack_key, x, y, ids)
        if self.config.eps_warmup:
            adversarial = x + (adversarial - x) * (self.progress / self.config.eps_warmup).clamp(max=1)
        share = self.config.adversarial_share
        if share == 1:
            return adversarial
        chosen = random_uniform((1, 1, 1), derive_seed(self.attack_seed, "share"), ids, epoch, Tag.START) < share
        return torch.where(chosen, adversarial, x)

    def evaluate(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        """Accuracy of the whole pipeline, clean and under PGD with 10 steps, on fresh draws."""
        seed = derive_seed(self.attack_seed, "held-out")
        options: dict[str, Any] = {"steps": 10, "seed": seed, "precision": self._attack_precision()}
        attack = PGD(self.pipeline, self.config.eps, norm=self.config.norm, **options)
        accuracy: Logs = {}
        for name, images in (("clean", x), ("robust", attack(x, y, ids))):
            with torch.no_grad(), frozen(self.pipeline), self.autocast():
                logits = self.pipeline(images, self.seed, ids, 0)
            accuracy[name] = _accuracy(logits, y)
        return accuracy

    def pictures(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """Adversarial images of the first epoch, followed by their restorations."""
        return super().pictures(self.attack(x, y, ids, 0), y, ids)

    def _attacker(self) -> Attack:
        config = self.config
        model = self.pipeline
        if config.attack_draw == "loss":
            model = _UnderLossDraw(model, self.seed, self.epoch)
        options: dict[str, Any] = {"eot_iter": config.eot_iter, "precision": self._attack_precision()}
        if config.attacked == "classifier":
            # A bare classifier would run under seeds from torch's global generator.
            model, options["gradient"] = Defense(self.transform, None, self.classifier), "blind"
        if config.attack == "fgsm":
            return FGSM(model, config.eps, norm=config.norm, **options)
        if config.attack == "n-fgsm":
            return NFGSM(model, config.eps, config.alpha, config.noise, **options)
        if config.attack == "gat":
            return Semantic(model, config.eps, config.color, config.flow, config.steps, **options)
        if config.attack == "apgd":
            return APGD(model, config.norm, config.eps, config.steps, **options)
        alpha, steps = config.alpha, config.steps
        if config.attack == "fgsm-rs":
            alpha, steps = 1.25 * config.eps if alpha is None else alpha, 1
        return PGD(model, config.eps, alpha, steps, norm=config.norm, **options)

    def check(self, images: Tensor) -> int:
        """As PretrainStep.check; returns the classifier's number of classes."""
        super().check(images)
        with torch.no_grad(), frozen(self.pipeline), check_fits("finetune", "images", images), self.autocast():
            classes = self.pipeline(images[:1], draw=0).shape[1]
        # Compare classifier and folded copy once, here, because values inside a captured CUDA graph cannot be read.
        ids = torch.zeros(1, dtype=torch.int64, device=images.device)
        with frozen(self.given):
            same = self.classifier is self.given or agrees(
                self.given, fold_batch_norm(self.given), Probe(images[:1], ids)
            )
        if not same:
            self.classifier = self.given
            self.pipeline = Defense(self.transform, self.purifier, self.given)
            self.attacker = self._attacker()
        with self.attacker.prepared(images[:1], ids):
            pass
        return classes


class _UnderLossDraw(Defense):
    """A pipeline under the draw of the loss, whichever its attacker asks for.

    Args:
        pipeline: the Defense in training.
        seed, epoch: key of the transform in the loss; the epoch is a tensor, int64 (), that changes in place.
    """

    def __init__(self, pipeline: Defense, seed: int, epoch: Tensor) -> None:
        super().__init__(pipeline.transform, pipeline.purifier, pipeline.classifier)
        self.seed, self.epoch = seed, epoch

    def forward(
        self,
        x: Tensor,
        seed: int | Tensor = 0,
        sample_ids: Tensor | None = None,
        draw: int | Tensor | None = None,
    ) -> Tensor:
        """As Defense.forward, but only the sample ids count."""
        return super().forward(x, self.seed, sample_ids, self.epoch)


def _accuracy(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == y).float().mean()
