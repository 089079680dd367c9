"""Checks of arguments that ops share; csrc/common/checks.h has those on which memory safety depends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.checks import check_tensor, message

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_dtype(function: str, argument: str, value: Any, *dtypes: torch.dtype) -> Tensor:
    """Raise TypeError unless `value` is a tensor of one of the dtypes."""
    if check_tensor(function, argument, value).dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        article = "an" if dtypes[0] == torch.int64 else "a"
        expected = f"{article} {', '.join(names)} or {last} tensor" if names else f"{article} {last} tensor"
        raise TypeError(message(function, argument, expected, value.dtype))
    return value


def check_shape(function: str, argument: str, value: Tensor, *shapes: Sequence[int]) -> None:
    """Raise ValueError unless `value` has one of the shapes."""
    if value.shape not in shapes:
        expected = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(message(function, argument, f"of shape {expected}", tuple(value.shape)))


def check_same_device(function: str, argument: str, value: Tensor, name: str, model: Tensor) -> None:
    """Raise ValueError unless `value` is on the device of `model`, the argument `name`."""
    if value.device != model.device:
        raise ValueError(message(function, argument, f"on the device of {name} {model.device}", value.device))


def check_dy(function: str, dy: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raise unless `dy` has the `shape` of the result and the dtype and device of `like`."""
    if dy.shape != tuple(shape):
        raise ValueError(message(function, "dy", f"of the shape of y {tuple(shape)}", tuple(dy.shape)))
    if dy.dtype != like.dtype:
        raise TypeError(message(function, "dy", f"of the dtype of y {like.dtype}", dy.dtype))
    check_same_device(function, "dy", dy, "y", like)


def check_per_sample(function: str, argument: str, value: Tensor, x: Tensor) -> Tensor:
    """Raise unless `value` is float32, one number or one for each of the samples `x`."""
    check_dtype(function, argument, value, torch.float32)
    check_shape(function, argument, value, (), x.shape[:1])
    return value
