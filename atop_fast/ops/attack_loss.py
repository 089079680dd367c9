"""Placeholder until the op lands (replaced at merge)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AttackLoss(NamedTuple):
    losses: Tensor
    gradient: Tensor
    correct: Tensor


def attack_loss(logits: Tensor, labels: Tensor, loss: str = "ce", targets: Tensor | None = None) -> AttackLoss:
    z = logits.detach().to(torch.float64 if logits.dtype == torch.float64 else torch.float32).requires_grad_()
    with torch.enable_grad():
        own = z.gather(1, labels[:, None])[:, 0]
        rival = (
            z.scatter(1, labels[:, None], -torch.inf).amax(1)
            if targets is None
            else z.gather(1, targets[:, None])[:, 0]
        )
        if loss == "ce":
            value = F.cross_entropy(z, labels, reduction="none")
        elif loss == "margin":
            value = rival - own
        else:
            s = z.sort(dim=1, descending=True).values
            scale = s[:, 0] - s[:, 2] if targets is None else s[:, 0] - (s[:, 2] + s[:, 3]) / 2
            value = -(own - rival) / (scale + 1e-12)
    (g,) = torch.autograd.grad(value, z, torch.ones_like(value))
    return AttackLoss(value.detach(), g, z.argmax(1) == labels)
