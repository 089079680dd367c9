"""Benchmark cases of the ops of attacks, and the plain formulations to which they are compared."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from .harness import Case, Function, by_backend, same_as_baseline

# The package exports the function under the name of its module.
attack_loss = importlib.import_module("atop_fast.ops.attack_loss")


def attack_loss_cases(device: str) -> Iterator[Case]:
    """Losses and gradients of a batch; ours is the public function, in every backend that has a kernel."""
    for loss, targeted in (("ce", False), ("margin", False), ("dlr", False), ("dlr", True), ("pm", False)):
        for classes in (10, 100, 1000):
            z = torch.randn(512, classes, device=device)
            labels, targets = torch.randint(classes, (2, 512), device=device)
            yield _case(loss, z, labels, targets if targeted else None)


def plain(z: Tensor, labels: Tensor, targets: Tensor | None, kind: int) -> tuple[Tensor, Tensor]:
    """By autograd, as attacks are usually written."""
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

    def mine() -> tuple[Tensor, Tensor]:
        result = ours()
        return result.losses, result.gradient

    kinds = loss + ("" if targets is None else " targets")
    shape = "x".join(map(str, z.shape)) + f", {kinds}"
    variants = by_backend("attack_loss", z.device.type, mine)
    run: dict[str, Function] = {"eager": eager, **variants, "compile": compile_}
    judge = same_as_baseline(list(variants), 1e-5)
    return Case("ops", "attack_loss both", shape, "float32", run, list(variants), 2 * z.nbytes, judge=judge)
