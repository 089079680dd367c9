"""A random search for adversarial images, which sees logits only."""

from __future__ import annotations

import torch
from torch import Tensor

from ..randomness import Tag, random_uniform
from ._probe import Probe, attack_loss


def random_search(probe: Probe, queries: int, seed: int) -> Tensor:
    """Adversarial images from logits alone: keep a random square of the perturbation's sign if the margin loss rises.

    A short form of the Square attack (Andriushchenko et al., ECCV 2020): squares shrink from half of the image to an
    eighth; for L2 the perturbation is scaled to the radius. Query t of a random model has its draw t, so that what is
    kept may have been lucky.
    """
    x, (channels, height, width) = probe.x, probe.x.shape[1:]
    device = x.device
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)

    def candidate(delta: Tensor) -> Tensor:
        if probe.norm == "L2":
            delta = delta / delta.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-12)
        return (x + probe.eps * delta).clamp(0, 1)

    # Vertical stripes, the attack's start, are strong against convolutions.
    stripes = random_uniform((channels, 1, width), seed, probe.ids, 0, Tag.START)
    delta = (2 * (stripes > 0.5).float() - 1).expand_as(x).to(x.dtype)
    best = torch.full((len(x),), -torch.inf, device=device)
    with torch.no_grad():
        for query in range(queries):
            trial = delta
            if query:
                u = random_uniform((channels + 2,), seed, probe.ids, query, Tag.START)[:, :, None]
                side = [max(1, int(n * 0.5 * 0.25 ** (query / queries))) for n in (height, width)]
                top, left = ((u[:, i] * (n + 1 - s)).long() for i, n, s in ((0, height, side[0]), (1, width, side[1])))
                inside = ((rows >= top) & (rows < top + side[0]))[:, None, :, None]
                inside = inside & ((columns >= left) & (columns < left + side[1]))[:, None, None, :]
                sign = (2 * (u[:, 2:, :, None] > 0.5).float() - 1).to(x.dtype)
                trial = torch.where(inside, sign, delta)
            loss = attack_loss(probe.logits(candidate(trial), query, "random search"), probe.y, "margin")
            better = loss > best
            best = torch.where(better, loss, best)
            delta = torch.where(better[:, None, None, None], trial, delta)
    return candidate(delta)
