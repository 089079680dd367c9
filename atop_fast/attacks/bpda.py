"""BPDA (Athalye et al., ICML 2018) for any model: a substitute derivative for its preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import check_tensor, message
from ..defense import Defense

Map = Callable[[Tensor], Tensor]


class BPDA(nn.Module):
    """model(forward(x)), whose gradient goes through `backward` instead of `forward`.

        value: model(forward(x)),     gradient: that of model at forward(x), times the Jacobian of backward at x

    All attacks and atop_fast.evaluate take it like any model. Its output does not depend on `backward`: a verdict on
    it is a verdict on model(forward(x)).

    Args:
        model: any callable from images (B, C, H, W) in [0, 1] to logits.
        forward: its preprocessing, such as a quantization or a JPEG compression; it needs no derivative.
        backward: differentiable map from images to an approximation of forward(x), of the same shape; None is the
            identity.

    Raises:
        TypeError: an argument is not callable, or the model is a Defense, whose draws would lose their keys: attacks
            take gradient="bpda" and `substitute` for it.
        ValueError: in a call, if the shapes of forward(x) and backward(x) differ.
    """

    def __init__(self, model: Map, forward: Map, backward: Map | None = None) -> None:
        super().__init__()
        for name, value in (("model", model), ("forward", forward), ("backward", backward)):
            if not callable(value) and not (name == "backward" and value is None):
                raise TypeError(message("BPDA", name, "a callable", type(value).__name__))
        if isinstance(model, Defense):
            expected = 'another model than a Defense, for which attacks have gradient="bpda" and `substitute`'
            raise TypeError(message("BPDA", "model", expected, "a Defense"))
        self.model, self.preprocess, self.substitute = model, forward, backward

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        with torch.no_grad():
            processed = check_tensor("BPDA", "forward", self.preprocess(images.detach().clone()))
        if torch.is_grad_enabled() and images.requires_grad:
            approximation = images if self.substitute is None else self.substitute(images)
            if approximation.shape != processed.shape:
                expected = f"a map to images of the shape {tuple(processed.shape)} of forward's"
                raise ValueError(message("BPDA", "backward", expected, tuple(approximation.shape)))
            processed = _Replaced.apply(processed, approximation)  # type: ignore[no-untyped-call]
        return self.model(processed)


class _Replaced(torch.autograd.Function):
    """The values of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.dtype = other.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.to(ctx.dtype)
