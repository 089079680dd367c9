"""Training: a classifier, a purifier on clean images (pretrain) and on adversarial ones (finetune)."""

from .classifier import train_classifier
from .config import FinetuneConfig, PretrainConfig
from .engine import fit
from .purifier import finetune, pretrain
from .step import FinetuneStep, PretrainStep

__all__ = [
    "FinetuneConfig",
    "FinetuneStep",
    "PretrainConfig",
    "PretrainStep",
    "finetune",
    "fit",
    "pretrain",
    "train_classifier",
]
