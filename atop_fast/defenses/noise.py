"""Gaussian noise and the majority vote over it: randomized smoothing."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_images, check_integer, check_number, message
from ..attacks import draw_logits, frozen
from ..defense import Defense
from ..ops import random_normal
from ..randomness import check_keys
from .base import ImageTransform


class GaussianNoise(ImageTransform):
    """x + sigma n with n ~ N(0, 1), not clipped: the noise of randomized smoothing.

    Args:
        sigma: standard deviation of the noise, in units of [0, 1] pixels; 0 leaves the images as they are.

    Calls are documented in RandomTransform.forward; as in the paper, noisy pixels may leave the range of images.

    Source: Cohen et al., Certified adversarial robustness via randomized smoothing, ICML 2019.
    """

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        self.sigma = check_number("GaussianNoise", "sigma", sigma, low=0)

    def images(self, x: Tensor, seed: Tensor, sample_ids: Tensor, draw: Tensor) -> Tensor:
        """See ImageTransform.images."""
        if not self.sigma:
            return x
        return x + self.sigma * random_normal(x.shape[1:], seed, sample_ids, draw).to(x.dtype)


def majority_vote(
    defense: Defense,
    images: Tensor,
    draws: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    sample_ids: Tensor | None = None,
    max_batch: int = 1024,
) -> Tensor:
    """The class that most draws of a Defense predict, or -1 if the votes do not decide it: Cohen et al.'s PREDICT.

        class c_1  if  2 P(Binomial(n_1 + n_2, 1/2) >= n_1) <= alpha,  else abstain      n_1 >= n_2: the two most votes

    Args:
        defense: a Defense; with a transform other than GaussianNoise, the vote is over its draws.
        images: (B, C, H, W), floats in [0, 1].
        draws: number n of draws; draw 0 .. n - 1 of `seed`.
        alpha: probability that the class is not the most probable one over all draws; 1 never abstains, except in ties.
        seed: key of the draws, which no attack should have used.
        sample_ids: int64 (B,), the identity of every image; default 0..B-1.
        max_batch: most images in one forward pass.

    Returns:
        int64 (B,): classes, or -1. No gradients: the attack on the votes is the one on a single draw, averaged (EOT).

    Raises:
        TypeError, ValueError: naming the argument that is wrong.

    Source: Cohen et al., ICML 2019, section 3.2.2 and appendix B.
    """
    name = "majority_vote"
    if not isinstance(defense, Defense):
        raise TypeError(message(name, "defense", "a Defense", type(defense).__name__))
    images = check_images(name, "images", images)
    check_integer(name, "draws", draws, low=1)
    check_integer(name, "max_batch", max_batch, low=1)
    alpha = check_number(name, "alpha", alpha, low=0, high=1)
    ids, _ = check_keys(name, len(images), images.device, seed, sample_ids, 0)
    if not len(images):
        return ids.new_zeros(0)
    with frozen(defense):
        logits = draw_logits(defense, images, seed, ids, range(draws), max_batch, name)
    if (wrong := logits.isnan().flatten(1).any(dim=1)).any():
        first = int(wrong.nonzero()[0])
        given = f"NaN for {int(wrong.sum())} of {len(images)} images, the first of them images[{first}]"
        raise ValueError(message(name, "defense", "a Defense without NaN in its logits", given))
    votes = F.one_hot(logits.argmax(dim=2), logits.shape[2]).sum(dim=1)
    most, classes = votes.topk(2, dim=1)
    decided = [a > b and p_value(a, a + b) <= alpha for a, b in most.tolist()]
    return torch.where(torch.tensor(decided, device=images.device), classes[:, 0], -1)


def p_value(votes: int, of: int) -> float:
    """Two-sided p-value of `votes` >= of / 2 among `of` fair coins: min(1, 2 P(Binomial(of, 1/2) >= votes))."""
    term, total = math.comb(of, votes), 0
    for k in range(votes, of + 1):
        total += term
        # The next binomial coefficient from this one: computing each anew takes minutes for 20,000 draws.
        term = term * (of - k) // (k + 1)
    return min(1.0, 2 * total / 2**of)
