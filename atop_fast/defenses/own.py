"""Defenses by name: of the table, of a caller's Python file, or of a file of save_defense."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._core.checks import message
from ..checkpoints import list_defenses, load_defense
from ..classifiers.programs import imported
from ..defense import Defense
from ..transforms import RandomTransform
from .inside import Replaced
from .table import DEFENSES, Build


def find(text: str) -> tuple[str, Build]:
    """The row name of a defense, and the function that builds it from a classifier and the shape of its images.

    Args:
        text: a name in DEFENSES; or FILE.py:NAME, where NAME is a subclass of RandomTransform that is built without
            arguments, or a function from the classifier to a module; or a file of save_defense or a name in
            list_defenses(), whose classifier must be the given one. The code of FILE.py is executed.

    Raises:
        ValueError, TypeError: there is no such defense, or NAME is something else.
    """
    if text in DEFENSES:
        return text, DEFENSES[text]
    path, colon, name = text.rpartition(":")
    if colon and path.endswith(".py"):
        return _row(name, text), _from_code(Path(path), name)
    if text.endswith(".safetensors") or text in list_defenses():
        return _row(Path(text).stem, text), lambda model, shape: _from_file(text, model)
    if text == "carso":
        expected = "a file that train_carso and save_defense made, as no weights of CARSO are in the package"
        raise ValueError(message("judge", "defense", expected, repr(text)))
    expected = f"all, one of {', '.join(map(repr, DEFENSES))}, FILE.py:NAME, a .safetensors file of save_defense"
    expected += f", or one of {', '.join(map(repr, list_defenses()))} in the package"
    raise ValueError(message("judge", "defense", expected, repr(text)))


def _row(name: str, text: str) -> str:
    """The row name of a defense outside the table, whose own rows keep their names: "none" is the classifier alone."""
    if name in DEFENSES:
        raise ValueError(message("judge", "defense", f"named otherwise than the table's own {name!r}", text))
    return name


def _from_code(path: Path, name: str) -> Build:
    """The builder NAME of a Python file."""
    given = f"{path}:{name}"
    if not path.is_file():
        raise ValueError(message("judge", "defense", "the path of a Python file before the colon", given))
    found = getattr(imported(str(path), path.read_text(encoding="utf-8")), name, None)
    transform = inspect.isclass(found) and issubclass(found, RandomTransform)
    if not callable(found):
        expected = f"a subclass of RandomTransform or a function from the classifier to a module in {path}"
        raise ValueError(message("judge", "defense", expected, f"{name}, which is {found!r}"))
    build: Any = found

    def checked(model: nn.Module, shape: Sequence[int]) -> nn.Module:
        try:
            # A function may change its argument, which other rows and the attacks on it alone share.
            defense = Defense(build(), None, model) if transform else build(copy.deepcopy(model))
        except TypeError as error:
            expected = "a function of the classifier that returns a module"
            expected = "a subclass of RandomTransform that is built without arguments" if transform else expected
            reason = str(error).partition("\n")[0]
            raise TypeError(message("judge", "defense", expected, f"{given}, which fails: {reason}")) from error
        if not isinstance(defense, nn.Module):
            raise TypeError(message("judge", "defense", "a function that returns a module", f"{given} -> {defense!r}"))
        return defense

    return checked


def _from_file(path: str, model: nn.Module) -> Defense:
    """The defense of a file, if it defends `model`."""
    defense = load_defense(path)
    inner = defense.classifier
    # A layer of the defense may be inside the classifier.
    if isinstance(inner, Replaced) and not isinstance(model, Replaced):
        inner = inner.model
    # A normalization is in buffers that no state dict has, and layers without weights are known by class and options.
    given, own = ({**m.state_dict(), **dict(m.named_buffers())} for m in (model, inner))
    layers, own_layers = ([(type(m).__qualname__, m.extra_repr()) for m in whole.modules()] for whole in (model, inner))
    same = given.keys() == own.keys() and all(torch.equal(given[k].cpu(), own[k].to(given[k].dtype)) for k in given)
    if not same or layers != own_layers:
        expected = "a defense of the given classifier, as a table is of one classifier"
        given_text = f"{path}, whose classifier has other weights, another normalization or other layers"
        raise ValueError(message("judge", "defense", expected, given_text))
    return defense.to(next(model.parameters()).device)
