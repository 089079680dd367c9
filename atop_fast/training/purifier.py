"""Pre-training and adversarial fine-tuning of a purifier (AToP, equations 4 and 8): the calls around their steps."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from .._core.checks import message
from .._core.files import describe_module, shown
from ..attacks import frozen
from ..defense import Defense
from ..transforms import RandomTransform, describe_transform
from .config import FinetuneConfig, PretrainConfig
from .engine import History, fit
from .feed import Feed, Images
from .finetuning import FinetuneStep
from .step import PretrainStep


def pretrain(
    purifier: nn.Module,
    transform: RandomTransform,
    images: Images,
    *,
    discriminator: nn.Module | None = None,
    config: PretrainConfig | None = None,
    seed: int = 0,
    workers: int = 4,
    held_out: tuple[Tensor, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 1.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train a purifier to restore clean images (AToP, equation 4); changes it in place, leaves it in evaluation mode.

    Args:
        purifier: maps (B, C + 2, H, W) = [masked image in [-1, 1], ones, mask] to images (B, C, H, W) in [-1, 1]. It
            remembers the transform, which its file names; Defense warns about a different one.
        transform: the random transform.
        images: float (N, C, H, W) in [0, 1] or uint8 (N, C, H, W); or a map-style dataset of such images (C, H, W) with
            labels, which is read in every epoch.
        workers: number of processes that read a dataset.
        held_out: images and labels, evaluated every config.evaluate_every entries of the history.
        discriminator: D(images in [-1, 1], mask) -> scores; None trains without the GAN term.
        config: PretrainConfig.
        seed: key of all randomness.
        checkpoint: file from which an interrupted call resumes to the same result; written every `checkpoint_minutes`,
            at the end, and on SIGTERM or Ctrl-C. If writing fails, the previous file remains.
        checkpoint_minutes: minutes between checkpoints; 0 writes one after every update.
        metrics: JSON-lines file to which every history entry adds its losses, learning rate and images per second.
        tensorboard: folder for TensorBoard logs of the same and of purified images; needs the extra atop-fast[track].
        progress: show a progress bar with the ETA.

    Returns:
        Mean losses of every epoch.

    Raises:
        ValueError: there are no images, they are outside [0, 1], the networks do not accept them, or as in fit.
    """
    step = PretrainStep(transform, purifier, discriminator, config or PretrainConfig(), seed)
    feed = Feed("pretrain", images, None, step.device, workers)
    step.check(feed.first())
    purifier.trained_under = describe_transform(transform)
    return fit(
        "pretrain",
        step,
        feed,
        seed=seed,
        held_out=None if held_out is None else Feed("pretrain", *held_out, step.device),
        checkpoint=checkpoint,
        checkpoint_minutes=checkpoint_minutes,
        metrics=metrics,
        tensorboard=tensorboard,
        fingerprint={"transform": shown(transform)},
        progress=progress,
    )


def finetune(
    defense: Defense,
    images: Images,
    labels: Tensor | None = None,
    *,
    discriminator: nn.Module | None = None,
    config: FinetuneConfig | None = None,
    seed: int = 0,
    workers: int = 4,
    held_out: tuple[Tensor, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 1.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Fine-tune the purifier of a defense on adversarial images (AToP, equation 8); the classifier stays frozen.

    Args:
        defense: the whole pipeline, with a purifier, which is changed in place and left in evaluation mode.
        images: float (N, C, H, W) in [0, 1] or uint8 (N, C, H, W); or a map-style dataset of such images (C, H, W) with
            integer labels, which is read in every epoch.
        labels: int64 (N,); None for a dataset, which has its own.
        workers: number of processes that read a dataset.
        held_out: images and labels, evaluated every config.evaluate_every entries of the history.
        discriminator: D(images in [-1, 1], mask) -> scores; None trains without the GAN term.
        seed: key of all randomness.
        config: FinetuneConfig.
        checkpoint: file from which an interrupted call resumes to the same result; written every `checkpoint_minutes`,
            at the end, and on SIGTERM or Ctrl-C. If writing fails, the previous file remains.
        checkpoint_minutes: minutes between checkpoints; 0 writes one after every update.
        metrics: JSON-lines file to which every history entry adds its losses, learning rate and images per second.
        tensorboard: folder for TensorBoard logs of the same and of purified images; needs the extra atop-fast[track].
        progress: show a progress bar with the ETA.

    Returns:
        Mean losses of every epoch, and the accuracy on the training attack.

    Raises:
        TypeError, ValueError: as in pretrain; or `defense` is not a Defense (for example, one inside DataParallel), has
            no purifier or a frozen one, or labels exceed the classifier's classes.
    """
    if not isinstance(defense, Defense):
        inside = [name for name in ("module", "_orig_mod") if isinstance(getattr(defense, name, None), Defense)]
        given = f"a {type(defense).__name__} (give its .{inside[0]})" if inside else type(defense).__name__
        raise TypeError(message("finetune", "defense", "a Defense; several processes work by torchrun", given))
    with frozen(defense.classifier):
        step = FinetuneStep(defense, discriminator, config or FinetuneConfig(), seed)
        feed = Feed("finetune", images, labels, step.device, workers)
        tests = None if held_out is None else Feed("finetune", *held_out, step.device)
        classes = step.check(feed.first())
        for each in (feed, tests):
            if each is not None:
                each.check_labels(classes)
        step.purifier.trained_under = describe_transform(defense.transform)
        return fit(
            "finetune",
            step,
            feed,
            seed=seed,
            held_out=tests,
            checkpoint=checkpoint,
            checkpoint_minutes=checkpoint_minutes,
            metrics=metrics,
            tensorboard=tensorboard,
            fingerprint={"transform": shown(defense.transform), "classifier": describe_module(defense.classifier)},
            progress=progress,
        )
