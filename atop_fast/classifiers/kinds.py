"""The kinds of classifiers that a command or load_classifier can be given, and the options that each of them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import list_defenses
from ..data import Dataset, Files
from .packages import PACKAGES, ROBUSTBENCH
from .programs import archive_kind, names_program


@dataclass(frozen=True)
class Kind:
    """A kind of classifier.

    Attributes:
        takes: the arguments of load_classifier that mean something for it, among those that default to None or False;
            "options" are those of its architecture. `trust` is consent, which may be given for any.
        sizes: from data to the options of the architecture that the data determines.
    """

    takes: frozenset[str]
    sizes: Callable[[Dataset | Files], dict[str, int]] = lambda data: {}


PACKAGE = Kind(
    frozenset({"weights", "key", "normalize", "options", "download"}), lambda data: {"num_classes": len(data.classes)}
)
PROGRAM = Kind(frozenset({"weights", "key", "normalize", "options"}))
CHECKPOINT = Kind(
    frozenset({"architecture", "key", "normalize", "options"}),
    lambda data: {"channels": data.shape[0], "classes": len(data.classes)},
)
ARCHIVE = Kind(frozenset({"normalize"}))
MODEL_FILE = Kind(frozenset())
SHIPPED = Kind(frozenset())
ZOO = Kind(frozenset({"download"}))


def kind_of(name_or_path: str | Path, architecture: str | None = None) -> Kind:
    """The kind of a classifier by its name, its file, and whether an architecture is given; see load_classifier."""
    package = str(name_or_path).partition(":")[0]
    if package in PACKAGES:
        return PACKAGE
    if names_program(name_or_path):
        return PROGRAM
    if package == ROBUSTBENCH:
        return ZOO
    if architecture is not None:
        return CHECKPOINT
    if archive_kind(name_or_path) is not None:
        return ARCHIVE
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        return MODEL_FILE
    if path.suffix or path.exists():
        return CHECKPOINT
    return SHIPPED if str(name_or_path) in list_defenses() else ZOO
