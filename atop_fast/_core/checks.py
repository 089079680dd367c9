"""Argument checks shared by every public function, with one wording:

function: argument must be <contract>, got <value>
"""

from __future__ import annotations

import contextlib
import math
import numbers
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Images this far outside [0, 1] come from rounding, not from a wrong range.
ROUNDING = 1e-6
HALVES = {torch.float16: "half", torch.bfloat16: "bfloat16"}


def message(function: str, argument: str, expected: str, given: object) -> str:
    """The text of every argument error."""
    return f"{function}: {argument} must be {expected}, got {given}"


def check_tensor(function: str, argument: str, value: Any) -> Tensor:
    """Raise TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        given = f"{type(value).__name__}{_as_tensor(argument, value)}"
        raise TypeError(message(function, argument, "a torch.Tensor", given))
    return value


def check_float_tensor(function: str, argument: str, value: Any) -> Tensor:
    """Raise TypeError unless `value` is a floating-point tensor."""
    if not check_tensor(function, argument, value).is_floating_point():
        raise TypeError(message(function, argument, "a floating-point tensor", value.dtype))
    return value


def check_images(function: str, argument: str, value: Any, *, finite: bool = True) -> Tensor:
    """Raise unless `value` is float images (B, C, H, W) in [0, 1]; `finite` reads the values, which synchronizes a GPU.

    Returns the images, or a clamped copy if rounding has put values up to 1e-6 outside [0, 1].
    """
    if check_tensor(function, argument, value).dtype == torch.uint8:
        given = f"{value.dtype}; give {argument}.float() / 255"
        raise TypeError(message(function, argument, "a floating-point tensor", given))
    check_float_tensor(function, argument, value)
    if value.dim() != 4:
        one = f"; a single image is {argument}[None]" if value.dim() == 3 else ""
        raise ValueError(message(function, argument, "images of shape (B, C, H, W)", f"{tuple(value.shape)}{one}"))
    if finite and value.numel():
        low, high = (v.item() for v in value.detach().aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(message(function, argument, "finite", "NaN or infinity"))
        if low < -ROUNDING or high > 1 + ROUNDING:
            advice = f"; {way}" if (way := range_advice(low, high)) else ""
            raise ValueError(message(function, argument, "in [0, 1]", f"values in [{low:.9g}, {high:.9g}]{advice}"))
        if low < 0 or high > 1:
            return value.clamp(0, 1)
    return value


def range_advice(low: float, high: float) -> str:
    """Name the likely form of images with values in [low, high] and its cure; empty if only rounding is outside."""
    if low >= 0 and high > 2:
        return "this looks like 0..255: divide by 255"
    if -1 <= low <= -0.5 and high <= 1:
        return "this looks like [-1, 1]: give (x + 1) / 2"
    if low < -0.5 or high > 1.5:
        return (
            "this looks like the result of a normalization: give the images before it, and normalize inside the model"
        )
    return ""


def _as_tensor(argument: str, value: object) -> str:
    """How to make a tensor of what is none, if that is clear."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, Tensor) for item in value):
        return f" of tensors; give torch.stack({argument})"
    return f"; give torch.as_tensor({argument})" if hasattr(value, "__array__") or isinstance(value, list) else ""


def check_not_empty(function: str, argument: str, value: Tensor) -> Tensor:
    """Raise ValueError if `value` is empty along its first axis."""
    if not len(value):
        raise ValueError(message(function, argument, "at least one", "none"))
    return value


def check_labels(function: str, argument: str, value: Any, images: Tensor) -> Tensor:
    """Raise unless `value` is int64 labels (B,), one for each image."""
    check_tensor(function, argument, value)
    column = value.dim() == 2 and len(value) == len(images) and value.shape[1] == 1
    rows = value.dim() == 2 and len(value) == len(images) and value.shape[1] > 1
    advice = f"; of one-hot labels give {argument}.argmax(1)" if rows else ""
    if value.dtype != torch.int64:
        advice = advice or f"; give {argument}.long()"
        raise TypeError(message(function, argument, "an int64 tensor", f"{value.dtype}{advice}"))
    if value.shape != (len(images),):
        advice = f"; give {argument}.flatten()" if column else advice
        expected = f"of shape ({len(images)},), one label an image"
        raise ValueError(message(function, argument, expected, f"{tuple(value.shape)}{advice}"))
    if value.numel() and int(value.min()) < 0:
        raise ValueError(message(function, argument, "class indices >= 0", int(value.min())))
    return value


