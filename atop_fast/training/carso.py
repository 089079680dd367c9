"""Training of CARSO's purifier: reconstruct clean images from what the classifier sees in adversarial ones.

    L = BCE(decode(z, c(x')), x) + beta KL(q(z | x', c(x')) | N(0, 1)),   z ~ q(z | x', c(x'))

summed over pixels and latent variables, for a batch of which a part x' is adversarial for the classifier.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.capture import Logs
from .._core.checks import check_fits, check_number, message
from .._core.files import describe_module
from ..attacks import frozen
from ..attacks.folding import fold_batch_norm
from ..attacks.network import Probe, agrees
from ..defense import Defense
from ..defenses.carso import CARSO
from ..defenses.noise import GaussianNoise
from ..ops import random_normal
from ..randomness import derive_seed
from .config import TrainingConfig, check_attack
from .engine import History, fit
from .feed import Feed, Images
from .nfgsm import NFGSM
from .single import watched
from .step import Step, run_attack

# The weight of KL is 0 in the first part of the updates, and then grows linearly to beta: the paper's shares.
LAG, WARM_UP = 1 / 8, 1 / 24


@dataclass(frozen=True)
class CARSOConfig(TrainingConfig):
    """Options of train_carso, in addition to those of TrainingConfig.

    Attributes:
        beta: weight of the KL divergence after its warm-up.
        adversarial_share: share of each batch that NFGSM attacks, rounded to whole images; the rest stays clean.
        eps, alpha, noise: parameters of NFGSM.
    """

    beta: float = 1.0
    adversarial_share: float = 0.5
    eps: float = 8 / 255
    alpha: float | None = None
    noise: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(name, "beta", self.beta, low=0)
        check_number(name, "adversarial_share", self.adversarial_share, low=0, high=1)
        check_attack(name, self.eps, self.alpha, self.noise)


class CARSOStep(Step):
    """One update of the purifier.

    The attack uses a copy of the classifier with folded batch norm, if it computes the same: the classifier must be
    frozen and in evaluation mode when the step is constructed.

    Args:
        carso, config, seed: see train_carso.
        first: one image (1, C, H, W), on which the copy is compared.
    """

    config: CARSOConfig

    def __init__(self, carso: CARSO, config: CARSOConfig, seed: int, first: Tensor) -> None:
        super().__init__({"purifier": carso.purifier}, config, (0.9, 0.999))
        self.carso, self.purifier = carso, carso.purifier
        self.seed, self.attack_seed = derive_seed(seed, "latent"), derive_seed(seed, "attack")
        self.attack_key = torch.zeros((), dtype=torch.int64, device=self.device)
        folded = fold_batch_norm(carso.model)
        ids = torch.zeros(1, dtype=torch.int64, device=first.device)
        same = folded is carso.model or agrees(carso.model, folded, Probe(first, ids))
        # A bare classifier would run under seeds from torch's global generator.
        attacked = Defense(GaussianNoise(0), None, folded if same else carso.model)
        options: dict[str, Any] = {"gradient": "blind", "precision": self._attack_precision()}
        self.attacker = NFGSM(attacked, config.eps, config.alpha, config.noise, **options)

    def prepare(self, epoch: int) -> Hashable:
        self.attack_key.fill_(derive_seed(self.attack_seed, epoch))
        return None

    def losses(self, x: Tensor, y: Tensor, ids: Tensor, epoch: Tensor) -> Logs:
        # The share is one of the whole batch: of chunks of two images, a share of 0.2 would round to none.
        before, after = (round(self.config.adversarial_share * place) for place in (self.place, self.place + len(x)))
        count, seen = after - before, x
        if count:
            adversarial = run_attack(self.attacker, self.attack_key, x[:count], y[:count], ids[:count])
            seen = torch.cat((adversarial, x[count:]))
        noise = random_normal((self.purifier.latent,), self.seed, ids, epoch)
        with self.autocast():
            with torch.no_grad():
                features = self.carso.features(seen)
            logits, mean, log_variance = self.purifier(seen, features, noise)
        bce = F.binary_cross_entropy_with_logits(logits.float(), x, reduction="none").flatten(1).sum(dim=1).mean()
        kl = divergence(mean.float(), log_variance.float()).mean()
        weight = self.config.beta * ((self.progress - LAG) / WARM_UP).clamp(0, 1)
        loss = bce + weight * kl
        self.update(loss, "purifier")
        return {"loss": loss, "bce": bce, "kl": kl}

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        """The accuracy on the given images, by one draw of the vote."""
        with self.autocast():
            logits = self.carso(x, self.seed, ids, 0)
        return {"accuracy": (logits.argmax(dim=1) == y).float().mean()}

    @torch.no_grad()
    def pictures(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        """The images, followed by one recalled image for each."""
        with self.autocast():
            recalled = self.carso.recall(self.carso.features(x), self.carso.key(x, 0, ids))[:, 0]
        return torch.cat((x, recalled.float()))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) | N(0, 1)), (B, latent) -> (B,): 1/2 sum(mean^2 + exp(s) - s - 1)."""
    return (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1) / 2


