"""The Euclidean projection onto the L1 ball around an image, within the image range."""

from __future__ import annotations

import torch
from torch import Tensor

from ._steps import define_step

# Distances are clamped to this; larger ones make no difference.
FAR = 1e30


def formula(x: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    """The op as a user would write it, from the sorted breakpoints of the equation for the threshold."""
    y = (x - x0).clamp(-FAR, FAR)[:, None].flatten(1)
    length, cap = y.abs(), torch.where(y > 0, 1 - x0[:, None].flatten(1), x0[:, None].flatten(1)).clamp_min(0)
    threshold = _threshold(length.double(), cap.double(), eps)[:, None].to(x.dtype)
    kept = (length - threshold).clamp_min(0).minimum(cap).view_as(x)
    length, y = length.view_as(x), y.view_as(x)
    return torch.where(kept < length, torch.where(y < 0, x0 - kept, x0 + kept), x + 0 * kept).clamp(0, 1)


def _threshold(length: Tensor, cap: Tensor, eps: float | Tensor) -> Tensor:
    """The smallest number (B,) such that the sum of min(cap, max(length - number, 0)) is at most eps."""
    if not length.shape[1]:
        return length.new_zeros(len(length))
    # An element starts to shrink at the threshold length - cap and vanishes at length.
    bends, order = torch.cat(((length - cap).clamp_min(0), length), dim=1).sort(dim=1)
    slope = torch.where(order < length.shape[1], 1.0, -1.0).to(length.dtype).cumsum(dim=1)
    steps = torch.cat((torch.zeros_like(bends[:, :1]), slope[:, :-1] * bends.diff(dim=1)), dim=1)
    left = length.minimum(cap).sum(dim=1, keepdim=True) - steps.cumsum(dim=1)
    # Fill on the device: copying a number from the host synchronizes with a GPU, which a CUDA graph cannot capture.
    radius = eps.to(length.dtype) if isinstance(eps, Tensor) else length.new_full((), eps)
    radius = radius.expand(len(length))[:, None]
    last = ((left > radius).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    bend, rest, falls = (t.gather(1, last) for t in (bends, left - radius, slope))
    threshold = torch.where(left[:, :1] > radius, bend + rest / falls, 0.0)
    return torch.where(left[:, :1].isnan(), left[:, :1], threshold).squeeze(1)


STEP = define_step("project_l1", formula, tensors=("x", "x0"), numbers=("eps",), per_sample=True)


def project_l1(x: Tensor, x0: Tensor, eps: float | Tensor) -> Tensor:
    r"""Project onto the intersection of the L1 ball around `x0` and the image range, exactly.

    .. math:: x' = \arg\min_p |p - x|_2 \quad \text{with } |p - x_0|_1 \le \epsilon,\ p \in [0, 1]

    Args:
        x: The images to project, (B, ...), float32 or float64; the norm is taken over each sample.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0. A number, or a tensor of shape () or (B,), one
            number per sample, of dtype and device of `x`.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described, or a tensor requires grad while gradients are
            recorded. The values of a tensor `eps` are not checked.

    Notes:
        Points inside the set are returned unchanged. NaN in a sample makes that sample NaN. The constraint on the L1
        norm holds up to rounding, about 1e-5 of eps in float32. Not differentiable, because attacks need no gradient
        through it. C++ on the CPU; eager mode on other devices.

    Reference:
        Croce and Hein, Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers, ICML 2021,
        proposition 2.2.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.project_l1(x0 + torch.randn_like(x0), x0, eps=12.0)
        >>> bool((x - x0).abs().flatten(1).sum(dim=1).max() <= 12.001)
        True
    """
    return STEP(x, x0, eps)
