"""The loss that an attack maximizes, its gradient in the logits, and whether the model is still right, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_choice, message
from ._checks import FLOATS, check_dtype, check_same_device, check_shape
from ._images import widen
from ._registry import LIBRARY, NAMESPACE, define

# The op's argument `kind` is an index into this tuple.
LOSSES = ("ce", "margin", "dlr", "pm", "pm-label", "pm-other")
CE, MARGIN, DLR, PM, PM_LABEL, PM_OTHER = range(6)
# Losses that depend only on the label and take no target.
UNTARGETED = (CE, PM_LABEL)
MAX_CLASSES = 2**31 - 1
# If the ratio of two sums exceeds this, the logarithm of their quotient is computed from their difference.
NEAR = 2.0**-20


class AttackLoss(NamedTuple):
    """The result of :func:`attack_loss`: losses (B,), gradient (B, K) and correct (B,), bool."""

    losses: Tensor
    gradient: Tensor
    correct: Tensor


def formula(logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> Tensor:
    """The losses as a user would write them, to be differentiated by autograd; the baseline of the benchmarks."""
    z, labels = widen(logits), labels.long()
    if kind == CE:
        return F.cross_entropy(z, labels, reduction="none")
    rows = torch.arange(len(z), device=z.device)
    ranked, order = z.sort(dim=1, descending=True, stable=True)
    if targets is None:
        other = torch.where(order[:, 0] == labels, ranked[:, 1], ranked[:, 0])
    else:
        other = z[rows, targets.long()]
    if kind >= PM:
        target = torch.where(order[:, 0] == labels, order[:, 1], order[:, 0]) if targets is None else targets.long()
        return _log_odds(z, labels[:, None], target[:, None], kind)
    difference = other - z[rows, labels]
    if kind == MARGIN:
        return difference
    low = ranked[:, 2] if targets is None else (ranked[:, 2] + ranked[:, 3]) / 2
    return difference / (ranked[:, 0] - low + 1e-12)


def _log_odds(z: Tensor, y: Tensor, other: Tensor, kind: int) -> Tensor:
    """The logarithms of A and B of the derivation, and their difference."""
    e = (z - z.amax(dim=1, keepdim=True).detach()).exp()
    e_y, e_o, without_y = e.gather(1, y), e.gather(1, other), e.scatter(1, y, 0)
    if kind == PM_LABEL:
        a, b = without_y.sum(dim=1, keepdim=True), e_y
    elif kind == PM_OTHER:
        a, b = e_o, e.scatter(1, other, 0).sum(dim=1, keepdim=True)
    else:
        rest = without_y.scatter(1, other, 0).sum(dim=1, keepdim=True)
        a, b = 2 * e_o + rest, 2 * e_y + rest
    return (a.log() - b.log())[:, 0]


def reference(logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; a label or target outside the classes makes a row NaN and not correct."""
    z = widen(logits)
    broken = _outside(labels, z) if targets is None else _outside(labels, z) | _outside(targets, z)
    y = labels.clamp(0, z.shape[1] - 1)[:, None]
    if kind == CE:
        losses, gradient = _cross_entropy(z, y)
        losses = losses.masked_fill(broken, torch.nan)
        unusable = losses.isnan()
    else:
        target = None if targets is None else targets.clamp(0, z.shape[1] - 1)[:, None]
        losses, gradient = _ranked(z, y, target, kind) if kind < PM else _odds(z, y, target, kind)
        losses = losses.masked_fill(broken | z.isnan().any(dim=1), torch.nan)
        unusable = ~losses.isfinite()
    return losses, gradient.masked_fill(unusable[:, None], torch.nan), (z.argmax(dim=1) == labels) & ~broken


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of ce, without cancellation in the loss or in the label's entry of the gradient."""
    greatest, z_y = z.amax(dim=1, keepdim=True), z.gather(1, y)
    e = (z - greatest).exp()
    e_y, others = e.gather(1, y), e.scatter(1, y, 0).sum(dim=1, keepdim=True)
    losses = (greatest - z_y) + (others + (e_y - 1)).log1p()
    total = others + e_y
    return losses[:, 0], (e / total).scatter(1, y, -others / total)


