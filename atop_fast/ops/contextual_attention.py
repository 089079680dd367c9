"""The contextual attention of DeepFillV2: masked regions are filled with patches of unmasked regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_tensor, message
from ._checks import FLOATS, check_dtype, check_dy, check_same_device, check_shape
from ._images import memory_format, widen
from ._registry import LIBRARY, NAMESPACE, define, forbid_double_backward

SCALE = 10.0
# Lower bound of the norms by which keys are divided.
MIN_NORM = 1e-4


def formula(features: Tensor, valid: Tensor) -> Tensor:
    """The op as a user would write it, in the dtype of `features`; the baseline of the benchmarks.

    Keys and values are the kernels of convolutions, one sample at a time.
    """
    if features.numel() == 0:
        return features.clone()
    height, width = valid.shape[1:]
    count = height * width
    identity = torch.eye(3, dtype=features.dtype, device=features.device)[None, None]
    results = []
    for sample, usable in zip(features[:, None], valid.to(features.dtype).flatten(1), strict=True):
        values = F.unfold(sample, 4, padding=1, stride=2)[0].T.reshape(count, -1, 4, 4)
        small = sample[..., ::2, ::2]
        keys = F.unfold(small, 3, padding=1)[0].T.reshape(count, -1, 3, 3)
        keys = keys / keys.flatten(1).norm(dim=1).clamp(min=MIN_NORM)[:, None, None, None]
        scores = F.conv2d(small, keys, padding=1)
        scores = F.conv2d(scores.reshape(1, 1, count, count), identity, padding=1)
        scores = scores.reshape(1, height, width, height, width).permute(0, 2, 1, 4, 3)
        scores = F.conv2d(scores.reshape(1, 1, count, count), identity, padding=1)
        scores = scores.reshape(1, width, height, width, height).permute(0, 2, 1, 4, 3).reshape(1, count, height, width)
        usable = usable[None, :, None, None]
        weights = torch.softmax(SCALE * scores * usable, dim=1) * usable
        results.append(F.conv_transpose2d(weights, values, stride=2, padding=1) / 4)
    return torch.cat(results)


def reference(features: Tensor, valid: Tensor) -> Tensor:
    """The specification: products of width C instead of 9 C and 16 C, and diagonal sums (docs/math.md).

    16-bit features are computed in float32 and rounded once, at the end.
    """
    b = widen(features)
    with no_autocast(features):
        _, _, weights = _attend(b, valid)
        return rounded(_paste(weights, b), features)


def reference_bwd(dy: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    """The gradient in `features`, which serve as values, as keys and as queries."""
    b, dy = widen(features), widen(dy)
    with no_autocast(features):
        scores, norms, weights = _attend(b, valid)
        # As values: pasting is linear in them, and its transpose is pasting with the transposed weights.
        db = _paste(weights.mT, dy)
        # As keys: through the weights to the scores.
        dweights = _paste_bwd(dy, b)
        dscores = SCALE * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dscores = _fuse_bwd(dscores, valid.shape[1:])
        # Scores are divided by the norm of their key, whose square is on the diagonal of the products.
        dnorms = -(dscores * scores).sum(1) / norms
        dproducts = dscores / norms[:, None]
        diagonal = dproducts.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(norms > MIN_NORM, dnorms / (2 * norms), 0)
        dproducts = _compare_neighbors(dproducts + dproducts.mT, valid.shape[1:])
        small = b[:, :, ::2, ::2]
        db[:, :, ::2, ::2] += (small.flatten(2) @ dproducts).view_as(small)
        return rounded(db, features)


def check_features(function: str, features: Tensor) -> None:
    """Raise unless `features` is what the op takes."""
    check_dtype(function, "features", features, *FLOATS)
    if features.dim() != 4 or features.shape[2] % 2 or features.shape[3] % 2 or 0 in features.shape[2:]:
        raise ValueError(message(function, "features", "of shape (B, C, h, w), h and w even", tuple(features.shape)))


def check_arguments(function: str, features: Tensor, valid: Tensor) -> None:
    """Raise unless the op accepts the arguments."""
    check_features(function, features)
    check_dtype(function, "valid", valid, torch.bool)
    check_shape(function, "valid", valid, (features.shape[0], features.shape[2] // 2, features.shape[3] // 2))
    check_same_device(function, "valid", valid, "features", features)


def check_bwd(function: str, dy: Tensor, features: Tensor, valid: Tensor) -> None:
    """Raise unless the backward op accepts the arguments."""
    check_arguments(function, features, valid)
    check_dy(function, dy, features.shape, features)


OP = define(
    "contextual_attention(Tensor features, Tensor valid) -> Tensor",
    reference,
    check=check_arguments,
    kernels="contextual_attention",
)
OP_BWD = define(
    "contextual_attention_bwd(Tensor dy, Tensor features, Tensor valid) -> Tensor",
    reference_bwd,
    check=check_bwd,
    kernels="contextual_attention",
)


@torch.library.register_fake(f"{NAMESPACE}::contextual_attention", lib=LIBRARY)
def _fake(features: Tensor, valid: Tensor) -> Tensor:
    # Tracing this is much faster than tracing the reference.
    return torch.empty_like(features, memory_format=memory_format(features))


@torch.library.register_fake(f"{NAMESPACE}::contextual_attention_bwd", lib=LIBRARY)
def _fake_bwd(dy: Tensor, features: Tensor, valid: Tensor) -> Tensor:
    return _fake(features, valid)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return OP_BWD(dy, *ctx.saved_tensors), None


torch.library.register_autograd(
    f"{NAMESPACE}::contextual_attention", _backward, setup_context=_setup_context, lib=LIBRARY
)
forbid_double_backward("contextual_attention_bwd")


def contextual_attention(features: Tensor, mask: Tensor) -> Tensor:
    r"""Replace features by a mean of patches of the same sample's unmasked features, weighted by similarity.

    With features :math:`b`, :math:`x` their subsampling at every second pixel, and patches :math:`X_l` of 3x3 pixels of
    :math:`x` and :math:`V_l` of 4x4 pixels of :math:`b` around the same position :math:`l`,

    .. math::
        s_{lp} = \left\langle \frac{X_l}{\max(\|X_l\|, 10^{-4})}, X_p \right\rangle, \qquad
        a_{\cdot p} = v \cdot \mathrm{softmax}(10 \, v \cdot \mathrm{fuse}(s)_{\cdot p}), \qquad
        y = \frac14 \sum_p \mathrm{paste}_p \sum_l a_{lp} V_l

    where :math:`v_l` is 1 if the mask is 0 at all 9 pixels of :math:`X_l`, and 0 otherwise; fuse adds to every score
    the scores of the next and the previous pair of positions, in row-major and then in column-major order; and patches
    overlap.

    Args:
        features: (B, C, h, w), h and w even, float32, float64, bfloat16 or float16.
        mask: (B, 1, h * k, w * k) for an integer k >= 1, 1 where the image was masked and 0 elsewhere, separate for
            every sample. It is read at every 2k-th pixel and receives no gradient.

    Returns:
        y, shape, dtype and device of `features`; channels_last if `features` is channels_last, contiguous otherwise. A
        sample without an unmasked patch gives 0.

    Raises:
        TypeError: If `features` is not a tensor of one of these dtypes, or `mask` is not a tensor.
        ValueError: If a shape is not as described, or the tensors are on different devices.

    Notes:
        Differentiable once; a second derivative raises RuntimeError. Only `features` and the mask are saved for the
        backward pass, which recomputes the weights. 16-bit features are computed in float32, as are float32 features
        under autocast. On CPUs with the native build, a sample's result has the same bits regardless of the batch, its
        position in the batch and the number of threads.

    Reference:
        Yu et al., Generative Image Inpainting with Contextual Attention, CVPR 2018, section 4; docs/math.md for the
        algebra.

    Example:
        >>> features, mask = torch.randn(8, 96, 64, 64), torch.zeros(8, 1, 256, 256)
        >>> mask[..., 64:128, 64:128] = 1
        >>> atop_fast.ops.contextual_attention(features, mask).shape
        torch.Size([8, 96, 64, 64])
    """
    check_features("contextual_attention", features)
    check_mask("contextual_attention", mask, features)
    return OP(features, _valid(mask, features))


def _valid(mask: Tensor, features: Tensor) -> Tensor:
    """Whether the 3x3 patch of the mask around every second feature is all 0: bool, (B, h / 2, w / 2)."""
    step = mask.shape[2] // features.shape[2] * 2
    masked = (mask[:, 0, ::step, ::step] != 0).float()
    return F.max_pool2d(masked, 3, stride=1, padding=1) == 0


def check_mask(function: str, mask: Tensor, features: Tensor) -> None:
    """Raise unless `mask` is a mask for `features`."""
    batch, _, height, width = features.shape
    shape = check_tensor(function, "mask", mask).shape
    fits = mask.dim() == 4 and shape[:2] == (batch, 1)
    if not fits or shape[2] < height or shape[2] % height or shape[2] // height * width != shape[3]:
        expected = f"of shape ({batch}, 1, {height} k, {width} k) for an integer k"
        raise ValueError(message(function, "mask", expected, tuple(shape)))
    check_same_device(function, "mask", mask, "features", features)


def no_autocast(t: Tensor) -> torch.autocast:
    """A context that disables autocast, so that products have the type of their factors."""
    return torch.autocast(t.device.type, enabled=False)


def rounded(y: Tensor, features: Tensor) -> Tensor:
    return y.to(features.dtype).contiguous(memory_format=memory_format(features))


def _attend(b: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [p, l] before fusing, the norms of the keys, and the weights [p, l]."""
    size = valid.shape[1:]
    x = b[:, :, ::2, ::2].flatten(2)
    products = _compare_neighbors(x.mT @ x, size)
    norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp(min=MIN_NORM)
    scores = products / norms[:, None]
    usable = valid.flatten(1)[:, None].to(b.dtype)
    weights = torch.softmax(SCALE * _fuse(scores, size) * usable, dim=-1) * usable
    return scores, norms, weights


