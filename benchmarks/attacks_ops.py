"""The cases of the attacks' ops: what is measured, and the plain formulations it is measured against."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch
from _harness import Case
from torch import Tensor

from atop_fast import ops

# The package exports the function under the name of its module.
attack_loss = importlib.import_module("atop_fast.ops.attack_loss")


def attack_loss_cases(device: str) -> Iterator[Case]:
    """Losses and gradients of a batch; ours is the public function, in the backend that the dispatcher calls."""
    for loss, targeted in (("ce", False), ("margin", False), ("dlr", False), ("dlr", True)):
        for classes in (10, 100, 1000):
            z = torch.randn(512, classes, device=device)
            labels, targets = torch.randint(classes, (2, 512), device=device)
            yield _case(loss, z, labels, targets if targeted else None)


def plain(z: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """By autograd, as attacks are written."""
    leaf = z.detach().requires_grad_()
    losses = attack_loss.formula(leaf, labels, targets, kind)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses, gradient


def _case(loss: str, z: Tensor, labels: Tensor, targets: Tensor | None) -> Case:
    kind = attack_loss.LOSSES.index(loss)
    ours = functools.partial(ops.attack_loss, z, labels, loss, targets)
    eager = functools.partial(plain, z, labels, targets, kind)
    compiled = torch.compile(functools.partial(attack_loss.formula, labels=labels, targets=targets, kind=kind))

    def compile_() -> tuple[Tensor, Tensor]:
        leaf = z.detach().requires_grad_()
        losses = compiled(leaf)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return losses, gradient

    def check() -> None:
        torch.testing.assert_close(ours()[:2], eager())

    layout = loss + ("" if targets is None else " targets")
    run = {"eager": eager, _owner(z): ours, "compile": compile_}
    return Case("attack_loss", "both", "x".join(map(str, z.shape)), z.dtype, layout, 2 * z.nbytes, run, check)


def _owner(z: Tensor) -> str:
    return ops._registry.owner("attack_loss", z.device.type)
