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

from .._checks import message
from .._files import write_atomic
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
        modules, optimizers: everything that changes, by name.
        checkpoint: file written after every epoch, from which an interrupted call with the same `fingerprint` goes on
            to the same result; tensors and numbers only.
        fingerprint: the configuration, as text.
        progress: show a progress bar with the time left.

    Returns:
        The mean of every logged scalar, epoch by epoch.
    """
    fingerprint = f"{fingerprint}, images {tuple(images.shape)} {float(images.double().sum())}"
    # Read before resuming: a checkpoint holds the rate of its last step.
    rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
    history = _resume(checkpoint, fingerprint, modules, optimizers)
    batches = -(-len(images) // batch_size)
    total = batches * epochs
    with tqdm(total=total, initial=len(history) * batches, desc=title, unit="batch", disable=not progress) as bar:
        for epoch in range(len(history), epochs):
            order = permutation(len(images), derive_seed(seed, "order"), epoch).to(images.device)
            sums: dict[str, Tensor] = {}
            for i, ids in enumerate(order.split(batch_size)):
                for name, optimizer in optimizers.items():
                    for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
                        group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * (epoch * batches + i) / total))
                for key, value in step(images[ids], labels[ids], ids, epoch).items():
                    sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value.detach() * len(ids)
                bar.update()
            history.append({key: float(value) / len(images) for key, value in sums.items()})
            bar.set_postfix({key: f"{value:.3f}" for key, value in history[-1].items()})
            if checkpoint is not None:
                _save(checkpoint, fingerprint, history, modules, optimizers)
    for name, optimizer in optimizers.items():
        for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
            group["lr"] = rate
    return history


def _save(
    path: Path,
    fingerprint: str,
    history: History,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
) -> None:
    state = {
        "fingerprint": fingerprint,
        "history": history,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    }
    write_atomic(path, lambda p: torch.save(state, p))


def _resume(
    path: Path | None, fingerprint: str, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]
) -> History:
    """Load a checkpoint if there is one; the epochs it has behind it."""
    if path is None or not path.exists():
        return []
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError("it belongs to another configuration")
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
    except Exception as error:
        # torch.load raises several unrelated types on a damaged file; each means the same to the caller.
        expected = "a checkpoint of this run (delete it to start again)"
        raise ValueError(message("fit", "checkpoint", expected, f"{path}: {error}")) from error
    return list(state["history"])
