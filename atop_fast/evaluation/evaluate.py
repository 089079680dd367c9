"""Robust evaluation: attack the whole defence, then judge the candidates on fresh randomness."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._checks import check_fits, check_images, check_integer, check_labels, check_not_empty, message
from .._files import describe, load_checkpoint, save_checkpoint
from ..attacks import FGSM, PGD, Model, draw_logits, frozen
from ..randomness import derive_seed
from .verdict import Verdict

Attack = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Report:
    """Verdicts of one model: without an attack, and under each attack."""

    clean: Verdict
    attacks: dict[str, Verdict]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"clean": V, "attacks": {name: V}}."""
        return {"clean": self.clean.to_dict(), "attacks": {k: v.to_dict() for k, v in self.attacks.items()}}


def quick_attacks(
    model: Model,
    norm: str = "Linf",
    eps: float = 8 / 255,
    seed: int = 0,
    gradient: str = "exact",
    steps: int = 20,
    eot_iter: int = 4,
    max_batch: int = 1024,
) -> dict[str, PGD]:
    """FGSM and PGD with EOT through the whole model: {"fgsm", "pgd<steps>_eot"}. See PGD for the arguments."""
    seed = derive_seed(seed, "attack")
    fgsm = FGSM(model, norm, eps, eot_iter, gradient, seed, max_batch)
    pgd = PGD(model, norm, eps, steps=steps, eot_iter=eot_iter, gradient=gradient, seed=seed, max_batch=max_batch)
    return {"fgsm": fgsm, f"pgd{steps}_eot": pgd}


def evaluate(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    attacks: Mapping[str, Attack] | None = None,
    norm: str = "Linf",
    eps: float = 8 / 255,
    seed: int = 0,
    draws: int = 20,
    batch_size: int = 100,
    max_batch: int = 1024,
    checkpoint: Path | None = None,
    title: str = "evaluate",
    progress: bool = True,
) -> Report:
    """Attack a model and judge it on draws that no attack has seen.

    Args:
        model: a Defense, or any callable from images (B, C, H, W) in [0, 1] to logits. The draws of a Defense are keyed
            by (seed, image index, draw), so that its verdict does not depend on `batch_size` beyond rounding; draws of
            another callable are repeated calls.
        x: float images (N, C, H, W) in [0, 1].
        y: int64 labels (N,).
        attacks: name -> attack(images, labels, sample_ids) returning adversarial images; default quick_attacks(model,
            norm, eps, seed).
        norm, eps: threat model of the default attacks; eps in units of [0, 1] pixels.
        seed: key of all randomness.
        draws: K, fresh draws of every verdict.
        batch_size: images attacked together.
        max_batch: most images in one forward pass.
        checkpoint: file written after every batch, from which an interrupted call goes on to the same report (for a
            Defense or a deterministic model; other randomness cannot be taken up where it was).
        title, progress: show a progress bar with the time left, under this title.

    Returns:
        A Report of a Verdict without attack and one for each attack.

    Raises:
        TypeError, ValueError: naming the argument that is wrong.
    """
    check_not_empty("evaluate", "x", check_images("evaluate", "x", x))
    check_labels("evaluate", "y", y, x)
    for name, value in (("draws", draws), ("batch_size", batch_size), ("max_batch", max_batch)):
        check_integer("evaluate", name, value, low=1)
    if attacks is None:
        attacks = quick_attacks(model, norm, eps, seed, max_batch=max_batch)
    if "clean" in attacks:
        raise ValueError(message("evaluate", "attacks", "named otherwise than the clean images", "'clean'"))
    # A model that does not fit its images should fail here, not after an hour.
    with frozen(model), check_fits("evaluate", "x", x):
        _check_logits(draw_logits(model, x[:1], 0, torch.zeros(1, dtype=torch.int64, device=x.device), range(1)), y)
    weights = model.state_dict().values() if isinstance(model, nn.Module) else ()
    # Functions show their address, which is another in every process.
    what = re.sub(r" at 0x[0-9a-f]+", "", f"{model!r} {dict(attacks)!r}")
    fingerprint = f"{what} {seed} {draws} {batch_size} {describe(x, y, *weights)}"
    done = load_checkpoint("evaluate", checkpoint, fingerprint) or {}
    predictions: dict[str, list[Tensor]] = {name: done.get(name, []) for name in ("clean", *attacks)}
    total = -(-len(x) // batch_size) * len(predictions)
    with tqdm(total=total, desc=title, disable=not progress) as bar, frozen(model):
        for name, parts in predictions.items():
            bar.set_postfix_str(name)
            key = derive_seed(seed, "verdict", name)
            bar.update(len(parts))
            for xb, yb, ids in list(_batches(x, y, batch_size))[len(parts) :]:
                candidate = attacks[name](xb, yb, ids) if name in attacks else xb
                logits = draw_logits(model, candidate, key, ids, range(draws), max_batch)
                _check_logits(logits, yb)
                parts.append(logits.argmax(dim=2).cpu())
                bar.update()
                if checkpoint is not None:
                    save_checkpoint(checkpoint, fingerprint, predictions)
    verdicts = {name: Verdict.from_predictions(torch.cat(parts), y.cpu()) for name, parts in predictions.items()}
    return Report(verdicts.pop("clean"), verdicts)


def _batches(x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for first in range(0, len(x), batch_size):
        part = slice(first, first + batch_size)
        yield x[part], y[part], torch.arange(len(x), device=x.device)[part]


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    if int(labels.max()) >= logits.shape[2]:
        expected = f"class indices below the model's {logits.shape[2]} logits"
        raise ValueError(message("evaluate", "y", expected, int(labels.max())))
    if not torch.isfinite(logits).all():
        raise ValueError(message("evaluate", "model", "a callable with finite logits", "NaN or infinity"))
