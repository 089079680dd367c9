"""The loop under every training: data order, learning rate, progress, and checkpoints that resume exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from .._files import describe, load_checkpoint, save_checkpoint
from ..randomness import derive_seed, permutation

Step = Callable[[Tensor, Tensor, Tensor, int], Mapping[str, Tensor]]
History = list[dict[str, float]]


def fit(
    title: str,
    step: Step,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    scalers: Mapping[str, torch.amp.GradScaler] | None = None,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    progress: bool = True,
) -> History:
    """Run `step` over shuffled batches; the learning rate falls to 0 along half a cosine.

    Args:
        title: name on the progress bar.
        step: step(images, labels, sample_ids, epoch) updates the modules and returns scalars to log.
        images, labels: the data (N, C, H, W) and (N,).
        epochs, batch_size: length; the last batch of an epoch may be smaller.
        seed: key of the data order.
        modules, optimizers, scalers: everything that changes, by name.
        checkpoint: file written after every epoch, from which an interrupted call with the same `fingerprint` goes on
            to the same result; tensors and numbers only.
        fingerprint: what else the result depends on, as text; the data, the first weights, `epochs`, `batch_size` and
            `seed` are added to it.
        progress: show a progress bar with the time left.

    Returns:
        The mean of every logged scalar, epoch by epoch.
    """
    weights = [value for module in modules.values() for value in module.state_dict().values()]
    fingerprint = f"{fingerprint} {epochs} {batch_size} {seed} {describe(images, labels, *weights)}"
    # Read before resuming: a checkpoint holds the rate of its last step.
    rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}

    def set_rates(factor: float) -> None:
        for name, optimizer in optimizers.items():
            for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
                group["lr"] = rate * factor

    parts: dict[str, Any] = {
        **modules,
        **{f"optimizer of {name}": optimizer for name, optimizer in optimizers.items()},
        **{f"scaler of {name}": scaler for name, scaler in (scalers or {}).items()},
    }
    history: History = []
    if state := load_checkpoint("fit", checkpoint, fingerprint):
        history = state["history"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    batches = -(-len(images) // batch_size)
    total = batches * epochs
    with tqdm(total=total, initial=len(history) * batches, desc=title, unit="batch", disable=not progress) as bar:
        for epoch in range(len(history), epochs):
            order = permutation(len(images), derive_seed(seed, "order"), epoch).to(images.device)
            sums: dict[str, Tensor] = {}
            for i, ids in enumerate(order.split(batch_size)):
                set_rates(0.5 * (1 + math.cos(math.pi * (epoch * batches + i) / total)))
                for key, value in step(images[ids], labels[ids], ids, epoch).items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach() * len(ids)
                bar.update()
            history.append({key: float(value) / len(images) for key, value in sums.items()})
            bar.set_postfix({key: f"{value:.3f}" for key, value in history[-1].items()})
            if checkpoint is not None:
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(checkpoint, fingerprint, {"history": history, **states})
    set_rates(1)
    return history
