"""Training: a classifier, a purifier on clean images (pretrain) and on adversarial ones (finetune)."""

from .classifier import train_classifier
from .engine import fit
from .purifier import FinetuneConfig, PretrainConfig, finetune, pretrain

__all__ = ["FinetuneConfig", "PretrainConfig", "finetune", "fit", "pretrain", "train_classifier"]
