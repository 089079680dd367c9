"""Defenses that change the layers of a classifier: random self-ensemble, activation pruning, winners take all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._core.checks import check_number
from ..ops import random_normal
from ..randomness import Tag, random_bits
from .inside import CONVOLUTIONS, Compute, Key, Replaced


class SelfEnsemble(Replaced):
    """Gaussian noise on the input of every convolution: conv(x + sigma n), n ~ N(0, 1).

    Args:
        model: the classifier.
        sigma_first, sigma: standard deviations of the noise before the first convolution and before the others.

    Calls are documented in Replaced.forward.

    Source: Liu et al., Towards robust neural networks via random self-ensemble, ECCV 2018 (0.2 and 0.1). The paper
    trains the network with the noise and predicts by the mean probability of several draws. Here, the convolutions of
    shortcuts have noise of their own.
    """

    functions = CONVOLUTIONS

    def __init__(self, model: nn.Module, sigma_first: float = 0.2, sigma: float = 0.1) -> None:
        super().__init__(model)
        self.sigma_first = check_number("SelfEnsemble", "sigma_first", sigma_first, low=0)
        self.sigma = check_number("SelfEnsemble", "sigma", sigma, low=0)

    def replace(self, compute: Compute, x: Tensor, index: int, key: Key) -> Tensor:
        """See Replaced.replace."""
        sigma = self.sigma if index else self.sigma_first
        return compute(x + sigma * random_normal(x.shape[1:], *key).to(x.dtype))

    def extra_repr(self) -> str:
        return f"sigma_first={self.sigma_first}, sigma={self.sigma}"


class ActivationPruning(Replaced):
    """Activations kept at random, large ones with higher probability, and scaled up in compensation.

        p_j = |h_j| / sum_k |h_k|,   j is kept if one of r = ratio N draws from p hits it,   h_j / (1 - (1 - p_j)^r)

    Args:
        model: the classifier.
        ratio: number of draws for each of the N activations of a layer and an image.

    Calls are documented in Replaced.forward. Draws have replacement and a resolution of 2^-32 of the sum. The
    scale is a function of h, and gradients contain its derivative.

    Source: Dhillon et al., Stochastic activation pruning for robust adversarial defense, ICLR 2018, algorithm 1.
    """

    def __init__(self, model: nn.Module, ratio: float = 1.0) -> None:
        super().__init__(model)
        self.ratio = check_number("ActivationPruning", "ratio", ratio, low=1e-6, high=100)

    def replace(self, compute: Compute, x: Tensor, index: int, key: Key) -> Tensor:
        """See Replaced.replace."""
        h = compute(x)
        flat = h.flatten(1).to(torch.promote_types(h.dtype, torch.float32))
        draws = max(1, round(self.ratio * flat.shape[1]))
        sums = flat.detach().abs().double().cumsum(dim=1)
        points = (random_bits(draws, *key, Tag.MASK).double() + 0.5) * 2.0**-32 * sums[:, -1:]
        hit = torch.searchsorted(sums, points, right=True).clamp_(max=flat.shape[1] - 1)
        kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, hit, True) & (flat != 0)
        # Without a finite sum, the draws miss what is not finite, which the logits must show.
        kept |= ~flat.isfinite()
        # In float64, so that rounding does not depend on the batch.
        total = flat.abs().double().sum(dim=1, keepdim=True).to(flat.dtype)
        p = flat.abs() / torch.where(total > 0, total, 1)
        # At p = 1, the derivative of the logarithm is infinite.
        chance = -torch.expm1(draws * torch.log1p(-p.clamp(max=1 - torch.finfo(p.dtype).eps)))
        chance = torch.where(kept & (p < 1), chance, 1)
        return torch.where(kept, flat / chance, 0).view_as(h).to(h.dtype)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"


class WinnersTakeAll(Replaced):
    """The k largest inputs of every activation function, over channels and pixels; the others become 0.

    Args:
        model: the classifier.
        ratio: k / N for the N inputs of a layer and an image; k is at least 1. Inputs equal to the smallest kept one
            are kept, too.

    Calls are documented in Replaced.forward. The function is deterministic and discontinuous: its gradient is that of
    the kept inputs, which is exact between the jumps but ignores them. Robustness only against gradient attacks is not
    evidence; see doctor.

    Source: Xiao et al., Enhancing adversarial defense by k-winners-take-all, ICLR 2020, equation 1. The paper trains
    the network with these activations.
    """

    keyed = False

    def __init__(self, model: nn.Module, ratio: float = 0.1) -> None:
        super().__init__(model)
        self.ratio = check_number("WinnersTakeAll", "ratio", ratio, low=0, high=1)

    def replace(self, compute: Compute, x: Tensor, index: int, key: Key) -> Tensor:
        """See Replaced.replace."""
        flat = x.flatten(1)
        count = max(1, round(self.ratio * flat.shape[1]))
        least = flat.detach().topk(count, dim=1, sorted=True).values[:, -1:]
        # NaN is kept, so that the logits show it.
        return torch.where(flat < least, 0, flat).view_as(x)

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}"
