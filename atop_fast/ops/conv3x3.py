"""A 3x3 convolution on CPUs with a quarter of the multiplications, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.checks import check_float_tensor, check_integer, message
from ._checks import check_shape
from ._convolutions import (
    PANEL,
    Frozen,
    check_bias,
    check_float32,
    finished,
    relu_bwd,
    with_residual,
)
from ._images import memory_format
from ._registry import LIBRARY, MISSING, NAMESPACE, define, forbid_double_backward

# Larger than any image; products of sizes with a larger dilation could overflow.
MAX_DILATION = 2**16 - 1
# With fewer input or output channels, the op is slower than torch's; see `wins`.
MIN_CHANNELS = 16
# The interpolation points besides infinity; docs/math.md justifies the choice.
POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """The op as a user would write it, in the dtype of `x`; the baseline of the benchmarks."""
    return F.conv2d(x, weight, bias, padding=dilation, dilation=dilation)


def reference_prepare(weight: Tensor, transposed: bool) -> Tensor:
    """The weights in the layout that the kernel reads, (36, ceil(O / PANEL), C, PANEL), zero-padded beyond the outputs.

    They are G g G', computed in float64 and rounded once. `transposed` prepares them for the gradient in x: O and C
    exchanged, and every 3x3 filter flipped.
    """
    g = (weight.transpose(0, 1).flip(2, 3) if transposed else weight).double()
    rows = []
    for point in POINTS:
        scale = 1.0
        for other in POINTS:
            scale *= point - other if other != point else 1.0
        rows.append([1 / scale, point / scale, point * point / scale])
    matrix = g.new_tensor([*rows, [0.0, 0.0, 1.0]])
    u = (matrix @ g @ matrix.T).flatten(2)
    u = F.pad(u, (0, 0, 0, 0, 0, -len(u) % PANEL)).unflatten(0, (-1, PANEL))
    return u.permute(3, 0, 2, 1).float().contiguous()


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor | None,
    prepared_t: Tensor | None,
    dilation: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """The specification: the convolution, plus `residual`, then ReLU if `relu`.

    `prepared` and `prepared_t` are the weights as prepared for the forward and the backward kernel.
    """
    return finished(formula(x, weight, bias, dilation), residual, relu).contiguous(memory_format=memory_format(x))


def reference_bwd(
    dy: Tensor, weight: Tensor, prepared: Tensor | None, dilation: int, y: Tensor | None = None
) -> Tensor:
    """The gradient in x: a convolution of dy (masked by y > 0 if y is given) with transposed and flipped weights."""
    passed = dy if y is None else relu_bwd(dy, y)
    dx = F.conv_transpose2d(passed, weight, padding=dilation, dilation=dilation)
    return dx.contiguous(memory_format=memory_format(dy))


def reference_bwd_weight(dy: Tensor, x: Tensor, dilation: int) -> Tensor:
    """The gradient in the weights, (O, C, 3, 3), contiguous for any layout of the images."""
    weight = x.new_empty(dy.shape[1], x.shape[1], 3, 3)
    return formula_bwd(dy, x, weight, dilation, (False, True))[1].contiguous()


def formula_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, dilation: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """The wanted ones of the gradients in x and weight, by torch's convolution."""
    dx, dw, _ = torch.ops.aten.convolution_backward(
        dy, x, weight, None, [1, 1], [dilation] * 2, [dilation] * 2, False, [0, 0], 1, [*wanted, False]
    )
    return dx, dw


