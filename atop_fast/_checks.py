"""Argument checks shared by every public function: one wording,

function: argument must be <contract>, got <value>
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def message(function: str, argument: str, expected: str, given: object) -> str:
    """The one wording of every argument error."""
    return f"{function}: {argument} must be {expected}, got {given}"


def check_tensor(function: str, argument: str, value: Any) -> Tensor:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(message(function, argument, "a torch.Tensor", type(value).__name__))
    return value


def check_float_tensor(function: str, argument: str, value: Any) -> Tensor:
    """Raise TypeError unless `value` is a floating-point tensor."""
    if not check_tensor(function, argument, value).is_floating_point():
        raise TypeError(message(function, argument, "a floating-point tensor", value.dtype))
    return value


def check_images(function: str, argument: str, value: Any, *, finite: bool = True) -> Tensor:
    """Raise unless `value` is float images (B, C, H, W) in [0, 1]; `finite` reads the values, which waits for a GPU."""
    check_float_tensor(function, argument, value)
    if value.dim() != 4:
        raise ValueError(message(function, argument, "images of shape (B, C, H, W)", tuple(value.shape)))
    if finite and value.numel():
        low, high = (v.item() for v in value.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(message(function, argument, "finite", "NaN or infinity"))
        if low < 0 or high > 1:
            raise ValueError(message(function, argument, "in [0, 1]", f"values in [{low:.4g}, {high:.4g}]"))
    return value


def check_not_empty(function: str, argument: str, value: Tensor) -> Tensor:
    """Raise ValueError if `value` has no first element."""
    if not len(value):
        raise ValueError(message(function, argument, "at least one", "none"))
    return value


def check_labels(function: str, argument: str, value: Any, images: Tensor) -> Tensor:
    """Raise unless `value` is int64 labels (B,), one for each image."""
    if check_tensor(function, argument, value).dtype != torch.int64:
        raise TypeError(message(function, argument, "an int64 tensor", value.dtype))
    if value.shape != (len(images),):
        raise ValueError(
            message(function, argument, f"of shape ({len(images)},), one label an image", tuple(value.shape))
        )
    if value.numel() and int(value.min()) < 0:
        raise ValueError(message(function, argument, "class indices >= 0", int(value.min())))
    return value


def check_number(function: str, argument: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Raise unless `value` is a finite real number in [low, high]."""
    # The usual types first: the others take as long as a small op.
    if type(value) is float and low <= value <= high and value - value == 0.0:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(message(function, argument, "a number", type(value).__name__))
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(message(function, argument, f"finite{_interval(low, high)}", value))
    return number


def check_integer(function: str, argument: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> int:
    """Raise unless `value` is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(message(function, argument, "an integer", type(value).__name__))
    number = int(value)
    if not low <= number <= high:
        raise ValueError(message(function, argument, f"an integer{_interval(low, high)}", value))
    return number


def check_choice(function: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(message(function, argument, "one of " + ", ".join(map(repr, choices)), repr(value)))
    return str(value)


def check_device(function: str, argument: str, name: str) -> torch.device:
    """The device `name`; raise ValueError if this machine has none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(message(function, argument, "a device of this machine", f"{name!r} ({reason})")) from error


@contextlib.contextmanager
def check_fits(function: str, argument: str, images: Tensor) -> Iterator[None]:
    """Turn a RuntimeError of the networks inside, such as another number of channels, into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        given = f"{tuple(images.shape[1:])} ({reason})"
        raise ValueError(message(function, argument, "images that the networks take", given)) from error


def _interval(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" and >= {low:g}"
    if math.isinf(low):
        return f" and <= {high:g}"
    return f" and in [{low:g}, {high:g}]"
