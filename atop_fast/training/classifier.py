"""Standard and adversarial training of a classifier."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_fits, message
from .._core.files import shown
from ..attacks import frozen
from ..defense import Defense
from ..randomness import Tag, derive_seed, random_bits
from ..transforms import RT1, RandomTransform
from .config import ClassifierConfig
from .engine import History, fit
from .feed import Feed, Images
from .nfgsm import NFGSM
from .single import watched
from .step import Logs, Step, run_attack


class ClassifierStep(Step):
    """Minimize the cross-entropy with (smoothed) labels, on clean or on adversarial images.

    Args:
        classifier, config, seed, transform: see train_classifier.
    """

    config: ClassifierConfig

    def __init__(
        self, classifier: nn.Module, config: ClassifierConfig, seed: int, transform: RandomTransform | None = None
    ) -> None:
        super().__init__({"classifier": classifier}, config, betas=(0.9, 0.999))
        self.classifier, self.seed = classifier, derive_seed(seed, "augment")
        # Without mask and noise, the transform only rescales the image.
        self.pipeline = Defense(RT1(1, 0.0) if transform is None else transform, None, classifier)
        self.plain = transform is None
        self.transform_seed, self.attack_seed = derive_seed(seed, "transform"), derive_seed(seed, "attack")
        self.attack_key = torch.zeros((), dtype=torch.int64, device=self.device)
        self.attacker: NFGSM | None = None
        if config.attack == "n-fgsm":
            precision = self._attack_precision()
            self.attacker = NFGSM(self.pipeline, config.eps, config.alpha, config.noise, precision=precision)

    def prepare(self, epoch: int) -> Hashable:
        self.attack_key.fill_(derive_seed(self.attack_seed, epoch))
        return None

    def optimizer(self, module: nn.Module, betas: tuple[float, float]) -> torch.optim.Optimizer:
        if self.config.optimizer == "adam":
            return super().optimizer(module, betas)
        parameters = list(module.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1]},
        ]
        # The fused optimizer refuses a group without parameters.
        groups = [group for group in groups if group["params"]]
        return torch.optim.SGD(groups, lr=self.rate, momentum=self.config.momentum, nesterov=True, fused=True)

    def losses(self, x: Tensor, y: Tensor, ids: Tensor, epoch: Tensor) -> Logs:
        if self.config.augment:
            alternating = self.config.flip == "alternating"
            x = shift_and_mirror(x, self.seed, ids, epoch, self.config.shift, alternating)
        if self.attacker is not None:
            x = run_attack(self.attacker, self.attack_key, x, y, ids)
        with self.autocast():
            logits = self._logits(x, ids, epoch).float()
        loss = F.cross_entropy(logits, y, label_smoothing=self.config.label_smoothing)
        self.update(loss, "classifier")
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == y).float().mean()}

    @torch.no_grad()
    def evaluate(self, x: Tensor, y: Tensor, ids: Tensor) -> Logs:
        """The accuracy."""
        with self.autocast():
            logits = self._logits(x, ids, 0)
        return {"accuracy": (logits.argmax(dim=1) == y).float().mean()}

    def _logits(self, x: Tensor, ids: Tensor, epoch: int | Tensor) -> Tensor:
        if not self.plain:
            return self.pipeline(x, self.transform_seed, ids, epoch)
        return self.pipeline.classify(x, self.transform_seed, ids, epoch)


def train_classifier(
    classifier: nn.Module,
    images: Images,
    labels: Tensor | None = None,
    *,
    transform: RandomTransform | None = None,
    config: ClassifierConfig | None = None,
    seed: int = 0,
    workers: int = 4,
    held_out: tuple[Tensor, Tensor] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 1.0,
    metrics: str | Path | None = None,
    tensorboard: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Minimize the cross-entropy; changes `classifier` in place and leaves it in evaluation mode.

    Args:
        classifier: maps images (B, C, H, W) in [0, 1] to logits.
        images: float (N, C, H, W) in [0, 1] or uint8 (N, C, H, W); or a map-style dataset of such images (C, H, W) with
            integer labels, which is read in every epoch.
        labels: int64 (N,); None for a dataset, which has its own.
        workers: number of processes that read a dataset.
        held_out: images and labels, evaluated every config.evaluate_every entries of the history.
        transform: a random transform in front of the classifier, in training and in evaluations on `held_out`; masked
            pixels are gray. None trains on the unchanged images.
        config: ClassifierConfig.
        seed: key of the data order, the augmentation, the transform and the attack.
        checkpoint: file from which an interrupted call resumes to the same result; written every `checkpoint_minutes`,
            at the end, and on SIGTERM or Ctrl-C. If writing fails, the previous file remains.
        checkpoint_minutes: minutes between checkpoints; 0 writes one after every update.
        metrics: JSON-lines file to which every history entry adds its losses, learning rate and images per second.
        tensorboard: folder for TensorBoard logs of the same and of purified images; needs the extra atop-fast[track].
        progress: show a progress bar with the ETA.

    Returns:
        Mean loss and training accuracy of every epoch.

    Raises:
        TypeError, ValueError: `classifier` does not accept the images or is frozen, labels exceed its classes, batches
            are too small for batch norm, or as in fit.
    """
    config = config or ClassifierConfig()
    step = ClassifierStep(classifier, config, seed, transform)
    feed = Feed("train_classifier", images, labels, step.device, workers)
    first = feed.first()
    tests = None if held_out is None else Feed("train_classifier", *held_out, step.device)
    with watched(classifier) as step.single, torch.no_grad(), frozen(classifier):
        with check_fits("train_classifier", "images", first):
            logits = classifier(first)
        classes = _classes(logits)
    for each in (feed, tests):
        if each is not None:
            each.check_labels(classes)
    return fit(
        "classifier",
        step,
        feed,
        seed=seed,
        held_out=tests,
        checkpoint=checkpoint,
        checkpoint_minutes=checkpoint_minutes,
        metrics=metrics,
        tensorboard=tensorboard,
        fingerprint={"transform": "none" if transform is None else shown(transform)},
        progress=progress,
    )


def _classes(logits: Any) -> int:
    """The number of classes of a classifier, from its output for one image."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        given = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}; wrap the classifier"
        raise ValueError(message("train_classifier", "classifier", "one that returns logits (B, classes >= 2)", given))
    return logits.shape[1]


def shift_and_mirror(
    x: Tensor, seed: int, ids: Tensor, epoch: int | Tensor, reach: int = 4, alternating: bool = False
) -> Tensor:
    """Shift images (B, C, H, W) by up to `reach` pixels along both axes, with zero padding, and mirror half of them.

    Keyed by (seed, sample id, epoch). With `alternating`, epoch 0 mirrors a random half and later epochs alternate
    between the two halves.
    """
    height, width = x.shape[2:]
    words = random_bits(3, seed, ids, epoch, Tag.START)
    down, right = ((words[:, i : i + 1] * (2 * reach + 1)) >> 32 for i in (0, 1))
    mirrored = words[:, 2:] >> 31 > 0
    if alternating:
        mirrored = (random_bits(3, seed, ids, 0, Tag.START)[:, 2:] >> 31) + epoch & 1 > 0
    rows = down + torch.arange(height, device=x.device)
    columns = right + torch.arange(width, device=x.device)
    columns = torch.where(mirrored, columns.flip(1), columns)
    batch = torch.arange(len(x), device=x.device)
    # Advanced indices on both sides of a slice move the indexed axes to the front.
    picked = F.pad(x, (reach,) * 4)[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