def train_carso(
    carso: CARSO,
    images: Images,
    labels: Tensor | None = None,
    *,
    config: CARSOConfig | None = None,
    seed: int = 0,
    workers: int = 4,
    held_out: tuple[Tensor, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 1.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train the purifier of a CARSO on clean and adversarial images of its classifier, which stays frozen.

    Args:
        carso: the CARSO, whose purifier is changed in place and left in evaluation mode.
        images: float (N, C, H, W) in [0, 1] or uint8 (N, C, H, W); or a map-style dataset of such images (C, H, W) with
            integer labels, which is read in every epoch.
        labels: int64 (N,), which the attack needs; None for a dataset, which has its own.
        config: CARSOConfig.
        seed: key of all randomness.
        workers: number of processes that read a dataset.
        held_out: images and labels, evaluated every config.evaluate_every entries of the history.
        checkpoint: file from which an interrupted call resumes to the same result; written every `checkpoint_minutes`,
            at the end, and on SIGTERM or Ctrl-C. If writing fails, the previous file remains.
        checkpoint_minutes: minutes between checkpoints; 0 writes one after every update.
        metrics: JSON-lines file to which every history entry adds its losses, learning rate and images per second.
        tensorboard: folder for TensorBoard logs of the same and of recalled images; needs the extra atop-fast[track].
        progress: show a progress bar with the ETA.

    Returns:
        Mean loss, its parts bce and kl, of every epoch, and the accuracy on `held_out`.

    Raises:
        TypeError, ValueError: `carso` is something else, the images are not of its shape, labels exceed the
            classifier's classes, or as in fit.

    Source: Ballarin et al., see CARSO. The paper attacks by FGSM and PGD with radii 4/255 and 8/255, 200 epochs long.
    """
    if not isinstance(carso, CARSO):
        raise TypeError(message("train_carso", "carso", "a CARSO", type(carso).__name__))
    with frozen(carso.model):
        device = next(carso.purifier.parameters()).device
        feed = Feed("train_carso", images, labels, device, workers)
        tests = None if held_out is None else Feed("train_carso", *held_out, device)
        first = feed.first()
        with torch.no_grad(), frozen(carso), check_fits("train_carso", "images", first):
            classes = carso(first, seed).shape[1]
            with watched(carso.purifier) as single:
                carso.purifier(first, carso.features(first), first.new_zeros(1, carso.purifier.latent))
        for each in (feed, tests):
            if each is not None:
                each.check_labels(classes)
        step = CARSOStep(carso, config or CARSOConfig(), seed, first)
        step.single = single
        return fit(
            "carso",
            step,
            feed,
            seed=seed,
            held_out=tests,
            checkpoint=checkpoint,
            checkpoint_minutes=checkpoint_minutes,
            metrics=metrics,
            tensorboard=tensorboard,
            fingerprint={"votes": f"{carso.votes}", "classifier": describe_module(carso.model)},
            progress=progress,
        )
