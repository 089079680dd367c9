"""Standard training of a classifier on clean images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_images, check_integer, check_labels, check_not_empty, check_number
from .engine import History, fit


def train_classifier(
    classifier: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> History:
    """Minimise the cross-entropy with Adam; changes `classifier` in place and leaves it in evaluation mode.

    Args:
        classifier: maps images (B, C, H, W) in [0, 1] to logits.
        images: float (N, C, H, W) in [0, 1].
        labels: int64 (N,).
        epochs, batch_size, lr: length, images a step, and Adam's first learning rate (it falls along a cosine).
        seed: key of the data order.
        checkpoint: see atop_fast.training.fit.
        progress: show a progress bar.

    Returns:
        Mean loss and training accuracy of every epoch.
    """
    check_not_empty("train_classifier", "images", check_images("train_classifier", "images", images))
    check_labels("train_classifier", "labels", labels, images)
    check_integer("train_classifier", "epochs", epochs, low=0)
    check_integer("train_classifier", "batch_size", batch_size, low=1)
    check_number("train_classifier", "lr", lr, low=0)
    optimizer = torch.optim.Adam(classifier.parameters(), lr=lr)

    def step(x: Tensor, y: Tensor, ids: Tensor, epoch: int) -> Mapping[str, Tensor]:
        logits = classifier(x)
        loss = F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "accuracy": (logits.argmax(dim=1) == y).float().mean()}

    classifier.train()
    history = fit(
        "classifier",
        step,
        images,
        labels,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        modules={"classifier": classifier},
        optimizers={"classifier": optimizer},
        checkpoint=checkpoint,
        fingerprint=f"classifier {lr}",
        progress=progress,
    )
    classifier.eval()
    return history
