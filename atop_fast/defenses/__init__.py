"""Other random defenses of the literature, as small modules.

Transforms of images go into `Defense(transform, None, classifier)`; SelfEnsemble, ActivationPruning, WinnersTakeAll
and CARSO wrap the classifier. RandomResizePad is in atop_fast.transforms.
"""

from ..purifiers import PURIFIERS
from ..transforms import TRANSFORMS
from .base import ImageTransform
from .bilateral import NoisyBilateral, bilateral_filter
from .carso import CARSO
from .filters import FilterDraw, ResidualFilters, mean_logits
from .inside import Replaced
from .jpeg import JPEG
from .layers import ActivationPruning, SelfEnsemble, WinnersTakeAll
from .noise import GaussianNoise, majority_vote
from .series import RandomSeries
from .smooth import TotalVariation
from .table import DEFENSES

# Names in files.
TRANSFORMS.update(
    gaussian_noise=GaussianNoise,
    random_series=RandomSeries,
    noisy_bilateral=NoisyBilateral,
    filter_draw=FilterDraw,
    jpeg=JPEG,
    total_variation=TotalVariation,
)
PURIFIERS["residual_filters"] = ResidualFilters

__all__ = [
    "CARSO",
    "DEFENSES",
    "JPEG",
    "ActivationPruning",
    "FilterDraw",
    "GaussianNoise",
    "ImageTransform",
    "NoisyBilateral",
    "RandomSeries",
    "Replaced",
    "ResidualFilters",
    "SelfEnsemble",
    "TotalVariation",
    "WinnersTakeAll",
    "bilateral_filter",
    "majority_vote",
    "mean_logits",
]
