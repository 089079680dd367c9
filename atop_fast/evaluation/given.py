"""Attacks that callers pass to evaluate: accepted forms, the way they are called, and errors for all others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._core.checks import check_images, message
from ..attacks import Attack, AutoAttack, Model
from .protocols import AnyAttack
from .summary import CLEAN, EIGHT_BIT, curve_name

CALL = "attack(images, labels, sample_ids)"
# Names of the report's own columns and sums, beside which the attacks stand.
TAKEN = (CLEAN, "robust", "eight_bit", "total")


def given_attacks(attacks: Any, model: Model) -> dict[str, AnyAttack]:
    """The attacks by name, each called as attack(images, labels, sample_ids).

    Args:
        attacks: a mapping from names to attacks, or a function from the model to that. An attack is a callable of
            images, labels and sample ids, or of images and labels; or one of torchattacks or ART (untargeted).
        model: what the function gets.

    Raises:
        TypeError: naming the attack that cannot be called so, with the line to write.
        ValueError: a name that evaluate needs itself.
    """
    expected = "a mapping from names to attacks, such as {'pgd': PGD(model)}, or a function from the model to that"
    an_attack = isinstance(attacks, (Attack, AutoAttack, torch.nn.Module, type)) or _package(attacks) != ""
    if callable(attacks) and not an_attack:
        attacks = attacks(model)
    if not isinstance(attacks, Mapping):
        raise TypeError(message("evaluate", "attacks", expected, _shown(attacks)))
    if not attacks:
        raise ValueError(message("evaluate", "attacks", expected, "none, and so no accuracy under attack"))
    for name in attacks:
        if not isinstance(name, str):
            raise TypeError(message("evaluate", "attacks", expected, f"the name {name!r}"))
        if name in TAKEN or EIGHT_BIT in name or name.startswith(curve_name("")):
            allowed = f"named otherwise than {', '.join(TAKEN)}, and without {EIGHT_BIT!r} or {curve_name('')!r}"
            raise ValueError(message("evaluate", "attacks", allowed, repr(name)))
    return {name: _given(f"attacks[{name!r}]", name, attack) for name, attack in attacks.items()}


def checked_candidates(name: str, candidates: Any, x: Tensor) -> Tensor:
    """The result of the attack `name` for x, as images of its shape, dtype and device."""
    argument = f"attacks[{name!r}]"
    if isinstance(candidates, np.ndarray):
        candidates = torch.from_numpy(candidates)
    if not isinstance(candidates, Tensor):
        raise TypeError(message("evaluate", argument, "an attack that returns images", type(candidates).__name__))
    if candidates.shape != x.shape:
        expected = f"an attack that returns images of shape {tuple(x.shape)}"
        raise ValueError(message("evaluate", argument, expected, tuple(candidates.shape)))
    return check_images("evaluate", argument, candidates.detach()).to(x)


def _given(argument: str, name: str, attack: Any) -> AnyAttack:
    """Adapt one attack to the call attack(images, labels, sample_ids)."""
    package = _package(attack)
    if isinstance(attack, type):
        line = f"{{{name!r}: {attack.__name__}(model)}}"
        raise TypeError(message("evaluate", argument, f"an attack, not its class: {line}", _shown(attack)))
    if package == "foolbox":
        line = "lambda x, y, ids: attack(foolbox.PyTorchModel(model, bounds=(0, 1)), x, y, epsilons=eps)[1]"
        raise TypeError(message("evaluate", argument, f"called {CALL}: {line}", _shown(attack)))
    # The other targeted modes of torchattacks take true labels.
    by_label = getattr(attack, "attack_mode", "targeted(label)") == "targeted(label)"
    if package in ("torchattacks", "art") and getattr(attack, "targeted", False) and by_label:
        line = "lambda x, y, ids: attack(x, target_classes_of(y))"
        raise TypeError(message("evaluate", argument, f"untargeted, or made so: {line}", _shown(attack)))
    if package == "torchattacks" and getattr(attack, "_normalization_applied", False):
        expected = "without set_normalization_used, as images here are in [0, 1] and normalized inside of the model"
        raise TypeError(message("evaluate", argument, expected, _shown(attack)))
    if package == "art":
        return _Wrapped(attack, lambda x, y: attack.generate(x.cpu().numpy(), y=y.cpu().numpy()))
    if not callable(attack):
        way = "run_standard_evaluation(x, y)" if hasattr(attack, "run_standard_evaluation") else "run(x, y)"
        line = f"{{{name!r}: lambda x, y, ids: attack.{way}}}"
        raise TypeError(message("evaluate", argument, f"a callable {CALL}: {line}", _shown(attack)))
    if package == "torchattacks":
        return _Wrapped(attack, attack)
    if _takes_ids(attack):
        return attack
    if not _takes(attack, 2):
        line = f"{{{name!r}: lambda images, labels, sample_ids: ...}}"
        raise TypeError(message("evaluate", argument, f"called {CALL}: {line}", _shown(attack)))
    return _Wrapped(attack, attack)


class _Wrapped:
    """An attack that takes only images and labels, with the `norm` and `eps` of the wrapped attack."""

    def __init__(self, attack: Any, call: Callable[[Tensor, Tensor], Any]) -> None:
        self.attack, self.call = attack, call
        self.norm, self.eps = getattr(attack, "norm", None), getattr(attack, "eps", None)

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> Any:
        return self.call(images, labels)

    def __repr__(self) -> str:
        return repr(self.attack)


def _takes_ids(attack: Callable[..., Any]) -> bool:
    """Whether the third positional parameter of an attack is for ids: it must be given, or is named so.

    One with a default may be anything else, such as targets or a radius.
    """
    if not _takes(attack, 3):
        return False
    try:
        parameters = list(inspect.signature(attack).parameters.values())
    except ValueError:
        return True
    third = parameters[min(2, len(parameters) - 1)]
    return third.default is third.empty or third.name in ("sample_ids", "ids")


def _takes(attack: Callable[..., Any], count: int) -> bool:
    """Whether the signature of an attack accepts `count` arguments."""
    try:
        inspect.signature(attack).bind(*range(count))
    except TypeError:
        return False
    except ValueError:
        # A callable that is not implemented in Python has no signature.
        return count == 3
    return True


def _package(attack: Any) -> str:
    """The library that the attack comes from, if that library has its own calling convention."""
    for kind in type(attack).__mro__:
        root = kind.__module__.partition(".")[0]
        if root in ("torchattacks", "foolbox", "art"):
            return root
    return ""


def _shown(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    shown = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"the class {shown}" if isinstance(value, type) else shown
