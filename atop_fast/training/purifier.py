"""Pre-training and adversarial fine-tuning of a purifier (AToP, equations 4 and 8).

    pre-training   L = gan * L_G(D(g(t(x)))) + |g(t(x)) - x|_1
    fine-tuning    L = gan * L_G(D(g(t(x')))) + |g(t(x')) - target|_1 + lambda * CE(f(g(t(x'))), y)

with x' an adversarial image, the target x' or x, the classifier f frozen, and D the hinge-loss discriminator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import (
    check_choice,
    check_fits,
    check_images,
    check_integer,
    check_labels,
    check_not_empty,
    check_number,
    message,
)
from .._files import describe
from ..attacks import NORMS, PGD, frozen
from ..defense import Defense
from ..purifiers import discriminator_loss, generator_loss
from ..randomness import derive_seed
from ..transforms import RandomTransform
from .engine import History, Step, fit

ATTACKED = ("pipeline", "classifier")
TARGETS = ("adversarial", "clean")


@dataclass(frozen=True)
class PretrainConfig:
    """Options of pretrain.

    Attributes:
        epochs: passes over the data.
        batch_size: images a step.
        lr: first learning rate of both Adam optimizers, betas (0.5, 0.999); it falls along a cosine.
        gan_weight: weight of the adversarial GAN term; 0 trains without a discriminator.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    gan_weight: float = 0.01

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(name, "epochs", self.epochs, low=0)
        check_integer(name, "batch_size", self.batch_size, low=1)
        check_number(name, "lr", self.lr, low=0)
        check_number(name, "gan_weight", self.gan_weight, low=0)


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Options of finetune, in addition to those of PretrainConfig.

    Attributes:
        ce_weight: lambda, the weight of the classification loss.
        ce_from_epoch: first epoch (from 0) with the classification loss.
        attacked: what the training attack sees: "pipeline" (transform, purifier and classifier, exact gradients) or
            "classifier" (the classifier alone, as in AToP's public code).
        target: what the purifier must restore: the "adversarial" image (the paper's formula) or the "clean" one.
        norm, eps: threat model; eps in units of [0, 1] pixels.
        steps: 1 is FGSM, more is PGD with a random start.
        eot_iter: draws averaged in the training attack's gradient.
    """

    ce_weight: float = 0.1
    ce_from_epoch: int = 0
    attacked: str = "pipeline"
    target: str = "clean"
    norm: str = "Linf"
    eps: float = 8 / 255
    steps: int = 1
    eot_iter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(name, "ce_weight", self.ce_weight, low=0)
        check_integer(name, "ce_from_epoch", self.ce_from_epoch, low=0)
        check_choice(name, "attacked", self.attacked, ATTACKED)
        check_choice(name, "target", self.target, TARGETS)
        check_choice(name, "norm", self.norm, NORMS)
        check_number(name, "eps", self.eps, low=0)
        check_integer(name, "steps", self.steps, low=1)
        check_integer(name, "eot_iter", self.eot_iter, low=1)


class _Trainer:
    """Networks and optimizers of one run, and the two halves of a GAN step."""

    def __init__(
        self,
        transform: RandomTransform,
        purifier: nn.Module,
        discriminator: nn.Module | None,
        config: PretrainConfig,
        images: Tensor,
    ) -> None:
        self.transform, self.purifier = transform, purifier
        self._check(images)
        self.discriminator = discriminator if config.gan_weight else None
        self.gan_weight = config.gan_weight
        self.modules = {"purifier": purifier}
        if self.discriminator is not None:
            self.modules["discriminator"] = self.discriminator
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=config.lr, betas=(0.5, 0.999))
            for name, module in self.modules.items()
        }

    def _check(self, images: Tensor) -> None:
        """Raise before the first step if the networks do not fit the images."""
        with torch.no_grad(), frozen(self.purifier), check_fits("pretrain", "images", images):
            corrupted = self.transform(images[:1])
            shape = self.purifier(corrupted).shape
        expected = (len(corrupted), images.shape[1], *corrupted.shape[2:])
        if shape != expected:
            name = type(self.purifier).__name__
            raise ValueError(message(name, "output", f"of shape {expected}", tuple(shape)))

    def restore(
        self, x: Tensor, target: Tensor, seed: int, ids: Tensor, draw: int
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One purifier pass and a discriminator step: the assembled image in [0, 1], the loss so far, and its parts."""
        corrupted = self.transform(x, seed, ids, draw)
        purified = self.purifier(corrupted)
        wanted = self.transform.target(target, seed, ids, draw)
        logs = {"l1": F.l1_loss(purified, wanted)}
        loss = logs["l1"]
        if self.discriminator is not None:
            mask = corrupted[:, -1:].detach()
            logs["discriminator"] = self._discriminator_step(wanted, purified.detach(), mask)
            with frozen(self.discriminator):
                logs["gan"] = generator_loss(self.discriminator(purified, mask))
            loss = loss + self.gan_weight * logs["gan"]
        return (self.transform.assemble(purified, corrupted) + 1) / 2, loss, logs

    def update(self, loss: Tensor, name: str) -> None:
        """One optimizer step of the named network."""
        self.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[name].step()

    def _discriminator_step(self, real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
        assert self.discriminator is not None
        loss = discriminator_loss(self.discriminator(real, mask), self.discriminator(fake, mask))
        self.update(loss, "discriminator")
        return loss


def pretrain(
    purifier: nn.Module,
    transform: RandomTransform,
    images: Tensor,
    *,
    discriminator: nn.Module | None = None,
    config: PretrainConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> History:
    """Train a purifier to restore clean images (AToP, equation 4); changes it in place, leaves it in evaluation mode.

    Args:
        purifier: see Defense.
        transform: the random transform.
        images: float (N, C, H, W) in [0, 1].
        discriminator: D(images in [-1, 1], mask) -> scores; None trains without the GAN term.
        config: PretrainConfig.
        seed: key of all randomness.
        checkpoint: see atop_fast.training.fit.
        progress: show a progress bar.

    Returns:
        Mean losses of every epoch.
    """
    config = config or PretrainConfig()
    check_not_empty("pretrain", "images", check_images("pretrain", "images", images))
    trainer = _Trainer(transform, purifier, discriminator, config, images)
    noise_seed = derive_seed(seed, "transform")

    def step(x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Mapping[str, Tensor]:
        _, loss, logs = trainer.restore(x, x, noise_seed, ids, epoch)
        trainer.update(loss, "purifier")
        return logs

    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return _fit("pretrain", step, trainer, images, labels, config, seed, checkpoint, progress)


def finetune(
    defense: Defense,
    images: Tensor,
    labels: Tensor,
    *,
    discriminator: nn.Module | None = None,
    config: FinetuneConfig | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> History:
    """Fine-tune the purifier of a defence on adversarial images (AToP, equation 8); the classifier stays as it is.

    Args:
        defense: the whole pipeline, with a purifier; changed in place, its purifier left in evaluation mode.
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        discriminator, seed, checkpoint, progress: as in pretrain.
        config: FinetuneConfig.

    Returns:
        Mean losses of every epoch, and the accuracy on the training attack.
    """
    config = config or FinetuneConfig()
    check_not_empty("finetune", "images", check_images("finetune", "images", images))
    check_labels("finetune", "labels", labels, images)
    if defense.purifier is None:
        raise ValueError(message("finetune", "defense", "a Defense with a purifier", "one without"))
    trainer = _Trainer(defense.transform, defense.purifier, discriminator, config, images)
    with torch.no_grad(), frozen(defense), check_fits("finetune", "images", images):
        defense(images[:1], draws=0)
    noise_seed = derive_seed(seed, "transform")
    attacked = defense if config.attacked == "pipeline" else defense.classifier

    def step(x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Mapping[str, Tensor]:
        attack = PGD(
            attacked,
            config.norm,
            config.eps,
            alpha=config.eps if config.steps == 1 else None,
            steps=config.steps,
            random_start=config.steps > 1,
            eot_iter=config.eot_iter,
            seed=derive_seed(seed, "attack", epoch),
        )
        adversarial = attack(x, y, ids)
        target = adversarial if config.target == "adversarial" else x
        image, loss, logs = trainer.restore(adversarial, target, noise_seed, ids, epoch)
        logits = defense.classifier(image)
        logs["ce"] = F.cross_entropy(logits, y)
        if epoch >= config.ce_from_epoch:
            loss = loss + config.ce_weight * logs["ce"]
        trainer.update(loss, "purifier")
        return {**logs, "accuracy": (logits.argmax(dim=1) == y).float().mean()}

    with frozen(defense.classifier):
        constants = describe(*defense.classifier.state_dict().values())
        return _fit("finetune", step, trainer, images, labels, config, seed, checkpoint, progress, constants)


def _fit(
    title: str,
    step: Step,
    trainer: _Trainer,
    images: Tensor,
    labels: Tensor,
    config: PretrainConfig,
    seed: int,
    checkpoint: Path | None,
    progress: bool,
    constants: str = "",
) -> History:
    """Run `step` with the trainer's networks in training mode, and leave them in evaluation mode."""
    for module in trainer.modules.values():
        module.train()
    history = fit(
        title,
        step,
        images,
        labels,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        modules=trainer.modules,
        optimizers=trainer.optimizers,
        checkpoint=checkpoint,
        fingerprint=f"{title} {asdict(config)} {trainer.transform!r} {constants}",
        progress=progress,
    )
    for module in trainer.modules.values():
        module.eval()
    return history
