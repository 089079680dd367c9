"""One projected sparse step in the L1 ball, as in l1-APGD."""

from __future__ import annotations

import torch
from torch import Tensor

from ._steps import define_step, spread, sum_of_draws
from .project_l1 import formula as project


def formula(x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor, k: int | Tensor) -> Tensor:
    """The op as a user would write it; the baseline of the benchmarks."""
    g = torch.nan_to_num(sum_of_draws(grad, x))
    magnitude = g.abs()[:, None].flatten(1)
    if not magnitude.numel():
        return x.clamp(0, 1)
    ranked = magnitude.sort(dim=1, descending=True)[0]
    most = k if isinstance(k, Tensor) else torch.full((), k, dtype=torch.int64, device=x.device)
    last = most.expand(len(x)).clamp(1, magnitude.shape[1]) - 1
    chosen = (magnitude >= ranked.gather(1, last[:, None])).view_as(x)
    direction = torch.where(chosen, g.sign(), 0)
    count = (direction != 0)[:, None].flatten(1).sum(dim=1).clamp_min(1).to(x.dtype)
    return project(x + spread(alpha / count, x) * direction, x0, eps)


STEP = define_step("pgd_step_l1", formula, numbers=("alpha", "eps", "k"), per_sample=True)


def pgd_step_l1(
    x: Tensor, grad: Tensor, x0: Tensor, alpha: float | Tensor, eps: float | Tensor, k: int | Tensor
) -> Tensor:
    r"""Step along the k largest entries of the gradient, then project onto the L1 ball and the image range.

    .. math:: v = x + \alpha\,\mathrm{sign}(g) [|g| \ge |g|_{(k)}] / n, \quad x' = P(v)

    with |g|_(k) the k-th largest entry of the sample's gradient in magnitude, n the number of entries that move, and P
    the projection of :func:`project_l1`.

    Args:
        x: The current images in [0, 1], (B, ...), float32 or float64.
        grad: The loss gradient at `x`; shape, dtype and device of `x`. Or the gradients of several draws,
            (draws, *x.shape), which the step adds up in order.
        x0: The clean images in [0, 1], the center of the ball; shape, dtype and device of `x`.
        alpha: The L1 length of the step in units of [0, 1], finite. A number, or a tensor of shape () or (B,), one
            number per sample, of dtype and device of `x`.
        eps: The radius of the ball in units of [0, 1], finite and >= 0; a number or a tensor like `alpha`.
        k: The number of entries that move, >= 1: an int, or int64 of shape () or (B,). Tensors are clamped to at least
            1, and all numbers to the number of entries.

    Returns:
        x', shape and dtype of `x`, in the memory layout of torch.empty_like(x).

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or number is not as described, or a tensor requires grad while gradients are
            recorded. The values of tensors `alpha`, `eps` and `k` are not checked.

    Notes:
        Entries as large as the k-th move too, entries of 0 do not. NaN in the gradient counts as 0 and infinity as the
        largest number. NaN in a sample of `x` or `x0` makes that sample NaN. Not differentiable. C++ on the CPU; eager
        mode serves other devices.

    Reference:
        Croce and Hein, Mind the Box: l1-APGD for Sparse Adversarial Attacks on Image Classifiers, ICML 2021,
        section 3.

    Example:
        >>> x0 = torch.rand(8, 3, 32, 32)
        >>> x = atop_fast.ops.pgd_step_l1(x0, torch.randn_like(x0), x0, alpha=1.0, eps=12.0, k=100)
        >>> bool((x - x0).abs().flatten(1).sum(dim=1).max() <= 1.001)
        True
    """
    return STEP(x, grad, x0, alpha, eps, k)
