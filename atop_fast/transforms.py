"""Random transforms, which destroy the perturbation before the purifier restores the image (AToP, section 3.1).

    x in [0,1] --(resize, + sigma * noise, clip)--> [0,1] --(2x - 1)--> [-1,1] --(mask)--> [masked image, ones, mask]

RT1 masks, RT2 adds noise and masks, and RT3 makes N noisy copies with disjoint masks that together cover the image.
RandomResizePad changes the size at random. All are thin modules over atop_fast.ops.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._core.checks import check_integer, check_number, message
from .ops import assemble, resize
from .ops._images import memory_format
from .ops.corrupt import check_x
from .ops.corrupt import run as run_corrupt
from .ops.mask_blocks import check_mask_ratio
from .ops.random_resize_pad import check_sizes, place, random_placement


class RandomTransform(nn.Module):
    """Base class of the random transforms: the interface that Defense and training require."""

    copies = 1

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """Corrupt images.

        Args:
            x: images (B, C, H, W), floats in [0, 1] or uint8 in 0..255.
            seed: 64-bit key of the randomness, an int or an int64 scalar tensor.
            sample_ids: int64 (B,), the identity of every image; default 0..B-1.
            draw: index of the draw: an int in [0, 2**32), or int64 of shape () or (B,).

        Returns:
            (B * copies, C + 2, H', W'): [masked image in [-1, 1], ones, mask (1 = masked)], with the copies of a sample
            adjacent; channels_last if `x` is. Differentiable in floating-point `x`. Equal (seed, sample id, draw) give
            equal randomness in any batch, so that calls without a key repeat the same masks and noise: a training loop
            of your own gives the images' sample_ids, and another draw in every epoch.

        Raises:
            TypeError, ValueError: naming the argument that is wrong.
        """
        raise NotImplementedError

    def target(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """The output of a perfect purifier for the same draw: (B * copies, C, H', W') in [-1, 1]."""
        raise NotImplementedError

    def assemble(self, purified: Tensor, corrupted: Tensor) -> Tensor:
        """One image per sample (B, C, H', W') from the purifier's outputs (B * copies, C, H', W') and inputs."""
        return purified

    def key(
        self, seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor
    ) -> tuple[int | Tensor, Tensor, int | Tensor]:
        """The key that a call with the given one uses; a Defense hands it to a classifier that draws."""
        return seed, sample_ids, draw

    def extra_repr(self) -> str:
        """The plain attributes: warnings, checkpoints and runs tell transforms with other options apart by them."""
        plain = (bool, int, float, str, tuple, list, type(None))
        own = {
            k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training" and isinstance(v, plain)
        }
        return ", ".join(f"{key}={value}" for key, value in own.items())


class FixedRandomness(RandomTransform):
    """A transform whose every draw is draw 0 of `seed`: each sample keeps its mask and its noise.

    Args:
        transform: the random transform.
        seed: key of the only draw.
    """

    def __init__(self, transform: RandomTransform, seed: int) -> None:
        super().__init__()
        self.transform, self.seed, self.copies = transform, seed, transform.copies

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.forward; seed and draw are not used."""
        return self.transform(x, self.seed, sample_ids, 0)

    def target(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.target; seed and draw are not used."""
        return self.transform.target(x, self.seed, sample_ids, 0)

    def assemble(self, purified: Tensor, corrupted: Tensor) -> Tensor:
        """See RandomTransform.assemble."""
        return self.transform.assemble(purified, corrupted)

    def key(self, seed: int | Tensor, sample_ids: Tensor, draw: int | Tensor) -> tuple[int | Tensor, Tensor, int]:
        """See RandomTransform.key; seed and draw are not used."""
        return self.seed, sample_ids, 0

    def extra_repr(self) -> str:
        return f"seed={self.seed}"


