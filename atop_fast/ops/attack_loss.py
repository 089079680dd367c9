"""The loss that an attack maximises, its gradient in the logits, and whether the model is still right, in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import check_choice, check_tensor, message
from ._images import widen
from ._registry import LIBRARY, NAMESPACE, define

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The number of a loss in the op's argument `kind` is its place here.
LOSSES = ("ce", "margin", "dlr")
CE, MARGIN, DLR = range(3)
MAX_CLASSES = 2**31 - 1


class AttackLoss(NamedTuple):
    """What :func:`attack_loss` returns: losses (B,), gradient (B, K) and correct (B,), bool."""

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
    difference = other - z[rows, labels]
    if kind == MARGIN:
        return difference
    low = ranked[:, 2] if targets is None else (ranked[:, 2] + ranked[:, 3]) / 2
    return difference / (ranked[:, 0] - low + 1e-12)


def reference(logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """The specification; a label or target that is no class makes a row NaN and not correct."""
    check_arguments("attack_loss", logits, labels, targets, kind)
    z = widen(logits)
    broken = _outside(labels, z) if targets is None else _outside(labels, z) | _outside(targets, z)
    y = labels.clamp(0, z.shape[1] - 1)[:, None]
    if kind == CE:
        losses, gradient = _cross_entropy(z, y)
        losses = losses.masked_fill(broken, torch.nan)
        unusable = losses.isnan()
    else:
        target = None if targets is None else targets.clamp(0, z.shape[1] - 1)[:, None]
        losses, gradient = _ranked(z, y, target, kind)
        losses = losses.masked_fill(broken | z.isnan().any(dim=1), torch.nan)
        unusable = ~losses.isfinite()
    return losses, gradient.masked_fill(unusable[:, None], torch.nan), (z.argmax(dim=1) == labels) & ~broken


def _cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Neither the loss nor the label's gradient comes from a difference of nearly equal numbers."""
    greatest, z_y = z.amax(dim=1, keepdim=True), z.gather(1, y)
    e = (z - greatest).exp()
    e_y, others = e.gather(1, y), e.scatter(1, y, 0).sum(dim=1, keepdim=True)
    losses = (greatest - z_y) + (others + (e_y - 1)).log1p()
    total = others + e_y
    return losses[:, 0], (e / total).scatter(1, y, -others / total)


def _ranked(z: Tensor, y: Tensor, target: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """margin and dlr; equal logits rank by their class, and the gradient goes to those that were chosen."""
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
    for place, move in moves:
        gradient = gradient.scatter_add(1, place, move)
    return losses[:, 0], gradient


OP = define(
    "attack_loss(Tensor logits, Tensor labels, Tensor? targets, int kind) -> (Tensor, Tensor, Tensor)",
    reference,
    kernels="attack_loss",
)


class _Gradient(torch.autograd.Function):
    """The chain rule, and an error where it would be differentiated, as the gradient is not known to depend on z."""

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
    r"""What an attack maximises for every sample, its gradient in the logits, and whether the prediction is right.

    With z the logits, y the label, :math:`\pi` the order of the logits from the greatest, and o the greatest other
    class, or the target t:

    .. math::

        \mathrm{ce} = \log \sum_j e^{z_j} - z_y \qquad
        \mathrm{margin} = z_o - z_y \qquad
        \mathrm{dlr} = \frac{z_o - z_y}{z_{\pi_1} - z_{\pi_3} + 10^{-12}}

    and with targets the denominator of dlr is :math:`z_{\pi_1} - (z_{\pi_3} + z_{\pi_4}) / 2 + 10^{-12}`.

    Args:
        logits: (B, K), float32, float64, bfloat16 or float16. margin needs 2 classes, dlr 3, and 4 with targets.
        labels: The true classes, int64 (B,) in [0, K).
        loss: "ce", "margin" or "dlr".
        targets: The classes to reach, int64 (B,) in [0, K), for margin and dlr.

    Returns:
        losses (B,); gradient (B, K), of each loss in its own logits (that of the sum: nothing is divided by B); correct
        (B,), bool: argmax(logits) == labels. Losses and gradient are float32, and float64 for float64.

    Raises:
        TypeError: If an argument has the wrong type or dtype.
        ValueError: If a shape, device or class is not as described, `loss` is none of the three, or "ce" has targets.

    Notes:
        The gradient of ce at the label is minus the sum of the other probabilities, and its loss a log1p: both keep
        their relative accuracy for confident predictions (margins up to 80 in float32). The gradient of dlr flows
        through the sorted logits too. Equal logits rank by class, the lowest first; argmax takes NaN for the greatest,
        as torch.argmax does. A NaN among the logits makes the loss NaN. Where the loss is NaN, and in margin and dlr
        infinite, so is the sample's gradient NaN. Classes are checked on the CPU and outside of torch.compile only:
        elsewhere that would wait for the device, and a label or target that is no class gives NaN and not correct.
        `losses` is differentiable once in `logits`; `gradient` is a constant.

    Reference:
        Carlini & Wagner, Towards Evaluating the Robustness of Neural Networks, S&P 2017 (margin); Croce & Hein,
        Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks, ICML 2020,
        equations 6 and 7 (dlr).

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


def check_arguments(function: str, logits: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> None:
    """Raise unless the op takes the arguments; the classes themselves are not looked at."""
    if check_tensor(function, "logits", logits).dtype not in DTYPES:
        raise TypeError(message(function, "logits", "a float32, float64, bfloat16 or float16 tensor", logits.dtype))
    if kind not in (CE, MARGIN, DLR):
        raise ValueError(message(function, "kind", "0, 1 or 2", kind))
    if targets is not None and kind == CE:
        raise ValueError(message(function, "targets", "None for the cross-entropy", "a tensor"))
    least = (1, 2, 3 if targets is None else 4)[kind]
    if logits.dim() != 2 or not least <= logits.shape[1] <= MAX_CLASSES:
        expected = f"of shape (B, K) with {least} <= K < 2**31"
        raise ValueError(message(function, "logits", expected, tuple(logits.shape)))
    _check_labels(function, "labels", labels, logits)
    if targets is not None:
        _check_labels(function, "targets", targets, logits)


def _check_labels(function: str, argument: str, value: Tensor, logits: Tensor) -> None:
    if check_tensor(function, argument, value).dtype != torch.int64:
        raise TypeError(message(function, argument, "an int64 tensor", value.dtype))
    if value.dim() != 1 or value.shape[0] != logits.shape[0]:
        raise ValueError(message(function, argument, f"of shape ({logits.shape[0]},)", tuple(value.shape)))
    if value.device != logits.device:
        raise ValueError(message(function, argument, f"on the device of logits {logits.device}", value.device))


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
