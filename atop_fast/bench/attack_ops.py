"""The cases of AutoAttack's ops: strided convolutions of networks, steps of FAB and candidates of Square."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..attacks import Square
from ..attacks.base import initial_state
from ..attacks.queue import Batch
from ..attacks.square import _tables
from ..ops import FrozenConv, _registry, square
from .harness import Case, gradient_in, op_case

# The package exports the function under the name of its module.
hyperplane_step = importlib.import_module("atop_fast.ops.hyperplane_step")
# Batch, channels, outputs, image size and kernel size; the stride is 2.
CONVOLUTIONS = ((128, 3, 24, 32, 3), (128, 24, 48, 16, 3), (128, 48, 96, 8, 3), (128, 1, 16, 32, 5))


def attack_op_cases(device: str) -> Iterator[Case]:
    """All cases; only CPUs have kernels."""
    if device != "cpu":
        return
    yield from _convolutions()
    for norm, size in (("Linf", 1024), ("Linf", 3072), ("L2", 1024), ("L2", 3072)):
        x, w, change = torch.rand(256, size), torch.randn(256, size), torch.randn(256)
        eager = functools.partial(hyperplane_step.formula, x, w, change, norm)
        ours = functools.partial(hyperplane_step.OP, x, w, change, norm == "L2")
        yield _case("hyperplane_step", "forward", f"256x{size}, {norm}", 3 * x.nbytes, (eager, ours))
    for norm, shape in (("Linf", (128, 3, 32, 32)), ("L2", (128, 1, 32, 32))):
        yield _square(norm, shape)


def _convolutions() -> Iterator[Case]:
    """Including the ReLU that follows; images in the layout of attacks, features in channels_last."""
    for batch, channels, outputs, size, taps in CONVOLUTIONS:
        convolution = nn.Conv2d(channels, outputs, taps, stride=2, padding=taps // 2).requires_grad_(False)
        convolution.to(memory_format=torch.channels_last)
        x = torch.rand(batch, channels, size, size)
        x = x.contiguous(memory_format=torch.channels_last) if channels > 3 else x
        functions: list[Callable[..., Tensor]] = [_clamped(convolution), FrozenConv(convolution, relu=True)]
        dy = torch.randn_like(functions[0](x))
        shape, nbytes = f"{batch}x{channels}x{size}x{size}, {taps}x{taps} to {outputs}", x.nbytes + dy.nbytes
        yield _case("frozen_conv", "forward", shape, nbytes, [functools.partial(f, x) for f in functions], True)
        both = [functools.partial(gradient_in, x, f, dy) for f in functions]
        yield _case("frozen_conv", "both", shape, 2 * nbytes, both, True)


def _clamped(convolution: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.relu(convolution(x))


def _square(norm: str, shape: Sequence[int]) -> Case:
    """One query in the middle of a run."""
    x0, labels = torch.rand(*shape), torch.arange(shape[0])
    x = (x0 + 0.02 * torch.randn_like(x0)).clamp(0, 1)
    attack = Square(nn.Identity(), norm, eps=1.0, n_queries=5000)
    state = initial_state(Batch(x0, labels, labels), x) | {"t": torch.full_like(labels, 1000)}
    _, _, drawn = next(attack._squares(0, state))
    shared = (x, x0, drawn.signs, drawn.rows, drawn.columns)
    text = "x".join(map(str, shape))
    if norm == "Linf":
        pair = [functools.partial(f, *shared, 8 / 255) for f in (square.square_linf, square.OP_LINF)]
        return _case("square_linf", "forward", text, 3 * x.nbytes, pair)
    bumps = _tables(norm, attack.p_init, shape[2], shape[3], x.device)[2]
    pair = [functools.partial(f, x, x0, *drawn, bumps, 1.5, True) for f in (square.square_bump, square.OP_BUMP)]
    return _case("square_bump", "forward", text, 3 * x.nbytes, pair)


def _case(
    op: str,
    direction: str,
    shape: str,
    nbytes: int,
    functions: Sequence[Callable[[], Tensor]],
    products: bool = False,
) -> Case:
    eager, ours = functions
    mine = {_registry.owner(op, "cpu"): ours}
    return op_case(f"{op} {direction}", shape, "float32", eager, mine, nbytes, 1e-4, products)
