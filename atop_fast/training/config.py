"""Training options."""

from __future__ import annotations

from dataclasses import dataclass

from .._core.checks import check_choice, check_integer, check_number, message
from .._core.precision import PRECISIONS as NETWORK_PRECISIONS
from ..attacks import NORMS

ATTACKS = ("fgsm", "fgsm-rs", "n-fgsm", "pgd", "apgd", "gat")
ATTACKED = ("pipeline", "classifier")
ATTACK_DRAWS = ("own", "loss")
AVERAGES = ("none", "ema", "median")
PRECISIONS = (*NETWORK_PRECISIONS, "tf32")
SCHEDULES = ("cosine", "linear", "onecycle", "step", "constant")
OPTIMIZERS = ("adam", "sgd")
FLIPS = ("random", "alternating")
TARGETS = ("adversarial", "clean")


@dataclass(frozen=True)
class TrainingConfig:
    """Options common to all trainings.

    Attributes:
        epochs: how often every image is seen.
        batch_size: images per update, summed over all processes.
        lr: initial learning rate (peak learning rate for "onecycle") of the optimizer, Adam unless a subclass says
            otherwise.
        schedule: "cosine" (half a cosine down to 0), "linear" (down to 0), "onecycle" (up from lr / 25 over the first
            fifth of the updates, then down to almost 0, both linearly: Smith and Topin, 2017, as torch's OneCycleLR),
            "step" (divided by 10 after half and after three quarters of the updates) or "constant".
        precision: "float32", or "bfloat16" or "float16" (with loss scaling) for the forward and backward passes of the
            networks; weights, images, losses and optimizers stay float32. On GPUs, "tf32" allows TF32 (10-bit
            mantissas) in float32 convolutions and matrix products, and the other settings forbid it; on a CPU it equals
            "float32".
        accumulate: gradient accumulation: the number of chunks into which a batch is split, to save memory. The GAN
            term of all chunks but the last sees the discriminator before its update.
        clip: maximum norm of a network's gradient; None does not clip.
        average: final weights: "none" (the last), "ema" (an exponential moving average over the updates) or "median"
            (the elementwise median over the ends of the second half of the epochs, of which the last may be cut by
            `updates`: MEAT, Wang et al., 2024).
        ema_decay: decay of the moving average; lower in the first updates, (1 + t) / (10 + t) after update t.
        evaluate_every: number of history entries between evaluations on held-out images; entries are epochs, or
            twentieths of the training if `updates` is given. The weights are those of `average` so far. 0 never
            evaluates. Training is not affected.
        updates: maximum number of updates; training may then end within an epoch, and the schedule covers this number.
            None trains for all of `epochs`.
        graphs: on a GPU, replay updates as CUDA graphs if possible; see atop_fast._core.capture.
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

    def total(self, images: int) -> int:
        """The number of updates of a training on so many images."""
        whole = self.epochs * -(-images // self.batch_size)
        return whole if self.updates is None else min(whole, self.updates)


def check_attack(name: str, eps: float, alpha: float | None, noise: float) -> None:
    """Check the parameters that training attacks share."""
    check_number(name, "eps", eps, low=0)
    if alpha is not None:
        check_number(name, "alpha", alpha, low=0)
    check_number(name, "noise", noise, low=0)


@dataclass(frozen=True)
class ClassifierConfig(TrainingConfig):
    """Options of train_classifier, in addition to those of TrainingConfig.

    Attributes:
        optimizer: "adam", or "sgd" with Nesterov momentum, which generalizes better on photographs and needs a larger
            `lr` (0.1 to 0.4 for residual networks).
        momentum: momentum of "sgd", in (0, 1).
        weight_decay: L2 weight decay of "sgd"; biases and batch norm are exempt.
        label_smoothing: s in the target 1 - s + s / classes for the label and s / classes for each other class
            (Szegedy et al., CVPR 2016).
        augment: randomly shift images by up to `shift` pixels and mirror them; for photographs, not for digits.
        shift: maximum shift in pixels.
        flip: images that `augment` mirrors: each with probability 1/2 in every epoch ("random"), or each in every
            second epoch, with a random start, so that an image and its mirror image alternate ("alternating": Jordan,
            2024).
        attack: "none", or "n-fgsm" for adversarial training: NFGSM on the classifier, including the transform of
            train_classifier if there is one, replaces the clean images.
        eps, alpha, noise: parameters of "n-fgsm", as in FinetuneConfig.
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
        # Nesterov's method requires momentum, and torch's fused SGD crashes without it.
        if not 0 < check_number(name, "momentum", self.momentum) < 1:
            raise ValueError(message(name, "momentum", "between 0 and 1", self.momentum))
        check_number(name, "weight_decay", self.weight_decay, low=0)
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(message(name, "weight_decay", "0 with the optimizer 'adam'", self.weight_decay))
        check_number(name, "label_smoothing", self.label_smoothing, low=0, high=1)
        check_integer(name, "shift", self.shift, low=0)
        check_choice(name, "flip", self.flip, list(FLIPS))
        check_choice(name, "attack", self.attack, ["none", "n-fgsm"])
        check_attack(name, self.eps, self.alpha, self.noise)


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Options of pretrain, in addition to those of TrainingConfig.

    Attributes:
        gan_weight: weight of the GAN loss; 0 trains without a discriminator.
        betas: Adam's (b1, b2). After a gradient much larger than the earlier ones, an update is up to
            (1 - b1) / sqrt(1 - b2) learning rates long: 16 with the values usual for GANs, which makes large networks
            diverge, and 2.2 with (0.5, 0.95).
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
        ce_weight: lambda, the weight of the classification loss, the cross-entropy on the attacked images.
        clean_weight: weight of the cross-entropy on the clean images. If it is not 0, the clean images also pass
            through the pipeline, under the same draws, and the L1 and GAN losses are means over both.
        ce_from_epoch: first epoch, counted from 0, with classification losses; below `epochs` if these have a weight.
        l1_weight: weight of the L1 loss.
        l1_final: weight of the L1 loss at the end of the training, interpolated linearly over the updates; None keeps
            l1_weight.
        attack: one of "fgsm", "fgsm-rs" (from a random start, with alpha 1.25 eps: Wong et al., ICLR 2020), "n-fgsm"
            (from noise larger than the ball, unprojected: de Jorge et al., NeurIPS 2022; only with norm "Linf"), "pgd"
            (from a random start), "apgd" (APGD-CE) and "gat" (colors, flow and Linf at once, see Semantic; only with
            norm "Linf").
        steps: number of steps of "pgd", "apgd" and "gat".
        alpha: step size of "fgsm-rs", "n-fgsm" and "pgd", in units of [0, 1] pixels; None uses the attack's default.
        noise: k of "n-fgsm", the bound of its noise in units of eps.
        color, flow: bounds of "gat" beside eps, see Semantic.
        attacked: target of the training attack: "pipeline" (transform, purifier and classifier, with exact gradients)
            or "classifier" (the classifier alone, as in AToP's public code).
        adversarial_share: share of the images that are attacked, resampled in every epoch; the others stay clean.
        target: image that the purifier must restore: "adversarial" (the paper's formula) or "clean".
        norm, eps: threat model; eps in units of [0, 1] pixels. The default of eps is for "Linf" alone.
        eps_warmup: share of the updates, in [0, 1], in which the perturbations grow linearly from zero to those of eps.
            A strong attack from the first update on can cost a pretrained purifier what it has learned.
        eot_iter: number of draws over which the training attack averages its gradient.
        attack_draw: draws that the training attack sees: "own" (fresh ones in every step, as for an attacker of a
            deployed system) or "loss" (the one draw under which the loss is computed, so that the attack is as strong
            as against a deterministic network: Salman et al., NeurIPS 2019, section 3; "pipeline" and one draw only).
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
    color: float = 0.1
    flow: float = 0.05
    attacked: str = "pipeline"
    adversarial_share: float = 1.0
    target: str = "clean"
    norm: str = "Linf"
    eps: float = 8 / 255
    eps_warmup: float = 0.0
    eot_iter: int = 1
    attack_draw: str = "own"

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        check_number(name, "ce_weight", self.ce_weight, low=0)
        check_number(name, "clean_weight", self.clean_weight, low=0)
        check_number(name, "l1_weight", self.l1_weight, low=0)
        if self.l1_final is not None:
            check_number(name, "l1_final", self.l1_final, low=0)
        check_attack(name, self.eps, self.alpha, self.noise)
        check_integer(name, "ce_from_epoch", self.ce_from_epoch, low=0)
        if self.ce_from_epoch >= self.epochs > 0 and (self.ce_weight or self.clean_weight):
            expected = f"below epochs {self.epochs}, or no update has the classification losses"
            raise ValueError(message(name, "ce_from_epoch", expected, self.ce_from_epoch))
        check_choice(name, "attack", self.attack, list(ATTACKS))
        check_integer(name, "steps", self.steps, low=1)
        check_choice(name, "attacked", self.attacked, list(ATTACKED))
        check_number(name, "adversarial_share", self.adversarial_share, low=0, high=1)
        check_choice(name, "target", self.target, list(TARGETS))
        check_number(name, "color", self.color, low=0, high=1)
        check_number(name, "flow", self.flow, low=0)
        check_choice(name, "norm", self.norm, ["Linf"] if self.attack in ("n-fgsm", "gat") else list(NORMS))
        if self.norm != "Linf" and self.eps == FinetuneConfig.eps:
            # In L2, the default is next to no attack.
            expected = f"given with the norm {self.norm}, as the default is a radius in Linf"
            raise ValueError(message(name, "eps", expected, f"{self.eps:.4g}"))
        check_number(name, "eps_warmup", self.eps_warmup, low=0, high=1)
        check_integer(name, "eot_iter", self.eot_iter, low=1)
        check_choice(name, "attack_draw", self.attack_draw, list(ATTACK_DRAWS))
        if self.attack_draw == "loss" and (self.attacked != "pipeline" or self.eot_iter > 1):
            expected = "'own' unless attacked='pipeline' and eot_iter=1"
            raise ValueError(message(name, "attack_draw", expected, repr(self.attack_draw)))
