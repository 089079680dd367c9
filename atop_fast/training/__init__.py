"""Training: a classifier, a purifier on clean images (pretrain) and on adversarial ones (finetune), and CARSO's."""

from .carso import CARSOConfig, CARSOStep, train_carso
from .classifier import ClassifierStep, train_classifier
from .config import ClassifierConfig, FinetuneConfig, PretrainConfig, TrainingConfig
from .engine import fit
from .feed import Feed
from .finetuning import FinetuneStep
from .purifier import finetune, pretrain
from .step import PretrainStep, Step

__all__ = [
    "CARSOConfig",
    "CARSOStep",
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
    "train_carso",
    "train_classifier",
]
