"""A wrapper that makes another package's classifier accept images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import check_number, message

# Mean and standard deviation of the channels by which networks are commonly normalized.
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": ((0.1307,), (0.3081,)),
    "half": ((0.5,), (0.5,)),
}


def parse_normalization(function: str, text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by a name in STATISTICS, or as MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2."""
    if text in STATISTICS:
        return STATISTICS[text]
    try:
        mean, std = (tuple(float(value) for value in part.split(",")) for part in text.split("/"))
    except ValueError as error:
        expected = f"MEAN/STD, such as 0.5,0.5,0.5/0.2,0.2,0.2, or one of {', '.join(STATISTICS)}"
        raise ValueError(message(function, "normalize", expected, repr(text))) from error
    return mean, std


def refuse_keyed(function: str, argument: str, module: nn.Module) -> None:
    """Raise for a classifier with keyed draws: inside a wrapper it would not get its key."""
    if getattr(module, "keyed", False):
        kind = type(module).__name__
        raise ValueError(message(function, argument, f"a network without keyed draws: {kind}({function}(...))", kind))


class Normalized(nn.Module):
    """model((x - mean) / std), channel by channel: for networks that were trained on normalized images.

    Args:
        model: maps normalized images (B, C, H, W) to logits (B, classes).
        mean, std: mean and standard deviation of the channels, in units of [0, 1] pixels: C numbers, or one for all;
            *STATISTICS["cifar10"] gives both.

    load_state_dict also takes the state dict of `model` itself.

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
        self.register_load_state_dict_pre_hook(_take_plain)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.model((x - self.mean) / self.std)


def _take_plain(module: Normalized, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of the inner network's own state dict to those that Normalized has."""
    own = f"{prefix}model."
    names = module.model.state_dict().keys()
    plain = [name for name in state if name.startswith(prefix) and name.removeprefix(prefix) in names]
    if plain and not any(own + name in state for name in names):
        for name in [name for name in state if name.startswith(prefix)]:
            state[own + name.removeprefix(prefix)] = state.pop(name)
