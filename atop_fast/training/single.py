"""Single-image passes, which leave some batch-norm layers with a single value per channel and thus no statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._core.checks import message


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[list[str]]:
    """Collect the names of batch-norm layers that see one value per channel in the single-image pass of the block."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs[0].numel() == inputs[0].shape[1]:
                found.append(name)

        return see

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_passes(layers: list[str], images: int, batch_size: int, accumulate: int, processes: int) -> None:
    """Raise ValueError if a training would run a single-image pass through layers that need more.

    Args:
        layers: the names that `watched` collected.
        images: number of images in an epoch.
        batch_size, accumulate: as in TrainingConfig.
        processes: number of processes that share each batch.
    """
    if not layers:
        return
    for size in {min(batch_size, images), images % batch_size} - {0}:
        part = max(1, size // processes)
        if part // min(accumulate, part) < 2:
            expected = f"such that every pass has two images, as batch norm ({layers[0]}) needs"
            given = f"{batch_size}, which leaves {size} of {images} images for {processes} x {accumulate} passes"
            raise ValueError(message("fit", "batch_size", expected, given))
