"""Defense: random transform, purifier and classifier as one module from images to logits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._core.checks import message
from .randomness import check_keys
from .transforms import FixedRandomness, RandomTransform, describe_transform, show_transform


def check_model(function: str, model: object) -> None:
    """Raise TypeError unless `model` can be called.

    A Defense inside DataParallel, DDP or torch.compile, which would drop its draws' keys, is refused, too.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):
        name = model.__name__
        raise TypeError(message(function, "model", f"an instance, {name}(...)", f"the class {name}"))
    if not callable(model):
        given = type(model).__name__
        if isinstance(model, (str, os.PathLike)):
            given += "; atop_fast.load_classifier and load_defense read files"
        elif isinstance(model, Mapping):
            given += "; a state dict belongs into its network, by load_state_dict"
        raise TypeError(message(function, "model", "a callable from images to logits", given))
    inner = getattr(model, "module", getattr(model, "_orig_mod", None))
    if isinstance(inner, Defense) and not isinstance(model, Defense):
        expected = "a Defense itself (give model.module, or compile its networks; torchrun shares out the images)"
        raise TypeError(message(function, "model", expected, f"a {type(model).__name__} around one"))


class Defense(nn.Module):
    """images in [0, 1] -> transform -> purifier -> classifier -> logits.

    Args:
        transform: a RandomTransform.
        purifier: maps (B, C + 2, H, W) = [masked image in [-1, 1], ones, mask] to images (B, C, H, W) in [-1, 1];
            None passes the masked image on.
        classifier: maps images (B, C, H, W) in [0, 1] to logits (B, classes), normalization inside. One with an
            attribute `keyed` = True draws numbers of its own, and is called with the key: (images, seed, sample_ids,
            draw); see atop_fast.defenses.

    Without a key, every call takes the next draw of a counter, so that repeated calls differ, as for an attacker of a
    deployed system; torch's global generator is not used. With a key, the result is a function of (seed, sample id,
    draw) alone.

    A purifier that was trained or loaded from a file remembers its transform; a different one here causes a warning.

    Attributes:
        metadata: information from the file that it was loaded from, such as the classes; see save_defense.
    """

    draw: Tensor

    def __init__(self, transform: RandomTransform, purifier: nn.Module | None, classifier: nn.Module) -> None:
        super().__init__()
        if not isinstance(transform, RandomTransform):
            raise TypeError(message("Defense", "transform", "a RandomTransform", type(transform).__name__))
        for name, module in (("purifier", purifier), ("classifier", classifier)):
            if not isinstance(module, nn.Module) and not (name == "purifier" and module is None):
                raise TypeError(message("Defense", name, "a torch.nn.Module", type(module).__name__))
        trained = getattr(purifier, "trained_under", None)
        inner = transform.transform if isinstance(transform, FixedRandomness) else transform
        if trained is not None and trained != describe_transform(inner):
            text = f"Defense: the purifier was trained under {show_transform(trained)}, and stands behind {transform}"
            warnings.warn(text, stacklevel=2)
        self.transform, self.purifier, self.classifier = transform, purifier, classifier
        self.metadata: dict[str, Any] = {}
        self.register_buffer("draw", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(
        self,
        images: Tensor,
        seed: int | Tensor = 0,
        sample_ids: Tensor | None = None,
        draw: int | Tensor | None = None,
    ) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]; the key is as in RandomTransform.forward.

        draw=None takes the next draw from the module's counter.
        """
        draw = self._next_draw() if draw is None else draw
        return self.classify(self.purify(images, seed, sample_ids, draw), seed, sample_ids, draw)

    def classify(
        self, images: Tensor, seed: int | Tensor = 0, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """Logits (B, classes) of purified images; a classifier that draws gets the key, as the transform uses it."""
        if getattr(self.classifier, "keyed", False):
            sample_ids, draw = check_keys("Defense", len(images), images.device, seed, sample_ids, draw)
            return self.classifier(images, *self.transform.key(seed, sample_ids, draw))
        return self.classifier(images)

    def purify(
        self,
        images: Tensor,
        seed: int | Tensor = 0,
        sample_ids: Tensor | None = None,
        draw: int | Tensor | None = None,
    ) -> Tensor:
        """Purified images (B, C, H, W) in [0, 1], as the classifier sees them."""
        draw = self._next_draw() if draw is None else draw
        sample_ids, draw = check_keys("Defense", len(images), images.device, seed, sample_ids, draw)
        corrupted = self.transform(images, seed, sample_ids, draw)
        purified = corrupted[:, :-2] if self.purifier is None else restored("Defense", self.purifier, corrupted)
        return (self.transform.assemble(purified, corrupted) + 1) / 2

    def _next_draw(self) -> Tensor:
        draw = self.draw.clone()
        with torch.no_grad():
            self.draw.add_(1)
        return draw


class _Undefended(Defense):
    """A Defense whose images reach the classifier as they are."""

    def __init__(self, defense: Defense) -> None:
        super().__init__(defense.transform, None, defense.classifier)
        self.training = defense.training

    def purify(self, images: Tensor, seed: object = 0, sample_ids: Tensor | None = None, draw: object = None) -> Tensor:
        """The images themselves."""
        return images


def with_fixed_randomness(defense: Defense, seed: int) -> Defense:
    """A Defense over the same networks whose only draw is draw 0 of `seed`, which an attacker then knows."""
    return Defense(FixedRandomness(defense.transform, seed), defense.purifier, defense.classifier)


def classifier_alone(defense: Defense) -> nn.Module:
    """The classifier of a Defense as a model; one that draws gets the key that it gets in the Defense."""
    return _Undefended(defense) if getattr(defense.classifier, "keyed", False) else defense.classifier


def restored(function: str, purifier: nn.Module, corrupted: Tensor) -> Tensor:
    """Restore corrupted images; TypeError if the purifier returns anything besides images."""
    images = purifier(corrupted)
    if isinstance(images, (tuple, list, dict)):
        expected = "a module that returns images (B, C, H, W) alone (wrap it: `return self.network(z)[-1]` in forward)"
        given = f"{type(purifier).__name__}, which returns a {type(images).__name__} of {len(images)}"
        raise TypeError(message(function, "purifier", expected, given))
    return images
