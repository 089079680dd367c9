"""A wrapper that makes another package's classifier accept images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._core.checks import check_number, message


def refuse_keyed(function: str, argument: str, module: nn.Module) -> None:
    """Raise for a classifier with keyed draws: inside a wrapper it would not get its key."""
    if getattr(module, "keyed", False):
        kind = type(module).__name__
        raise ValueError(message(function, argument, f"a network without keyed draws: {kind}({function}(...))", kind))


class Normalized(nn.Module):
    """model((x - mean) / std), channel by channel: for networks that were trained on normalized images.

    Args:
        model: maps normalized images (B, C, H, W) to logits (B, classes).
        mean, std: mean and standard deviation of the channels, in units of [0, 1] pixels: C numbers, or one for all.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(message("Normalized", "model", "a torch.nn.Module", type(model).__name__))
        refuse_keyed("Normalized", "model", model)
        means = [check_number("Normalized", "mean", value) for value in mean]
        stds = [check_number("Normalized", "std", value) for value in std]
        if not means:
            raise ValueError(message("Normalized", "mean", "one number for each channel", "none"))
        if len(stds) != len(means) or min(stds) <= 0:
            raise ValueError(message("Normalized", "std", f"{len(means)} numbers > 0, as many as mean has", tuple(std)))
        self.model = model
        self.register_buffer("mean", torch.tensor(means)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(stds)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.model((x - self.mean) / self.std)
