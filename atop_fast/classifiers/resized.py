"""A classifier for images of any size."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import resize
from .normalized import refuse_keyed


class Resized(nn.Module):
    """A classifier that resizes images of any size to its own.

    Args:
        classifier: the classifier.
        size: side in pixels; images of another size are resized bilinearly (antialiased if they shrink).

    Raises:
        ValueError: the classifier has keyed draws, and must be outside: SelfEnsemble(Resized(...)).
    """

    def __init__(self, classifier: nn.Module, size: int) -> None:
        super().__init__()
        refuse_keyed("Resized", "classifier", classifier)
        self.classifier, self.size = classifier, (size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1] -> logits (B, classes)."""
        return self.classifier(x if tuple(x.shape[2:]) == self.size else resize(x, self.size, antialias=True))

    def extra_repr(self) -> str:
        return f"size={self.size}"
