"""Options of pre-training and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

from .._checks import check_choice, check_integer, check_number
from ..attacks import NORMS
from ..attacks.gradient import PRECISIONS

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
        precision: "float32", or "bfloat16" or "float16" (with loss scaling) for the passes of the networks; weights,
            images, losses and optimizers stay float32.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    gan_weight: float = 0.01
    precision: str = "float32"

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(name, "epochs", self.epochs, low=0)
        check_integer(name, "batch_size", self.batch_size, low=1)
        check_number(name, "lr", self.lr, low=0)
        check_number(name, "gan_weight", self.gan_weight, low=0)
        check_choice(name, "precision", self.precision, list(PRECISIONS))


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
