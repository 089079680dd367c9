"""One training step of a purifier: AToP's losses, and what updates the networks.

    pre-training   L = gan * L_G(D(g(t(x)))) + |g(t(x)) - x|_1
    fine-tuning    L = gan * L_G(D(g(t(x')))) + |g(t(x')) - target|_1 + lambda * CE(f(g(t(x'))), y)

with x' an adversarial image, the target x' or x, the classifier f frozen, and D the hinge-loss discriminator. Of a
purifier with a method `stages` (DeepFillV2) every stage has the L1 term.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_fits, message
from ..attacks import PGD, frozen
from ..attacks.gradient import PRECISIONS
from ..attacks.network import folded
from ..defense import Defense
from ..ops import _registry
from ..purifiers import discriminator_loss, generator_loss
from ..randomness import derive_seed
from ..transforms import RandomTransform
from .config import FinetuneConfig, PretrainConfig


class PretrainStep:
    """Restore clean images, and play the game against the discriminator (AToP, equation 4).

    The step owns the optimizers. Where there are native kernels, it lays out the networks' weights in channels_last,
    which their convolutions and gates like best; values do not change.

    Args:
        transform, purifier, discriminator, config, seed: see pretrain.

    Attributes:
        modules: the networks that change, by name.
        optimizers, scalers: the Adam optimizer and the loss scaler of each.
    """

    def __init__(
        self,
        transform: RandomTransform,
        purifier: nn.Module,
        discriminator: nn.Module | None,
        config: PretrainConfig,
        seed: int,
    ) -> None:
        self.transform, self.purifier, self.config = transform, purifier, config
        self.discriminator = discriminator if config.gan_weight else None
        self.seed = derive_seed(seed, "transform")
        self.modules = {"purifier": purifier}
        if self.discriminator is not None:
            self.modules["discriminator"] = self.discriminator
        if (parameter := next(purifier.parameters(), None)) is None:
            raise ValueError(message("pretrain", "purifier", "a module with parameters", type(purifier).__name__))
        self.device = parameter.device
        self.dtype = PRECISIONS[config.precision]
        if _registry.owner("gated_elu", self.device.type) != "eager":
            for module in self.modules.values():
                module.to(memory_format=torch.channels_last)
        self.optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=config.lr, betas=(0.5, 0.999), fused=True)
            for name, module in self.modules.items()
        }
        scaled = self.dtype is torch.float16
        self.scalers = {name: torch.amp.GradScaler(self.device.type, enabled=scaled) for name in self.modules}

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Mapping[str, Tensor]:
        """Update the networks.

        Args:
            x: images (B, C, H, W) in [0, 1].
            y: labels (B,).
            ids: sample ids (B,); with the epoch as the draw they are the key of the transform.
            epoch: from 0.

        Returns:
            Scalars to log.
        """
        _, loss, logs = self.restore(x, x, ids, epoch)
        self.update(loss, "purifier")
        return logs

    def restore(self, x: Tensor, target: Tensor, ids: Tensor, epoch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One purifier pass and a discriminator step: the assembled image in [0, 1], the loss so far, and its parts."""
        corrupted = self.transform(x, self.seed, ids, epoch)
        with self.autocast():
            stages = getattr(self.purifier, "stages", None)
            outputs = (self.purifier(corrupted),) if stages is None else stages(corrupted)
        outputs = tuple(output.float() for output in outputs)
        wanted = self.transform.target(target, self.seed, ids, epoch)
        loss = torch.stack([F.l1_loss(output, wanted) for output in outputs]).sum()
        purified, logs = outputs[-1], {"l1": loss}
        if self.discriminator is not None:
            mask = corrupted[:, -1:].detach()
            logs["discriminator"] = self._discriminator_step(wanted, purified.detach(), mask)
            with frozen(self.discriminator):
                logs["gan"] = generator_loss(self._scores(purified, mask))
            loss = loss + self.config.gan_weight * logs["gan"]
        return (self.transform.assemble(purified, corrupted) + 1) / 2, loss, logs

    def update(self, loss: Tensor, name: str) -> None:
        """One optimizer step of the named network."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def autocast(self) -> torch.autocast:
        """The precision of the networks' passes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def check(self, images: Tensor) -> None:
        """Raise before the first step if the networks do not fit the images (N, C, H, W)."""
        with torch.no_grad(), frozen(self.purifier), check_fits("pretrain", "images", images):
            corrupted = self.transform(images[:1])
            shape = self.purifier(corrupted).shape
        expected = (len(corrupted), images.shape[1], *corrupted.shape[2:])
        if shape != expected:
            name = type(self.purifier).__name__
            raise ValueError(message(name, "output", f"of shape {expected}", tuple(shape)))

    def _discriminator_step(self, real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
        scores = self._scores(torch.cat((real, fake)), torch.cat((mask, mask)))
        loss = discriminator_loss(*scores.chunk(2))
        self.update(loss, "discriminator")
        return loss

    def _scores(self, images: Tensor, mask: Tensor) -> Tensor:
        assert self.discriminator is not None
        with self.autocast():
            scores: Tensor = self.discriminator(images, mask)
        return scores.float()


class FinetuneStep(PretrainStep):
    """Attack, restore, and have the frozen classifier judge the result (AToP, equation 8).

    The attack and the loss see a copy of the classifier with batch norm folded, made once: the classifier must be
    frozen, and in evaluation mode, when the step is made.

    Args:
        defense, discriminator, config, seed: see finetune.
    """

    config: FinetuneConfig

    def __init__(self, defense: Defense, discriminator: nn.Module | None, config: FinetuneConfig, seed: int) -> None:
        if defense.purifier is None:
            raise ValueError(message("finetune", "defense", "a Defense with a purifier", "one without"))
        super().__init__(defense.transform, defense.purifier, discriminator, config, seed)
        self.classifier = folded(defense.classifier, self.dtype)
        pipeline = Defense(defense.transform, defense.purifier, self.classifier)
        self.attacked = pipeline if config.attacked == "pipeline" else self.classifier
        self.attack_seed = seed

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Mapping[str, Tensor]:
        adversarial = self.attack(x, y, ids, epoch)
        target = adversarial if self.config.target == "adversarial" else x
        image, loss, logs = self.restore(adversarial, target, ids, epoch)
        with self.autocast():
            logits = self.classifier(image).float()
        logs["ce"] = F.cross_entropy(logits, y)
        if epoch >= self.config.ce_from_epoch:
            loss = loss + self.config.ce_weight * logs["ce"]
        self.update(loss, "purifier")
        return {**logs, "accuracy": (logits.argmax(dim=1) == y).float().mean()}

    def attack(self, x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Tensor:
        """Adversarial images for this epoch."""
        config = self.config
        attack = PGD(
            self.attacked,
            config.norm,
            config.eps,
            alpha=config.eps if config.steps == 1 else None,
            steps=config.steps,
            random_start=config.steps > 1,
            eot_iter=config.eot_iter,
            seed=derive_seed(self.attack_seed, "attack", epoch),
            precision=config.precision,
        )
        return attack(x, y, ids)

    def check(self, images: Tensor) -> None:
        super().check(images)
        pipeline = Defense(self.transform, self.purifier, self.classifier)
        with torch.no_grad(), frozen(pipeline), check_fits("finetune", "images", images), self.autocast():
            pipeline(images[:1], draws=0)