def _compare_neighbors(t: Tensor, size: Sequence[int]) -> Tensor:
    """Turn products of pixels into products of 3x3 patches: sum over the 9 equal offsets of two positions."""
    return _diagonals(_diagonals(_split(t, size), (1, 3), (-1, 0, 1)), (2, 4), (-1, 0, 1)).flatten(3).flatten(1, 2)


def _fuse(t: Tensor, size: Sequence[int]) -> Tensor:
    """Sum over adjacent pairs of positions, in row-major and then in column-major order."""
    return _fuse_columns(_diagonals(t, (1, 2), (-1, 0, 1)), size)


def _fuse_bwd(t: Tensor, size: Sequence[int]) -> Tensor:
    """The transpose of `_fuse`: the same sums in the opposite order."""
    return _diagonals(_fuse_columns(t, size), (1, 2), (-1, 0, 1))


def _fuse_columns(t: Tensor, size: Sequence[int]) -> Tensor:
    by_columns = _split(t, size).permute(0, 2, 1, 4, 3)
    fused = _diagonals(by_columns.flatten(3).flatten(1, 2), (1, 2), (-1, 0, 1))
    return fused.view(by_columns.shape).permute(0, 2, 1, 4, 3).flatten(3).flatten(1, 2)


def _paste(weights: Tensor, values: Tensor) -> Tensor:
    """A quarter of the sum of overlapping 4x4 patches, each the mean of all patches of `values` by a row of weights."""
    y = torch.empty_like(values)
    for rows, columns, part in parities(values):
        shared = _diagonals(_diagonals(_split(weights, part.shape[2:]), (1, 3), rows), (2, 4), columns)
        mean = shared.flatten(3).flatten(1, 2) @ part.flatten(2).mT
        y[:, :, rows[1] > 0 :: 2, columns[1] > 0 :: 2] = 0.25 * mean.mT.view_as(part)
    return y


