"""Random transforms: destroy the perturbation before the purifier restores the image (AToP, section 3.1).

    x in [0,1] --(+ sigma * noise, clip)--> [0,1] --(2x - 1)--> [-1,1] --(* (1 - mask))--> [masked image, ones, mask]

RT1 masks, RT2 adds noise and masks, RT3 makes N copies whose masks are disjoint and cover the image together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._checks import check_float_tensor, check_integer, check_number, message
from .randomness import Tag, check_keys, random_normal, random_ranks


class RandomTransform(nn.Module):
    """Noise and block masks; the base of RT1, RT2 and RT3.

    Args:
        patch: side of the square mask blocks in pixels; must divide the height and the width of the images.
        mask_ratio: share of the blocks that is masked, in [0, 1]; the count round(ratio * blocks) is exact.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.
        shared_mask: all samples of a draw get one mask, as in AToP's public code.
    """

    copies = 1

    def __init__(self, patch: int, mask_ratio: float, sigma: float, shared_mask: bool) -> None:
        super().__init__()
        name = type(self).__name__
        self.patch = check_integer(name, "patch", patch, low=1)
        self.mask_ratio = check_number(name, "mask_ratio", mask_ratio, low=0, high=1)
        self.sigma = check_number(name, "sigma", sigma, low=0)
        self.shared_mask = bool(shared_mask)

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draws: int | Tensor = 0
    ) -> Tensor:
        """Corrupt images.

        Args:
            x: float images (B, C, H, W) in [0, 1], H and W divisible by `patch`.
            seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
            sample_ids: int64 (B,), the identity of every image; default 0..B-1.
            draws: which draw: an int in [0, 2**32), or int64 of shape () or (B,).

        Returns:
            (B * copies, C + 2, H, W): [masked image in [-1, 1], ones, mask (1 = masked)], the copies of a sample
            adjacent. Differentiable in `x`; equal (seed, sample id, draw) give equal randomness in any batch.

        Raises:
            TypeError, ValueError: naming the argument that is wrong.
        """
        name = type(self).__name__
        self._check(name, x)
        ids, draws = check_keys(name, len(x), x.device, seed, sample_ids, draws)
        if self.sigma:
            noise = random_normal(x.shape[1:], seed, ids, draws, Tag.NOISE)
            x = (x + self.sigma * noise.to(x.dtype)).clamp(0, 1)
        return self.apply_mask(x, self.masks(x, seed, ids, draws))

    def masks(self, x: Tensor, seed: int | Tensor, sample_ids: Tensor, draws: int | Tensor) -> Tensor:
        """The masks of `x` (B, C, H, W): (B, copies, H, W) of 0 and 1 (masked), in the dtype of `x`."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        if self.shared_mask:
            sample_ids = torch.zeros_like(sample_ids)
        ranks = random_ranks(rows * columns, seed, sample_ids, draws, Tag.MASK)
        blocks = self._select(ranks).to(x.dtype).unflatten(2, (rows, columns))
        return blocks.repeat_interleave(self.patch, dim=2).repeat_interleave(self.patch, dim=3)

    def apply_mask(self, x: Tensor, masks: Tensor) -> Tensor:
        """Purifier input (B * copies, C + 2, H, W) from images (B, C, H, W) in [0, 1] and masks (B, copies, H, W)."""
        image = ((2 * x - 1)[:, None] * (1 - masks)[:, :, None]).flatten(0, 1)
        mask = masks.flatten(0, 1)[:, None]
        return torch.cat((image, torch.ones_like(mask), mask), dim=1)

    def assemble(self, purified: Tensor, corrupted: Tensor) -> Tensor:
        """One image per sample (B, C, H, W) from the purifier's outputs (B * copies, C, H, W) and inputs."""
        return purified

    def extra_repr(self) -> str:
        return f"patch={self.patch}, mask_ratio={self.mask_ratio}, sigma={self.sigma}, shared_mask={self.shared_mask}"

    def _select(self, ranks: Tensor) -> Tensor:
        """Which blocks are masked: bool (B, copies, blocks) from the random ranks (B, blocks)."""
        return (ranks < round(self.mask_ratio * ranks.shape[1]))[:, None]

    def _check(self, name: str, x: Tensor) -> None:
        check_float_tensor(name, "x", x)
        if x.dim() != 4:
            raise ValueError(message(name, "x", "images of shape (B, C, H, W)", tuple(x.shape)))
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            expected = f"of a height and width divisible by patch={self.patch}"
            raise ValueError(message(name, "x", expected, f"{x.shape[2]} x {x.shape[3]}"))


class RT1(RandomTransform):
    """Random mask only. See RandomTransform for the arguments and the call."""

    def __init__(self, patch: int = 8, mask_ratio: float = 0.25, shared_mask: bool = False) -> None:
        super().__init__(patch, mask_ratio, 0.0, shared_mask)


class RT2(RandomTransform):
    """Gaussian noise, clip to [0, 1], random mask. See RandomTransform for the arguments and the call."""

    def __init__(
        self, patch: int = 8, mask_ratio: float = 0.25, sigma: float = 0.25, shared_mask: bool = False
    ) -> None:
        super().__init__(patch, mask_ratio, sigma, shared_mask)


class RT3(RandomTransform):
    """Noise, then N copies with disjoint masks that together cover the image; only completed pixels are kept.

    Args:
        patch, sigma, shared_mask: as in RandomTransform.
        copies: N, the number of masks; each masks floor or ceil of blocks / N blocks.
    """

    def __init__(self, patch: int = 8, copies: int = 4, sigma: float = 0.25, shared_mask: bool = False) -> None:
        copies = check_integer("RT3", "copies", copies, low=1)
        super().__init__(patch, 1 / copies, sigma, shared_mask)
        self.copies = copies

    def assemble(self, purified: Tensor, corrupted: Tensor) -> Tensor:
        """Every pixel from the copy in which it was masked: (B * N, C, H, W) -> (B, C, H, W)."""
        return (purified * corrupted[:, -1:]).unflatten(0, (-1, self.copies)).sum(dim=1)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, copies={self.copies}, sigma={self.sigma}, shared_mask={self.shared_mask}"

    def _select(self, ranks: Tensor) -> Tensor:
        groups = torch.arange(self.copies, device=ranks.device)[:, None]
        return (ranks % self.copies)[:, None] == groups


def build_transform(
    name: str, patch: int, mask_ratio: float, sigma: float, shared_mask: bool = False
) -> RandomTransform:
    """A transform by name (rt1, rt2, rt3) from one set of options; RT3 makes round(1 / mask_ratio) copies."""
    if name == "rt1":
        return RT1(patch, mask_ratio, shared_mask)
    if name == "rt2":
        return RT2(patch, mask_ratio, sigma, shared_mask)
    if name == "rt3":
        check_number("build_transform", "mask_ratio", mask_ratio, low=0.01, high=1)
        return RT3(patch, round(1 / mask_ratio), sigma, shared_mask)
    raise ValueError(message("build_transform", "name", "one of 'rt1', 'rt2', 'rt3'", repr(name)))