class _BlockMask(RandomTransform):
    """Noise and block masks: the base class of RT1, RT2 and RT3.

    Args:
        patch: side of the square mask blocks in pixels; must divide the height and the width of the (resized) images.
        mask_ratio: share of masked blocks, in [0, 1]; exactly round(ratio * blocks) blocks are masked. With two numbers
            (low, high), every sample and draw gets its own count, uniformly distributed between their counts.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.
        size: resize the images bilinearly to (H', W') first; an int means a square, None keeps the size.
        shared_mask: use the same mask for all samples of a draw, as in AToP's public code.
    """

    def __init__(
        self,
        patch: int,
        mask_ratio: float | tuple[float, float],
        sigma: float,
        size: int | tuple[int, int] | None,
        shared_mask: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.patch = check_integer(name, "patch", patch, low=1)
        self.mask_ratio = check_mask_ratio(name, mask_ratio)
        self.sigma = check_number(name, "sigma", sigma, low=0)
        self.size = _check_size(name, size)
        self.shared_mask = bool(shared_mask)

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.forward."""
        ratio = self.mask_ratio if self.copies == 1 else 1.0
        options = (self.patch, ratio, self.sigma, self.copies, self.size, self.shared_mask, None, False)
        return run_corrupt(type(self).__name__, x, options, (seed, sample_ids, draw))

    def target(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.target."""
        x = _as_float(x)
        resized = x if self.size in (None, tuple(x.shape[2:])) else resize(x, self.size)
        return (2 * resized - 1).repeat_interleave(self.copies, dim=0)

    def extra_repr(self) -> str:
        number = f"mask_ratio={self.mask_ratio}" if self.copies == 1 else f"copies={self.copies}"
        size = f", size={self.size}" if self.size else ""
        return f"patch={self.patch}, {number}, sigma={self.sigma}{size}, shared_mask={self.shared_mask}"


class RT1(_BlockMask):
    """Random mask only.

    Args:
        patch: side of the square mask blocks in pixels; must divide the height and the width of the (resized) images.
        mask_ratio: share of masked blocks, in [0, 1]; exactly round(ratio * blocks) blocks are masked. With two numbers
            (low, high), every sample and draw gets its own count, uniformly distributed between their counts.
        size: resize the images bilinearly to (H', W') first; an int means a square, None keeps the size.
        shared_mask: use the same mask for all samples of a draw, as in AToP's public code.

    Calls are documented in RandomTransform.forward.
    """

    def __init__(
        self,
        patch: int = 8,
        mask_ratio: float | tuple[float, float] = 0.25,
        size: int | tuple[int, int] | None = None,
        shared_mask: bool = False,
    ) -> None:
        super().__init__(patch, mask_ratio, 0.0, size, shared_mask)


class RT2(_BlockMask):
    """Gaussian noise, clip to [0, 1], random mask.

    Args:
        patch, mask_ratio, size, shared_mask: as in RT1.
        sigma: standard deviation of the noise, in units of [0, 1] pixels.

    Calls are documented in RandomTransform.forward.
    """

    def __init__(
        self,
        patch: int = 8,
        mask_ratio: float | tuple[float, float] = 0.25,
        sigma: float = 0.25,
        size: int | tuple[int, int] | None = None,
        shared_mask: bool = False,
    ) -> None:
        super().__init__(patch, mask_ratio, sigma, size, shared_mask)


class RT3(_BlockMask):
    """N noisy copies with disjoint masks that together cover the image; only restored pixels are kept.

    Args:
        patch, sigma, size, shared_mask: as in RT1 and RT2.
        copies: N, the number of copies; each mask covers floor or ceil of blocks / N blocks.

    Calls are documented in RandomTransform.forward.
    """

    def __init__(
        self,
        patch: int = 8,
        copies: int = 4,
        sigma: float = 0.25,
        size: int | tuple[int, int] | None = None,
        shared_mask: bool = False,
    ) -> None:
        copies = check_integer("RT3", "copies", copies, low=1, high=255)
        super().__init__(patch, 1 / copies, sigma, size, shared_mask)
        self.copies = copies

    def assemble(self, purified: Tensor, corrupted: Tensor) -> Tensor:
        """Take every block from the copy in which it was masked: (B * N, C, H', W') -> (B, C, H', W')."""
        if self.copies == 1:
            return purified
        # One pixel of every block tells which copy masked it.
        masks = corrupted[:, -1, :: self.patch, :: self.patch].unflatten(0, (-1, self.copies))
        return assemble(purified, masks.flatten(2).argmax(dim=1).to(torch.uint8), self.patch)


class RandomResizePad(RandomTransform):
    """Random resizing and random placement in a gray frame (Xie et al., ICLR 2018).

    Args:
        min_size: smallest side s of the resized image, which is s x s pixels.
        max_size: largest side, and side of the frame.

    Calls are documented in RandomTransform.forward. In the padding around the image, the mask is 1 and the image is 0,
    which is mid-gray. uint8 images are divided by 255.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        check_sizes("RandomResizePad", min_size, max_size)
        self.min_size, self.max_size = min_size, max_size

    def forward(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.forward."""
        check_x("RandomResizePad", x)
        image, outside = self._place(x, seed, sample_ids, draw)
        mask = outside.to(image.dtype)
        corrupted = torch.cat((image, torch.ones_like(mask), mask), dim=1)
        return corrupted.contiguous(memory_format=memory_format(x))

    def target(
        self, x: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """See RandomTransform.target."""
        return self._place(x, seed, sample_ids, draw)[0]

    def extra_repr(self) -> str:
        return f"min_size={self.min_size}, max_size={self.max_size}"

    def _place(
        self, x: Tensor, seed: int | Tensor, sample_ids: Tensor | None, draw: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """The images in [-1, 1] in their frames, and the mask of the padding, bool (B, 1, H', W')."""
        x = _as_float(x)
        name, frame = type(self).__name__, self.max_size
        placement = random_placement(name, x, self.min_size, frame, seed, sample_ids, draw)
        axis = torch.arange(frame, device=x.device)
        side = placement.side[:, None]
        rows, columns = (
            (axis >= offset[:, None]) & (axis < offset[:, None] + side) for offset in (placement.top, placement.left)
        )
        return place(2 * x - 1, placement, frame), ~(rows[:, :, None] & columns[:, None, :])[:, None]


def build_transform(
    name: str,
    patch: int,
    mask_ratio: float | tuple[float, float],
    sigma: float,
    shared_mask: bool = False,
    size: int | tuple[int, int] | None = None,
) -> RandomTransform:
    """Build a transform by name (rt1, rt2, rt3) from one set of options; RT3 makes round(1 / mask_ratio) copies."""
    if name == "rt1":
        return RT1(patch, mask_ratio, size, shared_mask)
    if name == "rt2":
        return RT2(patch, mask_ratio, sigma, size, shared_mask)
    if name == "rt3":
        ratio = check_number("build_transform", "mask_ratio", mask_ratio, low=0.01, high=1)
        return RT3(patch, round(1 / ratio), sigma, size, shared_mask)
    raise ValueError(message("build_transform", "name", "one of 'rt1', 'rt2', 'rt3'", repr(name)))


# Users may register transforms here, so that files can refer to them by name. The attributes of a transform must be
# named like the parameters of its constructor.
TRANSFORMS: dict[str, type[RandomTransform]] = {
    "rt1": RT1,
    "rt2": RT2,
    "rt3": RT3,
    "random_resize_pad": RandomResizePad,
}
# Upper limit for numbers in a description: a file with larger ones could exhaust the memory of any machine.
MAX_SIDE = 2**14


def describe_transform(transform: RandomTransform) -> dict[str, Any]:
    """The JSON-ready description of a transform for files: its name in TRANSFORMS and its constructor's parameters.

    A transform of an unregistered class is described by its repr, which is enough to compare two of them.
    """
    for name, kind in TRANSFORMS.items():
        if type(transform) is kind:
            values = {key: getattr(transform, key) for key in inspect.signature(kind).parameters}
            return json.loads(json.dumps({"name": name, **values}))
    return {"name": type(transform).__name__, "shown": repr(transform)}


def restore_transform(description: Mapping[str, Any]) -> RandomTransform:
    """Build the transform that describe_transform described; ValueError or TypeError if it is not in TRANSFORMS."""
    if not isinstance(description, Mapping) or description.get("name") not in list(TRANSFORMS):
        expected = f"a description of one of {', '.join(map(repr, TRANSFORMS))}"
        raise ValueError(message("restore_transform", "description", expected, description))
    options = {key: value for key, value in description.items() if key != "name"}
    for value in options.values():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not abs(number) <= MAX_SIDE:
                raise ValueError(message("restore_transform", "description", f"of numbers <= {MAX_SIDE}", number))
    return TRANSFORMS[description["name"]](**options)


def show_transform(description: Mapping[str, Any]) -> str:
    """A described transform as its repr, also one of an unregistered class."""
    return str(description["shown"] if "shown" in description else restore_transform(description))


def _as_float(x: Tensor) -> Tensor:
    return x.float() / 255 if x.dtype == torch.uint8 else x


def _check_size(name: str, size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return check_integer(name, "size", height, low=1), check_integer(name, "size", width, low=1)