def _paste_bwd(dy: Tensor, values: Tensor) -> Tensor:
    """The gradient of `_paste` in the weights."""
    total: Any = 0
    for (rows, columns, part), (_, _, dpart) in zip(parities(values), parities(dy), strict=True):
        products = _split(dpart.flatten(2).mT @ part.flatten(2), part.shape[2:])
        rows, columns = [-d for d in rows], [-d for d in columns]
        total = total + _diagonals(_diagonals(products, (1, 3), rows), (2, 4), columns)
    return 0.25 * total.flatten(3).flatten(1, 2)


def parities(t: Tensor) -> list[tuple[Sequence[int], Sequence[int], Tensor]]:
    """The four images of pixels of equal parity, and the offsets between positions whose 4x4 patches share a pixel.

    Patch i covers pixels 2 i - 1 to 2 i + 2: pixel 2 i belongs to patches i and i - 1, pixel 2 i + 1 to i and i + 1.
    """
    return [((0, 2 * i - 1), (0, 2 * j - 1), t[:, :, i::2, j::2]) for i in (0, 1) for j in (0, 1)]


def _split(t: Tensor, size: Sequence[int]) -> Tensor:
    """Pairs of positions (B, L, L) as pairs of rows and columns (B, h, w, h, w)."""
    return t.reshape(t.shape[0], *size, *size)


def _diagonals(t: Tensor, dims: tuple[int, int], steps: Sequence[int]) -> Tensor:
    """Sum over `steps` of `t` with both indices shifted by the step, with zero padding."""
    total = torch.zeros_like(t)
    size = t.shape[dims[0]]
    for step in steps:
        count, to, source = size - abs(step), total, t
        for dim in dims:
            to, source = to.narrow(dim, max(0, -step), count), source.narrow(dim, max(0, step), count)
        to += source
    return total
