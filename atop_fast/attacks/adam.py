"""Adam (Kingma & Ba, ICLR 2015) on rows that are at different iterations."""

from __future__ import annotations

from torch import Tensor

from .ball import per_image

BETAS = (0.9, 0.999)
EPS = 1e-8


def adam_step(m: Tensor, v: Tensor, gradient: Tensor, updates: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """One update of every row, with torch.optim.Adam's formula.

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   step = lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + EPS)

    Args:
        m, v, gradient: (B, ...) of four dimensions.
        updates: int64 (B,), updates that a row has had before; n = updates + 1.

    Returns:
        The new m and v, and the step, to be subtracted in order to descend.
    """
    # Separate products and sums: fused ones round differently in the last elements of a vectorized loop, so that a
    # row's result would depend on its place in the batch.
    m = BETAS[0] * m + (1 - BETAS[0]) * gradient
    v = BETAS[1] * v + (1 - BETAS[1]) * (gradient * gradient)
    n = (updates + 1).double()
    rate, root = lr / (1 - BETAS[0] ** n), (1 - BETAS[1] ** n).sqrt()
    return m, v, per_image(rate).to(m.dtype) * m / (v.sqrt() / per_image(root).to(m.dtype) + EPS)
