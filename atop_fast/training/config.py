"""Options of the trainings."""

from __future__ import annotations

from dataclasses import dataclass

from .._core.checks import check_choice, check_integer, check_number, message
from .._core.precision import PRECISIONS as NETWORK_PRECISIONS
from ..attacks import NORMS

ATTACKS = ("fgsm", "fgsm-rs", "n-fgsm", "pgd", "apgd")
ATTACKED = ("pipeline", "classifier")
AVERAGES = ("none", "ema", "median")
PRECISIONS = (*NETWORK_PRECISIONS, "tf32")
SCHEDULES = ("cosine", "linear", "onecycle", "step", "constant")
OPTIMIZERS = ("adam", "sgd")
FLIPS = ("random", "alternating")
TARGETS = ("adversarial", "clean")


@dataclass(frozen=True)
class TrainingConfig:
    """Options of every training.

    Attributes:
        epochs: passes over the data.
        batch_size: images of one update, over all processes.
        lr: first learning rate of the optimizer, which is Adam unless a subclass says otherwise; of "onecycle", the
            highest one.
        schedule: "cosine" (falls to 0 along half a cosine), "linear" (falls to 0), "onecycle" (rises from a 25th over
            the first fifth of the updates, then falls to almost 0, both linearly: Smith and Topin, 2017, as torch's
            OneCycleLR), "step" (a tenth after half of the updates, and again after three quarters) or "constant".
        precision: "float32", or "bfloat16" or "float16" (with loss scaling) for the passes of the networks; weights,
            images, losses and optimizers stay float32. On GPUs, "tf32" lets convolutions and matrix products in float32
            round their factors to 10 bits (TF32), and the others do not; a CPU takes it for "float32".
        accumulate: passes into which an update is divided, to save memory. With a discriminator, the GAN term of all
            but the last sees it before its update.
        clip: largest norm of a network's gradient; longer ones are scaled to it. None leaves them.
        average: weights at the end: "none" (the last), "ema" (an exponential moving average over the updates) or
            "median" (of the ends of the second half of the epochs, weight by weight: MEAT, Wang et al., 2024).
        ema_decay: of the moving average.
        evaluate_every: entries of the history, which are epochs unless `updates` is given, from one evaluation on
            held-out images to the next; 0 makes none. They leave the training as it is.
        updates: end after so many updates, if these are fewer, also in the middle of a pass; the schedule, too, is
            that of so many. None trains for all of `epochs`.
        graphs: on a GPU, replay an update as a CUDA graph where that can be; see atop_fast.training.capture.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    schedule: str = "cosine"
    precision: str = "float32"
    accumulate: int = 1
    clip: float | None = None
    average: str = "none"
    ema_decay: float = 0.999
    evaluate_every: int = 0
    updates: int | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_integer(name, "epochs", self.epochs, low=0)
        if self.updates is not None:
            check_integer(name, "updates", self.updates, low=0)
        check_integer(name, "batch_size", self.batch_size, low=1)
        check_number(name, "lr", self.lr, low=0)
        check_choice(name, "schedule", self.schedule, list(SCHEDULES))
        check_choice(name, "precision", self.precision, list(PRECISIONS))
        check_integer(name, "accumulate", self.accumulate, low=1)
        if self.clip is not None:
            check_number(name, "clip", self.clip, low=0)
        check_choice(name, "average", self.average, list(AVERAGES))
        check_number(name, "ema_decay", self.ema_decay, low=0, high=1)
        check_integer(name, "evaluate_every", self.evaluate_every, low=0)


@dataclass(frozen=True)
class ClassifierConfig(TrainingConfig):
    """Options of train_classifier, in addition to those of TrainingConfig.

    Attributes:
        optimizer: "adam", or "sgd" with Nesterov's momentum, which generalises better on photographs and needs another
            `lr` (0.1 to 0.4 for residual networks).
        momentum: of "sgd", above 0 and below 1.
        weight_decay: of "sgd": this times a weight is added to its gradient; biases and batch norms have none.
        label_smoothing: share s of the target that all classes have in common: 1 - s + s / classes for the label and
            s / classes for each other class (Szegedy et al., CVPR 2016).
        augment: shift images by up to `shift` pixels and mirror them, at random; for photographs, not for digits.
        shift: see augment.
        flip: which images `augment` mirrors: each with probability 1/2 in every epoch ("random"), or every second epoch
            from a random start, so that an image and its mirror image come in turn ("alternating": Jordan, 2024).
        attack: "none", or "n-fgsm" for adversarial training: the classifier sees the images of NFGSM on itself in place
            of the clean ones, both behind the random transform, if train_classifier is given one.
        eps, alpha, noise: of "n-fgsm", as in FinetuneConfig.
    """

    lr: float = 2e-3
    optimizer: str = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = False
    shift: int = 4
    flip: str = "random"
    attack: str = "none"
    eps: float = 8 / 255
    alpha: float | None = None
    noise: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_choice(name, "optimizer", self.optimizer, list(OPTIMIZERS))
        # Nesterov's method needs momentum, and torch's fused SGD crashes without it.
        if not 0 < check_number(name, "momentum", self.momentum) < 1:
            raise ValueError(message(name, "momentum", "between 0 and 1", self.momentum))
        check_number(name, "weight_decay", self.weight_decay, low=0)
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(message(name, "weight_decay", "0 with the optimizer 'adam'", self.weight_decay))
        check_number(name, "label_smoothing", self.label_smoothing, low=0, high=1)
        check_integer(name, "shift", self.shift, low=0)
        check_choice(name, "flip", self.flip, list(FLIPS))
        check_choice(name, "attack", self.attack, ["none", "n-fgsm"])
        check_number(name, "eps", self.eps, low=0)
        if self.alpha is not None:
            check_number(name, "alpha", self.alpha, low=0)
        check_number(name, "noise", self.noise, low=0)


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Options of pretrain, in addition to those of TrainingConfig.

    Attributes:
        gan_weight: weight of the adversarial GAN term; 0 trains without a discriminator.
        betas: of Adam. With (b1, b2), the update after a gradient far longer than the earlier ones is up to
            (1 - b1) / sqrt(1 - b2) learning rates long: 16 with the values of GANs, which throws large networks out of
            their training, and 2.2 with (0.5, 0.95).
    """

    gan_weight: float = 0.01
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(name, "gan_weight", self.gan_weight, low=0)
        if len(self.betas) != 2 or not all(0 <= check_number(name, "betas", beta) < 1 for beta in self.betas):
            raise ValueError(message(name, "betas", "two numbers in [0, 1)", self.betas))