def check_weight(function: str, weight: Any) -> None:
    """Raise unless `weight` is (O, C, 3, 3)."""
    check_float_tensor(function, "weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or 0 in weight.shape:
        raise ValueError(message(function, "weight", "of shape (O, C, 3, 3), O and C >= 1", tuple(weight.shape)))


def check_images(function: str, argument: str, x: Any, channels: int, dilation: Any) -> None:
    """Raise unless `x`, named `argument` in messages, is images with `channels`, and `dilation` is valid."""
    if check_float_tensor(function, argument, x).dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
        raise ValueError(message(function, argument, f"of shape (B, {channels}, H, W), H and W >= 1", tuple(x.shape)))
    check_dilation(function, dilation)


def check_dilation(function: str, dilation: Any) -> None:
    """Raise unless `dilation` is valid; under torch.compile it may be symbolic."""
    if not torch.compiler.is_compiling():
        check_integer(function, "dilation", dilation, low=1, high=MAX_DILATION)


def check_prepare(function: str, weight: Tensor, transposed: bool) -> None:
    """Raise unless `conv3x3_prepare` accepts the arguments."""
    check_float32(function, weight=weight)
    check_weight(function, weight)


def check_arguments(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prepared: Tensor | None,
    prepared_t: Tensor | None,
    dilation: int,
    residual: Tensor | None = None,
    relu: bool = False,
) -> None:
    """Raise unless the op accepts the arguments."""
    check_float32(function, x=x, weight=weight, bias=bias, residual=residual)
    check_weight(function, weight)
    check_images(function, "x", x, weight.shape[1], dilation)
    check_bias(function, bias, weight)
    if residual is not None:
        check_shape(function, "residual", residual, (x.shape[0], weight.shape[0], *x.shape[2:]))


def check_bwd(
    function: str, dy: Tensor, weight: Tensor, prepared: Tensor | None, dilation: int, y: Tensor | None = None
) -> None:
    """Raise unless `conv3x3_bwd` accepts the arguments."""
    check_float32(function, dy=dy, weight=weight, y=y)
    check_weight(function, weight)
    check_images(function, "dy", dy, weight.shape[0], dilation)
    if y is not None:
        check_shape(function, "y", y, dy.shape)


def check_bwd_weight(function: str, dy: Tensor, x: Tensor, dilation: int) -> None:
    """Raise unless `conv3x3_bwd_weight` accepts the arguments."""
    check_float32(function, dy=dy, x=x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(message(function, "x", "of shape (B, C, H, W), C, H and W >= 1", tuple(x.shape)))
    batch, _, height, width = x.shape
    if dy.dim() != 4 or (len(dy), *dy.shape[2:]) != (batch, height, width) or not dy.shape[1]:
        expected = f"of shape ({batch}, O, {height}, {width}), O >= 1"
        raise ValueError(message(function, "dy", expected, tuple(dy.shape)))
    check_dilation(function, dilation)


OP_PREPARE = define(
    "conv3x3_prepare(Tensor weight, bool transposed) -> Tensor", reference_prepare, check=check_prepare, kernels=None
)
OP = define(
    "conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? prepared, Tensor? prepared_t, int dilation,"
    " Tensor? residual=None, bool relu=False) -> Tensor",
    reference,
    check=check_arguments,
    kernels=None,
)
OP_BWD = define(
    "conv3x3_bwd(Tensor dy, Tensor weight, Tensor? prepared, int dilation, Tensor? y=None) -> Tensor",
    reference_bwd,
    check=check_bwd,
    kernels=None,
)
OP_BWD_WEIGHT = define(
    "conv3x3_bwd_weight(Tensor dy, Tensor x, int dilation) -> Tensor",
    reference_bwd_weight,
    check=check_bwd_weight,
    kernels=None,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, prepared_t, ctx.dilation, _, relu = inputs
    # Frozen weights need no x.
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, prepared_t, output if relu else None)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight, prepared_t, y = ctx.saved_tensors
    # needs_input_grad has no entries for trailing arguments that were left at their defaults.
    of_x, of_weight, of_bias, _, _, _, of_residual, _ = (*ctx.needs_input_grad, False, False)[:8]
    if y is not None and (of_weight or of_bias or of_residual):
        dy, y = relu_bwd(dy, y), None
    dx = dw = db = None
    if of_x:
        dx = OP_BWD(dy, weight, prepared_t, ctx.dilation, y)
    if of_weight:
        dw = OP_BWD_WEIGHT(dy, x, ctx.dilation)
    if of_bias:
        db = dy.sum(dim=(0, 2, 3))
    return dx, dw, db, None, None, None, dy if of_residual else None, None


torch.library.register_autograd(f"{NAMESPACE}::conv3x3", _backward, setup_context=_setup_context, lib=LIBRARY)
forbid_double_backward("conv3x3_bwd")
forbid_double_backward("conv3x3_bwd_weight")


def wins(x: Tensor, weight: Tensor, dilation: int, prepared: bool) -> bool:
    """Whether the op is faster than torch's convolution in each of its passes; the rule is implemented only here.

    It is based on measurements against oneDNN. With few channels, the transforms, whose cost is proportional to them,
    outweigh the products. Tiles of 4x4 must be at least half full, as a tile takes 36 products and each output would
    take 9. Preparing the weights in every call takes as long as about 64 tiles; the gradient of the weights, which
    needs no preparation, won whenever the other passes did. The rule ignores the batch size, because a sample's result
    must not depend on it.
    """
    if "cpp" in MISSING or not x.is_cpu or not x.dtype == weight.dtype == torch.float32:
        return False
    height, width = x.shape[2:]
    tiles = _tiles(height, dilation) * _tiles(width, dilation)
    return min(weight.shape[:2]) >= MIN_CHANNELS and 2 * height * width >= 16 * tiles and (prepared or tiles >= 64)


def _tiles(size: int, dilation: int) -> int:
    """The number of tiles along an axis: pixels `dilation` apart form a separate image, and 4 of them a tile."""
    return size // (4 * dilation) * dilation + min(size % (4 * dilation), dilation)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, dilation: int = 1) -> Tensor:
    r"""Convolve images with 3x3 weights, with zero padding of `dilation` pixels, which preserves their size.

    .. math:: y_{b,o,i,j} = \beta_o + \sum_{c,k,l} w_{o,c,k,l} \, x_{b,c,i+d(k-1),j+d(l-1)}

    On CPUs in float32, if that is faster (`wins`), this uses Winograd's F(4x4, 3x3), which takes a quarter of the
    multiplications; otherwise it calls torch's convolution.

    Args:
        x: (B, C, H, W); channels_last is fastest, other layouts are copied.
        weight: (O, C, 3, 3).
        bias: (O,), or None.
        dilation: The dilation d >= 1.

    Returns:
        y, (B, O, H, W), dtype of `x`; channels_last if `x` is.

    Raises:
        TypeError: If a tensor does not have a floating-point dtype, or an argument has the wrong type.
        ValueError: If a shape or `dilation` is not as described.

    Notes:
        The relative error is about 1e-6, compared to 3e-7 for a direct convolution in float32. NaN and infinity spread
        over their tile of 4x4 outputs. With Winograd, the op is differentiable once, in all three tensors, and a second
        derivative raises RuntimeError; a sample's result has the same bits regardless of the batch, its position in the
        batch and the number of threads, and the gradient of the weights regardless of the number of threads.
        `FrozenConv3x3` prepares the weights only once, which pays off for small images.

    Reference:
        Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016, section 4; docs/math.md for the
        interpolation points.

    Example:
        >>> x = torch.randn(8, 64, 32, 32).contiguous(memory_format=torch.channels_last)
        >>> atop_fast.ops.conv3x3(x, torch.randn(64, 64, 3, 3)).shape
        torch.Size([8, 64, 32, 32])
    """
    check_weight("conv3x3", weight)
    check_images("conv3x3", "x", x, weight.shape[1], dilation)
    check_bias("conv3x3", bias, weight)
    if wins(x, weight, dilation, prepared=False):
        return OP(x, weight, bias, None, None, dilation)
    return formula(x, weight, bias, dilation)


class FrozenConv3x3(Frozen):
    """A copy of a 3x3 convolution with constant weights, prepared once, for networks under attack.

    Computes relu(convolution(x) + residual) in one pass over the outputs. Forward and input gradient use `conv3x3` if
    it wins, and torch's convolution otherwise. The weights have no gradient and are not in the state dict, because they
    cannot be changed. They take 9 times the memory of the original: a copy and two prepared forms.

    Args:
        convolution: A convolution that `accepts` accepts.
        relu: Whether a ReLU follows the sum.

    Raises:
        TypeError: If `convolution` is not an nn.Conv2d.
        ValueError: If `accepts` does not accept it.

    Shape:
        (B, C, H, W) and, if there is a residual, (B, O, H, W) to (B, O, H, W), as `convolution`.

    Example:
        >>> for name, module in list(network.named_modules()):
        ...     if FrozenConv3x3.accepts(module):
        ...         network.set_submodule(name, FrozenConv3x3(module))
    """

    ACCEPTED = "a float32 3x3 convolution on the CPU that keeps the size, of 16 channels or more and no groups"

    def __init__(self, convolution: nn.Conv2d, relu: bool = False) -> None:
        super().__init__(convolution, relu, OP_PREPARE)
        self.dilation = convolution.dilation[0]

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether this class can replace `module`, and is faster for images of some size."""
        return (
            Frozen.accepts(module)
            and module.kernel_size == (3, 3)
            and module.stride == (1, 1)
            and module.dilation[0] == module.dilation[1]
            and module.padding in (module.dilation, "same")
            and min(module.weight.shape[:2]) >= MIN_CHANNELS
        )

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve images (B, C, H, W), add the residual and apply the ReLU, if any."""
        if wins(x, self.weight, self.dilation, prepared=True):
            arguments = (x, self.weight, self.bias, self.prepared, self.prepared_t, self.dilation)
            shape = (len(x), len(self.weight), *x.shape[2:])
            return with_residual(lambda *fused: OP(*arguments, *fused), residual, self.relu, shape)
        return finished(formula(x, self.weight, self.bias, self.dilation), residual, self.relu)

    def extra_repr(self) -> str:
        """Channels and options."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, dilation={self.dilation}, relu={self.relu}"
