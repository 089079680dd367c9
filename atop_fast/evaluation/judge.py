"""The judge: forward passes of the caller's own model in float32, under draws keyed by their purpose."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.checks import check_fits, check_integer, check_logits, message
from .._core.precision import full_precision
from ..attacks import GradientEstimator, Model, draw_logits
from ..defense import Defense, check_model
from ..randomness import REPEATED_DRAWS, derive_seed, seeded, watched_generators
from .source import Source

# Number of images in the check that distinguishes deterministic from random models.
REPEATED_IMAGES = 256


class Judge:
    """Selection counts and verdict predictions of candidate images.

    Candidates are chosen by `selection_draws` draws keyed by derive_seed(seed, "selection"), and judged by `draws`
    draws keyed by derive_seed(seed, "verdict", candidate's name); attacks use derive_seed(seed, "attack"). No draw
    serves two of these purposes, so that neither the attack nor the choice can favor the draws of the verdict.

    Args:
        model: a Defense, whose draws are functions of (key, sample id, draw), or any callable from images to logits,
            whose draws are repeated calls; torch's generators are seeded for them and restored.
        seed: key of the evaluation.
        draws, selection_draws: numbers of draws; both become 1 for a deterministic model.
        max_batch: maximum number of images in one forward pass; None uses the attacks' limit, found by is_repeatable().

    Logits are computed in float32 (float64 for float64 images), without autocast and TF32, on the unmodified model.
    """

    def __init__(self, model: Model, seed: int, draws: int, selection_draws: int, max_batch: int | None = None) -> None:
        check_model("evaluate", model)
        self.model, self.seed = model, check_integer("evaluate", "seed", seed)
        self.draws = check_integer("evaluate", "draws", draws, low=1)
        self.selection_draws = check_integer("evaluate", "selection_draws", selection_draws, low=1)
        self.deterministic = False
        self.max_batch = None if max_batch is None else check_integer("evaluate", "max_batch", max_batch, low=1)

    def is_repeatable(self, source: Source) -> bool:
        """Whether the model gives equal logits (B, C, H, W) -> (B, classes) in all draws; raises if it cannot run.

        Three draws of each image, of which a Defense has REPEATED_DRAWS together at least; and as many of a model that
        draws from the global generators, as one call of it may draw for all images.
        """
        x = source.take(torch.arange(min(len(source), REPEATED_IMAGES)))[0]
        ids, seed = torch.arange(len(x), device=x.device), derive_seed(self.seed, "trial")
        key = (seed, ids[:1], 0) if isinstance(self.model, Defense) else ()
        # A model that does not fit its images should fail here, not after an hour.
        first = judged(x[:1])
        with check_fits("evaluate", "images", first, self.model), full_precision(x.device):
            with torch.no_grad(), seeded(seed, x.device), watched_generators() as generators:
                output = self.model(first, *key)
            check_logits("evaluate", output, 1, int(source.labels.max()))
            if isinstance(self.model, Defense):
                self._check_keyed(x[:8], ids[:8], seed)
            if self.max_batch is None:
                estimator = GradientEstimator(self.model, seed=seed)
                estimator.function = "evaluate"
                estimator.logits(first, ids[:1], ids[:1])
                self.max_batch = estimator.forward_rows
            # A few images suffice to detect most random models.
            parts = [(0, 8, 3), (8, REPEATED_IMAGES, 3)]
            if generators.drawn:
                parts.append((0, 8, REPEATED_DRAWS))
            elif isinstance(self.model, Defense) and 3 * len(ids) < REPEATED_DRAWS:
                parts.append((0, len(ids), -(-REPEATED_DRAWS // len(ids))))
            for begin, end, draws in parts:
                if len(part := ids[begin:end]):
                    logits = self.logits(x[part], part, seed, draws)
                    _check_finite(logits, "clean", part)
                    if not (logits == logits[:, :1]).all():
                        return False
        return True

    def _check_keyed(self, x: Tensor, ids: Tensor, seed: int) -> None:
        """Raise unless calls of a Defense with equal keys agree: a pass takes many draws, which must not share any."""
        logits = []
        for _ in range(3):
            with torch.no_grad(), seeded(seed, x.device):
                logits.append(self.model(judged(x), seed, ids, 0))
        # Sums of kernels on a GPU may be in another order.
        if any(not torch.allclose(other, logits[0], rtol=1e-3, atol=1e-3, equal_nan=True) for other in logits[1:]):
            expected = "a Defense whose logits are a function of the key and of the generators of torch, Python, numpy"
            given = "one that draws, or counts calls, otherwise: equal keys gave different logits"
            raise ValueError(message("evaluate", "model", expected, given))

    def collapse(self) -> None:
        """Use a single draw for both choice and verdict, because the model is deterministic."""
        self.draws = self.selection_draws = 1
        self.deterministic = True

    def __call__(self, name: str, x: Tensor, labels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Judge the images x (B, C, H, W) as the candidates `name` of the samples `ids`.

        Returns:
            "predictions" (B, draws), small integers: classes under the verdict's draws; "correct" (B,), int32, and
            "loss" (B,), float32: right selection draws and mean cross-entropy over them. On the CPU.
        """
        logits = self.logits(x, ids, derive_seed(self.seed, "selection"), self.selection_draws)
        _check_finite(logits, name, ids)
        target = labels[:, None].expand(logits.shape[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target).mean(dim=1)
        correct = (logits.argmax(dim=2) == target).sum(dim=1, dtype=torch.int32)
        # For a deterministic model, selection and verdict have the same draw.
        predictions = _pack(logits) if self.deterministic else self.predictions(name, x, labels, ids)
        return {"predictions": predictions, "correct": correct.cpu(), "loss": loss.cpu()}

    def predictions(self, name: str, x: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Classes (B, draws) of the images x under the verdict's draws of candidates `name`, on the CPU."""
        logits = self.logits(x, ids, derive_seed(self.seed, "verdict", name), self.draws)
        _check_finite(logits, name, ids)
        return _pack(logits)

    def logits(self, x: Tensor, ids: Tensor, key: int, draws: int) -> Tensor:
        """Logits (B, draws, classes), float32, of images x (B, C, H, W) under the draws 0 .. draws - 1 of `key`."""
        with full_precision(x.device):
            return draw_logits(self.model, judged(x), key, ids, range(draws), self.max_batch or 1024, "evaluate")


def judged(x: Tensor) -> Tensor:
    """Images in the dtype in which they are judged: float64 for float64, float32 otherwise."""
    return x if x.dtype == torch.float64 else x.float()


def eight_bit(images: Tensor, clean: Tensor, radius: float | None) -> Tensor:
    """Images (B, C, H, W) rounded to 8 bits, uint8.

    With a `radius`, to the nearest level in the Linf ball around `clean`, or to the nearest level if the ball has none.
    """
    levels = (255 * images.double()).round()
    if radius is not None:
        # The slack keeps a level that lies on the boundary of the ball up to float32 rounding.
        low, high = (255 * (clean.double() + s * (radius + 1e-6)) for s in (-1, 1))
        low, high = low.ceil(), high.floor()
        levels = torch.where(low <= high, levels.clamp(low, high), levels)
    return levels.clamp_(0, 255).to(torch.uint8)


def _pack(logits: Tensor) -> Tensor:
    """Predicted classes in the smallest type that holds them, on the CPU."""
    classes = logits.shape[2]
    dtype = torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
    return logits.argmax(dim=2).to(dtype).cpu()


def _check_finite(logits: Tensor, name: str, ids: Tensor) -> None:
    """Raise unless the logits (B, draws, classes) of the candidates `name` of the samples `ids` are finite."""
    if not (finite := torch.isfinite(logits).flatten(1).all(dim=1)).all():
        wrong = ids[~finite]
        given = (
            f"NaN or infinity for {len(wrong)} of {len(ids)} images {name!r}, the first of them images[{int(wrong[0])}]"
        )
        raise ValueError(message("evaluate", "model", "a callable with finite logits", given))
