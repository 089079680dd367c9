"""Training: a classifier, a purifier on clean images (pretrain) and on adversarial ones (finetune)."""

from .classifier import ClassifierStep, train_classifier
from .config import ClassifierConfig, FinetuneConfig, PretrainConfig, TrainingConfig
from .engine import fit
from .feed import Feed
from .finetuning import FinetuneStep
from .purifier import finetune, pretrain
from .step import PretrainStep, Step

__all__ = [
    "ClassifierConfig",
    "ClassifierStep",
    "Feed",
    "FinetuneConfig",
    "FinetuneStep",
    "PretrainConfig",
    "PretrainStep",
    "Step",
    "TrainingConfig",
    "finetune",
    "fit",
    "pretrain",
    "train_classifier",
]