def check_logits(function: str, value: Any, rows: int, largest_label: int = 0, argument: str = "labels") -> Tensor:
    """Raise unless `value`, a model's output for `rows` images, is logits (rows, classes >= 2) that cover every label.

    `largest_label` is the largest value of `argument`, passed as a number so that the check does not synchronize a GPU.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: model must return logits (B, classes), got {_unwrapping(value)}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{function}: model must return logits (B, classes), which are real numbers, got {value.dtype}")
    shape = tuple(value.shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] < 2:
        expected = "a callable with logits of shape (B, classes)"
        if shape == (rows,) and not value.is_floating_point():
            expected += ", and not the classes (argmax) that they lead to"
        elif shape in ((rows,), (rows, 1)):
            one = "z" if len(shape) == 2 else "z[:, None]"
            expected += f" of two classes or more (for one logit {one} return torch.cat((-{one}, {one}), 1))"
        raise ValueError(message(function, "model", expected, f"{shape} for {rows} images"))
    if largest_label >= shape[1]:
        expected = f"class indices below the model's {shape[1]} logits"
        raise ValueError(message(function, argument, expected, largest_label))
    return value


def _unwrapping(value: object) -> str:
    """Name the type that a model returned instead of a tensor, and the line that unwraps it."""
    given = type(value).__name__
    if value is None:
        return f"{given}; does its forward end with `return`?"
    if hasattr(value, "__array__"):
        return f"{given}; wrap it: lambda x: torch.from_numpy(model(x)), and attack it without gradients, as by Square"
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        key = repr("logits" if "logits" in keys or not keys else keys[0])
        return f"{given} with {sorted(keys)}; wrap it: lambda x: model(x)[{key}]"
    if hasattr(value, "logits"):
        return f"{given}; wrap it: lambda x: model(x).logits"
    if isinstance(value, (tuple, list)):
        return f"{given} of {len(value)}; wrap it: lambda x: model(x)[0]"
    return f"{given}; wrap it in a function that returns its logits"


def check_radius(function: str, norm: str, eps: Any, *, high: float = math.inf) -> float:
    """Raise unless `eps` is a radius in [0, high].

    Warn if an Linf radius covers the whole range of pixels, and if a radius of L1 or L2 is the default of Linf.
    """
    radius = check_number(function, "eps", eps, low=0, high=high)
    if norm == "Linf" and radius > 1:
        warnings.warn(
            f"{function}: eps {radius:.6g} is above 1, the whole range of pixels in [0, 1]: write 8 / 255, not 8",
            stacklevel=3,
        )
    if norm in ("L1", "L2") and radius == 8 / 255:
        warnings.warn(
            f"{function}: eps {radius:.6g} is the default, for Linf; in {norm} it hardly changes an image; on CIFAR-10 "
            "papers take 0.5 in L2 and 12 in L1",
            stacklevel=3,
        )
    return radius


def check_number(function: str, argument: str, value: Any, *, low: float = -math.inf, high: float = math.inf) -> float:
    """Raise unless `value` is a finite real number in [low, high]."""
    # Fast path for floats: the general checks below take as long as a small op.
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


def check_flag(function: str, argument: str, value: Any) -> bool:
    """Raise TypeError unless `value` is a bool, or equal to one, as numpy's are: any text would count as true."""
    if value not in (False, True):
        raise TypeError(message(function, argument, "True or False", repr(value)))
    return bool(value)


def check_choice(function: str, argument: str, value: Any, choices: Sequence[str]) -> str:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(message(function, argument, "one of " + ", ".join(map(repr, choices)), repr(value)))
    return str(value)


def pick_device(name: str) -> str:
    """The name of a device: "auto" is "cuda" on a machine with a GPU, and "cpu" otherwise."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(function: str, argument: str, name: str) -> torch.device:
    """The device `name`, which may be "auto"; raise ValueError if this machine does not have it."""
    name = pick_device(name)
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(message(function, argument, "a device of this machine", f"{name!r} ({reason})")) from error


@contextlib.contextmanager
def check_fits(function: str, argument: str, images: Tensor, model: object = None) -> Iterator[None]:
    """Turn a RuntimeError raised by networks in the block, such as a wrong number of channels, into a ValueError.

    If `model` is given and its dtype differs from that of the images, a TypeError is raised instead.
    """
    try:
        yield
    except RuntimeError as error:
        check_same_dtype(function, argument, images, model, error)
        places = {p.device for p in model.parameters()} if isinstance(model, torch.nn.Module) else set()
        if places and images.device not in places:
            expected = f"on the device of the model, {next(iter(places))}"
            raise ValueError(message(function, argument, expected, images.device)) from error
        reason = str(error).partition("\n")[0]
        given = f"{tuple(images.shape[1:])} ({reason}; batch of {len(images)}){_layout_advice(argument, images)}"
        raise ValueError(message(function, argument, "images that the networks take", given)) from error


def _layout_advice(argument: str, images: Tensor) -> str:
    """A permutation for images (B, H, W, C)."""
    colors = (1, 3)
    last = images.dim() == 4 and images.shape[3] in colors and images.shape[1] not in colors
    return f"; if channels are the last axis, give {argument}.permute(0, 3, 1, 2)" if last else ""


def check_same_dtype(function: str, argument: str, images: Tensor, model: Any, error: RuntimeError) -> None:
    """Raise TypeError if the model's `error` says that images and weights differ in their floating-point type."""
    found = {name.lower() for name in re.findall(r"(?i)\b(bfloat16|double|float|half)(?=\b|tensor)", str(error))}
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    own = {p.dtype for p in parameters if p.is_floating_point()}
    if len(found) > 1 and own != {images.dtype}:
        ways = "convert one of them: x.float(), model.float()"
        halves = [HALVES[dtype] for dtype in own if dtype in HALVES]
        if images.dtype == torch.float32 and halves:
            ways = f"take model.float(), or lambda x: model(x.{halves[0]}())"
        expected = f"of the dtype in which the model computes ({ways})"
        reason = str(error).partition("\n")[0]
        raise TypeError(message(function, argument, expected, f"{images.dtype} ({reason})")) from error


def _interval(low: float, high: float) -> str:
    if math.isinf(low) and math.isinf(high):
        return ""
    if math.isinf(high):
        return f" and >= {low:g}"
    if math.isinf(low):
        return f" and <= {high:g}"
    return f" and in [{low:g}, {high:g}]"
