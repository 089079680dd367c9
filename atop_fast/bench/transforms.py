"""Benchmark cases of the random transforms, and the plain formulations to which they are compared."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import _registry
from .harness import Case, Quality, by_backend, gradient_in, owned

# Functions that are not ops, and the op on which they are based.
OPS = {"random_resize_pad": "resample"}
Function = Callable[[Tensor], Tensor]

SIGMA, RATIO = 0.25, 0.25
# Images, side of a block, and the size after resizing.
CORRUPT = (
    ((64, 3, 32, 32), 8, None),
    ((64, 3, 256, 256), 32, None),
    ((64, 3, 32, 32), 32, (256, 256)),
)


def plain_masks(batch: int, rows: int, columns: int, patch: int, like: Tensor) -> Tensor:
    """Exactly RATIO of the blocks of every image, (B, 1, H, W)."""
    blocks = rows * columns
    chosen = torch.rand(batch, blocks, device=like.device).argsort(dim=1) < round(RATIO * blocks)
    mask = chosen.view(batch, 1, rows, columns).to(like.dtype)
    return mask.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def plain(x: Tensor, patch: int, size: tuple[int, int] | None) -> Tensor:
    """The transform as a user would write it in PyTorch."""
    if size:
        x = F.interpolate(x, size, mode="bilinear")
    image = (x + SIGMA * torch.randn_like(x)).clamp(0, 1) * 2 - 1
    mask = plain_masks(len(x), x.shape[2] // patch, x.shape[3] // patch, patch, x)
    return torch.cat((image * (1 - mask), torch.ones_like(mask), mask), dim=1)


def with_torchvision(x: Tensor, patch: int, size: tuple[int, int] | None) -> Tensor:
    """The same with torchvision's transforms v2, which have no block masks."""
    from torchvision.transforms.v2 import functional as vision

    if size:
        x = vision.resize(x, list(size), antialias=False)
    x = vision.gaussian_noise(x, sigma=SIGMA, clip=True)
    image = vision.normalize(x, [0.5] * x.shape[1], [0.5] * x.shape[1])
    mask = plain_masks(len(x), x.shape[2] // patch, x.shape[3] // patch, patch, x)
    return torch.cat((image * (1 - mask), torch.ones_like(mask), mask), dim=1)


def with_kornia(x: Tensor, patch: int, size: tuple[int, int] | None) -> Tensor:
    """The same with kornia's augmentations, as far as possible."""
    from kornia import augmentation, enhance, geometry

    if size:
        x = geometry.resize(x, size, interpolation="bilinear")
    image = augmentation.RandomGaussianNoise(std=SIGMA, p=1.0)(x).clamp(0, 1)
    image = enhance.normalize(image, torch.full((3,), 0.5, device=x.device), torch.full((3,), 0.5, device=x.device))
    mask = plain_masks(len(x), x.shape[2] // patch, x.shape[3] // patch, patch, x)
    return torch.cat((image * (1 - mask), torch.ones_like(mask), mask), dim=1)


def plain_resize_pad(x: Tensor, low: int, high: int) -> Tensor:
    """Random resizing and padding as a user would write it, image by image."""
    images = []
    for image in x.split(1):
        side = int(torch.randint(low, high + 1, ()))
        top, left = (int(torch.randint(0, high - side + 1, ())) for _ in range(2))
        resized = F.interpolate(image, (side, side), mode="bilinear")
        images.append(F.pad(resized, (left, high - side - left, top, high - side - top)))
    return torch.cat(images)


def transform_cases(device: str) -> Iterator[Case]:
    """All cases; ours is the public function, in every backend that has a kernel."""
    for make in (_corrupt_cases, _normal_cases, _mask_cases, _assemble_cases, _resize_cases, _place_cases):
        yield from make(device)


def keys(batch: int, device: str) -> dict[str, Tensor]:
    """The key as tensors, as an attack passes it."""
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return {"seed": zero, "sample_ids": torch.arange(batch, device=device), "draw": zero}


def _corrupt_cases(device: str) -> Iterator[Case]:
    for shape, patch, size in CORRUPT:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.rand(shape, device=device).to(dtype)
            ours = functools.partial(
                ops.corrupt, patch=patch, size=size, mask_ratio=RATIO, sigma=SIGMA, **keys(len(x), device)
            )
            formulations = {"eager": plain, "torchvision": with_torchvision, "kornia": with_kornia}
            peers = {name: functools.partial(f, patch=patch, size=size) for name, f in formulations.items()}
            pixels = len(x) * (size or shape[2:])[0] * (size or shape[2:])[1] * x.element_size()
            # Forward writes C + 2 channels; backward reads C of them and writes the gradient of the images.
            yield _case("corrupt", x, size, x.nbytes + 5 * pixels, ours, peers, both=False)
            yield _case("corrupt", x, size, 2 * x.nbytes + 8 * pixels, ours, peers, both=True)
            if dtype == torch.float32:
                # Recompute the noise instead of saving one bit per element.
                again = functools.partial(ours, recompute=True)
                yield _case("corrupt_live", x, size, 3 * x.nbytes + 8 * pixels, again, peers, both=True)


def _normal_cases(device: str) -> Iterator[Case]:
    for shape in ((64, 3, 32, 32), (64, 3, 256, 256)):
        x = torch.empty(shape, device=device)

        def ours(x: Tensor, key: dict[str, Tensor] = keys(len(x), device)) -> Tensor:  # noqa: B008
            return ops.random_normal(x.shape[1:], **key)

        yield _case("random_normal", x, None, x.nbytes, ours, {"eager": torch.randn_like}, both=False)


def _mask_cases(device: str) -> Iterator[Case]:
    for shape in ((64, 64), (64, 1024)):
        x = torch.empty(shape, device=device)

        def ours(x: Tensor, key: dict[str, Tensor] = keys(len(x), device)) -> Tensor:  # noqa: B008
            return ops.mask_blocks(x.shape[1], round(RATIO * x.shape[1]), **key)

        def eager(x: Tensor) -> Tensor:
            return torch.rand_like(x).argsort(dim=1) < round(RATIO * x.shape[1])

        yield _case("mask_blocks", x, None, x.numel(), ours, {"eager": eager}, both=False)


def _assemble_cases(device: str) -> Iterator[Case]:
    # The package exports the function under the name of its module.
    formula = importlib.import_module("atop_fast.ops.assemble").formula
    for shape, patch in (((256, 3, 32, 32), 8), ((64, 3, 256, 256), 32)):
        x = torch.rand(shape, device=device)
        count = (shape[2] // patch) * (shape[3] // patch)
        blocks = ops.mask_blocks(count, count, **keys(len(x) // 4, device), copies=4)
        options = {"blocks": blocks, "patch": patch}
        ours, eager = (functools.partial(f, **options) for f in (ops.assemble, formula))
        yield _case("assemble", x, None, x.nbytes // 2, ours, {"eager": eager}, both=False)
        yield _case("assemble", x, None, x.nbytes * 7 // 4, ours, {"eager": eager}, both=True)


def _resize_cases(device: str) -> Iterator[Case]:
    for shape, size, antialias in (((64, 3, 32, 32), (256, 256), False), ((16, 3, 256, 256), (128, 128), True)):
        x = torch.rand(shape, device=device)
        ours = functools.partial(ops.resize, size=size, antialias=antialias)
        eager = functools.partial(F.interpolate, size=size, mode="bilinear", antialias=antialias)
        nbytes = x.nbytes + x.nbytes // (shape[2] * shape[3]) * size[0] * size[1]
        yield _case("resample", x, size, nbytes, ours, {"eager": eager}, both=False)
        yield _case("resample", x, size, 2 * nbytes, ours, {"eager": eager}, both=True)


def _place_cases(device: str) -> Iterator[Case]:
    for shape, low, high in (((64, 3, 32, 32), 32, 40), ((16, 3, 224, 224), 224, 256)):
        x = torch.rand(shape, device=device)
        ours = functools.partial(ops.random_resize_pad, min_size=low, max_size=high, **keys(len(x), device))
        eager = functools.partial(plain_resize_pad, low=low, high=high)
        nbytes = x.nbytes + x.nbytes // (shape[2] * shape[3]) * high * high
        yield _case("random_resize_pad", x, (high, high), nbytes, ours, {"eager": eager}, both=False)
        yield _case("random_resize_pad", x, (high, high), 2 * nbytes, ours, {"eager": eager}, both=True)


def _case(
    op: str,
    x: Tensor,
    size: tuple[int, int] | None,
    nbytes: int,
    ours: Function,
    peers: Mapping[str, Function],
    both: bool,
) -> Case:
    """A case whose functions take `x`; `both` adds the backward pass, by autograd for everyone."""
    device = x.device.type
    functions = {**peers, "compile": torch.compile(peers["eager"]), "ours": ours}
    if both:
        dy = torch.randn_like(ours(x))
        functions = {name: functools.partial(gradient_in, function=f, dy=dy) for name, f in functions.items()}
    shape = "x".join(map(str, x.shape)) + (f" to {size[0]}x{size[1]}" if size else "")
    run = {name: functools.partial(f, x) for name, f in functions.items()}
    mine = by_backend(OPS.get(op, op), device, run.pop("ours"))
    dtype = str(x.dtype).removeprefix("torch.")

    def judge(outputs: dict[str, Any]) -> Quality:
        # The peers draw other random numbers, so their results cannot be compared.
        found = {}
        for name in mine:
            with owned(name, device):
                found[name] = {"difference": check(x, ours, both)}
        return found

    name = f"{op} {'both' if both else 'forward'}"
    return Case("ops", name, shape, dtype, {**run, **mine}, list(mine), nbytes, judge=judge)


def check(x: Tensor, ours: Function, both: bool) -> float:
    """The difference from the specification, which must be 0 in every bit, including gradients."""
    dy = torch.randn_like(ours(x)) if both else None
    run = functools.partial(gradient_in, x, ours, dy) if both else functools.partial(ours, x)
    found = run()
    with _registry.owned_by("eager", list(_registry.OPS), x.device.type):
        expected = run()
    if not torch.equal(found, expected):
        raise AssertionError(f"{ours}: not equal to the specification")
    return 0.0