@dataclass(frozen=True)
class FinetuneConfig(PretrainConfig):
    """Options of finetune, in addition to those of PretrainConfig.

    Attributes:
        ce_weight: lambda, the weight of the classification loss, which is the cross-entropy on the attacked images.
        clean_weight: weight of the cross-entropy on the clean images, which then also pass through the pipeline, under
            the same draws; the L1 loss is then the mean over both. 0 leaves them out.
        ce_from_epoch: first epoch (from 0) with the classification losses.
        l1_weight: weight of the L1 loss.
        l1_final: weight of the L1 loss at the end of the training, reached linearly over the updates; None keeps
            l1_weight.
        attack: one of "fgsm", "fgsm-rs" (from a random start, with alpha 1.25 eps: Wong et al., ICLR 2020), "n-fgsm"
            (from noise larger than the ball, unprojected: de Jorge et al., NeurIPS 2022; only with norm "Linf"), "pgd"
            (from a random start) and "apgd" (APGD-CE).
        steps: of "pgd" and "apgd".
        alpha: step size of "fgsm-rs", "n-fgsm" and "pgd", in units of [0, 1] pixels; None takes the attack's own.
        noise: of "n-fgsm": k, the reach of its noise in units of eps.
        attacked: what the training attack sees: "pipeline" (transform, purifier and classifier, exact gradients) or
            "classifier" (the classifier alone, as in AToP's public code).
        adversarial_share: share of the images that are attacked, chosen anew in every epoch; the others stay clean.
        target: what the purifier must restore: the "adversarial" image (the paper's formula) or the "clean" one.
        norm, eps: threat model; eps in units of [0, 1] pixels.
        eot_iter: draws averaged in the training attack's gradient.
    """

    ce_weight: float = 0.1
    clean_weight: float = 0.0
    ce_from_epoch: int = 0
    l1_weight: float = 1.0
    l1_final: float | None = None
    attack: str = "fgsm"
    steps: int = 10
    alpha: float | None = None
    noise: float = 2.0
    attacked: str = "pipeline"
    adversarial_share: float = 1.0
    target: str = "clean"
    norm: str = "Linf"
    eps: float = 8 / 255
    eot_iter: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(name, "ce_weight", self.ce_weight, low=0)
        check_number(name, "clean_weight", self.clean_weight, low=0)
        check_number(name, "l1_weight", self.l1_weight, low=0)
        if self.l1_final is not None:
            check_number(name, "l1_final", self.l1_final, low=0)
        check_number(name, "noise", self.noise, low=0)
        check_integer(name, "ce_from_epoch", self.ce_from_epoch, low=0)
        check_choice(name, "attack", self.attack, list(ATTACKS))
        check_integer(name, "steps", self.steps, low=1)
        if self.alpha is not None:
            check_number(name, "alpha", self.alpha, low=0)
        check_choice(name, "attacked", self.attacked, list(ATTACKED))
        check_number(name, "adversarial_share", self.adversarial_share, low=0, high=1)
        check_choice(name, "target", self.target, list(TARGETS))
        check_choice(name, "norm", self.norm, list(NORMS) if self.attack != "n-fgsm" else ["Linf"])
        check_number(name, "eps", self.eps, low=0)
        check_integer(name, "eot_iter", self.eot_iter, low=1)