def _ranked(z: Tensor, y: Tensor, target: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """margin and dlr; equal logits rank by class, and the gradient flows to the logits that were chosen."""
    order = z.argsort(dim=1, descending=True, stable=True)
    ranked = z.gather(1, order)
    first, second = order[:, :1], order[:, 1:2]
    other = torch.where(first == y, second, first) if target is None else target
    losses, slope = z.gather(1, other) - z.gather(1, y), torch.ones_like(ranked[:, :1])
    moves = [(other, slope), (y, -slope)]
    if kind == DLR:
        low = order[:, 2:3] if target is None else order[:, 2:4]
        slope = 1 / (ranked[:, :1] - z.gather(1, low).mean(dim=1, keepdim=True) + 1e-12)
        losses = losses * slope
        spread = losses * slope
        moves = [(other, slope), (y, -slope), (first, -spread), (low, (spread / low.shape[1]).expand_as(low))]
    gradient = torch.zeros_like(z)
    for index, move in moves:
        gradient = gradient.scatter_add(1, index, move)
    return losses[:, 0], gradient


def _odds(z: Tensor, y: Tensor, target: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """pm and its parts: the logarithm of A / B, with a separate scale for each sum (docs/math.md#attack_loss)."""
    order = z.argsort(dim=1, descending=True, stable=True)
    other = torch.where(order[:, :1] == y, order[:, 1:2], order[:, :1]) if target is None else target
    in_a, in_b, weight = kind != PM_OTHER, kind != PM_LABEL, 2 if kind == PM else 1
    rest = z.scatter(1, y, -torch.inf).scatter(1, other, -torch.inf)
    third, z_o, z_y = rest.amax(dim=1, keepdim=True), z.gather(1, other), z.gather(1, y)
    if kind == PM_OTHER:
        z_y = z_y.masked_fill(y == other, -torch.inf)
    top_a = torch.maximum(third, z_o) if in_a else z_o
    top_b = torch.maximum(third, z_y) if in_b else z_y
    unit = torch.minimum(top_a, top_b) if in_a and in_b else (top_a if in_a else top_b)
    zero, one = torch.zeros_like(z_o), torch.ones_like(z_o)
    unit_a, e_o = ((unit - top_a).exp(), (z_o - top_a).exp()) if in_a else (zero, one)
    unit_b, e_y = ((unit - top_b).exp(), (z_y - top_b).exp()) if in_b else (zero, one)
    e = (z - unit).exp().scatter(1, y, 0).scatter(1, other, 0)
    r = e.sum(dim=1, keepdim=True)
    a, b = weight * e_o + r * unit_a, weight * e_y + r * unit_b
    log_a, log_b = ((weight * e_o - 1) + r * unit_a).log1p(), ((weight * e_y - 1) + r * unit_b).log1p()
    losses = (top_a - top_b) + (log_a - log_b)
    if kind == PM:
        # A and B may be nearly equal: compute their difference as A - B = 2 (e_o - e_y).
        is_above, gap = z_y > z_o, -(z_y - z_o).abs().neg().expm1()
        difference = weight * gap * torch.where(is_above, unit_a * e_y, unit_b * e_o)
        slope = torch.where(is_above, difference, -difference) / (a * b)
        growth = (difference / torch.where(is_above, a * (unit_a * unit_b), b * (unit_a * unit_b))).log1p()
        losses = torch.where(torch.minimum(unit_a, unit_b) > NEAR, torch.where(is_above, -growth, growth), losses)
    else:
        slope = unit_a / a if in_a else -unit_b / b
    return losses[:, 0], (e * slope).scatter_add(1, y, -weight * e_y / b).scatter_add(1, other, weight * e_o / a)


def check_arguments(function: str, logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> None:
    """Raise unless the op accepts the arguments; values of labels and targets are not checked."""
    check_dtype(function, "logits", logits, *FLOATS)
    if kind not in range(len(LOSSES)):
        raise ValueError(message(function, "kind", f"in [0, {len(LOSSES)})", kind))
    if targets is not None and kind in UNTARGETED:
        raise ValueError(message(function, "targets", "None for a loss of the label alone", "a tensor"))
    least = (1, 2, 3 if targets is None else 4, 2, 2, 2)[kind]
    if logits.dim() != 2 or not least <= logits.shape[1] <= MAX_CLASSES:
        expected = f"of shape (B, K) with {least} <= K < 2**31"
        raise ValueError(message(function, "logits", expected, tuple(logits.shape)))
    _check_labels(function, "labels", labels, logits)
    if targets is not None:
        _check_labels(function, "targets", targets, logits)


def _check_labels(function: str, argument: str, value: Tensor, logits: Tensor) -> None:
    check_dtype(function, argument, value, torch.int64)
    check_shape(function, argument, value, logits.shape[:1])
    check_same_device(function, argument, value, "logits", logits)


OP = define(
    "attack_loss(Tensor logits, Tensor labels, Tensor? targets, int kind) -> (Tensor, Tensor, Tensor)",
    reference,
    check=check_arguments,
    kernels="attack_loss",
)


class _Gradient(torch.autograd.Function):
    """The chain rule; a double backward raises, because autograd does not know that the gradient depends on z."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dlosses: Tensor, gradient: Tensor) -> Tensor:
        return (dlosses[:, None] * gradient).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("attack_loss: double backward is not supported")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, correct = output
    ctx.mark_non_differentiable(gradient, correct)
    ctx.save_for_backward(inputs[0], gradient)


def _backward(ctx: Any, dlosses: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    logits, gradient = ctx.saved_tensors
    return _Gradient.apply(logits, dlosses, gradient), None, None, None


torch.library.register_autograd(f"{NAMESPACE}::attack_loss", _backward, setup_context=_setup_context, lib=LIBRARY)


def attack_loss(logits: Tensor, labels: Tensor, loss: str = "ce", targets: Tensor | None = None) -> AttackLoss:
    r"""The loss that an attack maximizes for every sample, its gradient in the logits, and correctness of predictions.

    With z the logits, y the label, :math:`\pi` the order of the logits from the largest to the smallest, and o the
    class with the largest other logit, or the target t:

    .. math::

        \mathrm{ce} = \log \sum_j e^{z_j} - z_y \qquad
        \mathrm{margin} = z_o - z_y \qquad
        \mathrm{dlr} = \frac{z_o - z_y}{z_{\pi_1} - z_{\pi_3} + 10^{-12}}

    With targets, the denominator of dlr is :math:`z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2 + 10^{-12}`. With p the
    softmax of z, the probability margin :math:`P = p_o - p_y` and its two parts are expressed as log-odds, which are
    monotone in them and keep the direction of their gradients where the softmax saturates:

    .. math::

        \mathrm{pm} = \log \frac{1 + P}{1 - P} \qquad
        \textrm{pm-label} = \log \frac{1 - p_y}{p_y} \qquad
        \textrm{pm-other} = \log \frac{p_o}{1 - p_o}

    Args:
        logits: (B, K), float32, float64, bfloat16 or float16. The minimum K is 1 for ce, 3 for dlr (4 with targets),
            and 2 for the others.
        labels: The true classes, int64 (B,) in [0, K).
        loss: "ce", "margin", "dlr", "pm", "pm-label" or "pm-other".
        targets: The target classes, int64 (B,) in [0, K), for all losses except ce and pm-label.

    Returns:
        losses (B,); gradient (B, K), of each loss in its own logits (not divided by B); correct (B,), bool:
        argmax(logits) == labels. Losses and gradient are float64 for float64 logits, and float32 otherwise.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or class is not as described, `loss` is unknown, or "ce" or "pm-label" has
            targets.

    Notes:
        The gradient of ce at the label is computed as minus the sum of the other probabilities, and its loss as a
        log1p: both are accurate to a relative error even for confident predictions (margins up to 80 in float32). The
        gradient of dlr also flows through the sorted logits. P itself is tanh(pm / 2); the gradients of pm and of its
        parts do not underflow at any margin between the label and the other class. Equal logits rank by class, the
        lowest first; argmax treats NaN as the largest value, like torch.argmax. A NaN among the logits makes the loss
        NaN. The gradient of a NaN loss is NaN, as is that of an infinite loss other than ce. Classes are validated only
        on the CPU and outside torch.compile, because elsewhere the check would synchronize the device; there, a label
        or target outside the classes gives NaN and not correct. `losses` is differentiable once in `logits`; `gradient`
        is a constant.

    Reference:
        Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017 (margin); Croce & Hein,
        Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020,
        equations 6 and 7 (dlr); Xie et al., Towards Million-Scale Adversarial Robustness Evaluation With Stronger
        Individual Attacks, CVPR 2025 (pm).

    Example:
        >>> losses, gradient, correct = atop_fast.ops.attack_loss(torch.randn(8, 10), torch.arange(8), loss="dlr")
        >>> gradient.shape
        torch.Size([8, 10])
    """
    kind = LOSSES.index(check_choice("attack_loss", "loss", loss, LOSSES))
    check_arguments("attack_loss", logits, labels, targets, kind)
    if torch.compiler.is_compiling():
        return AttackLoss(*OP(logits, labels, targets, kind))
    if not logits.is_cuda:
        _check_classes("labels", labels, logits)
        if targets is not None:
            _check_classes("targets", targets, logits)
    if logits.requires_grad and torch.is_grad_enabled():
        return AttackLoss(*OP(logits, labels, targets, kind))
    with torch._C._AutoDispatchBelowAutograd():
        return AttackLoss(*OP(logits, labels, targets, kind))


def _check_classes(argument: str, value: Tensor, logits: Tensor) -> None:
    if not len(value):
        return
    least, greatest = value.aminmax()
    low, high = least.item(), greatest.item()
    if low < 0 or high >= logits.shape[1]:
        expected = f"classes in [0, {logits.shape[1]})"
        raise ValueError(message("attack_loss", argument, expected, f"values in [{low}, {high}]"))


def _outside(labels: Tensor, z: Tensor) -> Tensor:
    return (labels < 0) | (labels >= z.shape[1])
