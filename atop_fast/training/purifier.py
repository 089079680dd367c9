"""Pre-training and adversarial fine-tuning of a purifier (AToP, equations 4 and 8); step.py has the losses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .._checks import check_images, check_labels, check_not_empty
from .._files import describe
from ..attacks import frozen
from ..defense import Defense
from ..transforms import RandomTransform
from .config import FinetuneConfig, PretrainConfig
from .engine import History, fit
from .step import FinetuneStep, PretrainStep


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
    step = PretrainStep(transform, purifier, discriminator, config, seed)
    step.check(images)
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    return _fit("pretrain", step, images, labels, config, seed, checkpoint, progress)


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
    with frozen(defense.classifier):
        step = FinetuneStep(defense, discriminator, config, seed)
        step.check(images)
        constants = describe(*defense.classifier.state_dict().values())
        return _fit("finetune", step, images, labels, config, seed, checkpoint, progress, constants)


def _fit(
    title: str,
    step: PretrainStep,
    images: Tensor,
    labels: Tensor,
    config: PretrainConfig,
    seed: int,
    checkpoint: Path | None,
    progress: bool,
    constants: str = "",
) -> History:
    """Run `step` with its networks in training mode, and leave them in evaluation mode."""
    for module in step.modules.values():
        module.train()
    history = fit(
        title,
        step,
        images,
        labels,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        modules=step.modules,
        optimizers=step.optimizers,
        scalers=step.scalers,
        checkpoint=checkpoint,
        fingerprint=f"{title} {asdict(config)} {step.transform!r} {constants}",
        progress=progress,
    )
    for module in step.modules.values():
        module.eval()
    return history
