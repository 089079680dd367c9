"""Smaller networks for a budget in which those of a recipe would hardly be trained."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from .._core.distributed import Group
from ..classifiers import CLASSIFIERS
from ..purifiers import PURIFIERS
from .forecast import ENOUGH, Forecast
from .schema import ClassifierSource, PurifierSource, Recipe

# Fewest channels that halving leaves, how often it halves, and how many times the updates must grow by it.
LEAST, MOST, WORTH = 8, 2, 1.5
# Share of the budget that may go into measuring one size of the networks.
TRIAL = 0.02
BUILDERS: Mapping[str, Mapping[str, Callable[..., Any]]] = {"classifier": CLASSIFIERS, "purifier": PURIFIERS}


def halved(recipe: Recipe) -> Recipe | None:
    """The recipe with half the channels in each network that it trains; None if no network can be halved."""
    changed = {kind: _halved(getattr(recipe, kind), builders) for kind, builders in BUILDERS.items()}
    smaller: dict[str, Any] = {kind: source for kind, source in changed.items() if source is not None}
    return replace(recipe, **smaller) if smaller else None


def _halved(
    source: ClassifierSource | PurifierSource, builders: Mapping[str, Callable[..., Any]]
) -> ClassifierSource | PurifierSource | None:
    if source.path is not None:
        return None
    parameters = inspect.signature(builders[source.name]).parameters
    for name in ("width", "widths"):
        if name not in parameters:
            continue
        value = source.options.get(name, parameters[name].default)
        small = [int(v) // 2 for v in value] if name == "widths" else int(value) // 2
        if min(small if isinstance(small, list) else [small]) >= LEAST:
            return replace(source, options={**source.options, name: small})
    return None


def fitted(
    recipe: Recipe, seconds: float, forecast: Callable[[Recipe], Forecast], group: Group
) -> tuple[Recipe, Forecast, int]:
    """The recipe with networks that are halved until enough of their training fits, its forecast, and the halvings.

    Networks are halved only if less than a tenth of a training's updates would fit, if this gives 1.5 times as many,
    and if measuring takes no more than a fiftieth of the time.

    Args:
        recipe: recipe of the run.
        seconds: the budget of the run.
        forecast: measures the costs of a recipe.
        group: processes of the run; the first one decides for all.
    """
    halvings = 0
    begin = time.monotonic()
    found = forecast(recipe)
    while halvings < MOST and (smaller := halved(recipe)) is not None:
        took, share = time.monotonic() - begin, least_share(found, seconds)
        if not group.gather(share < ENOUGH and took <= TRIAL * seconds)[0]:
            break
        begin = time.monotonic()
        other = forecast(smaller)
        if not group.gather(least_share(other, seconds) >= WORTH * share)[0]:
            break
        recipe, found, halvings = smaller, other, halvings + 1
    return recipe, found, halvings


def spoken_halvings(halvings: int) -> str:
    """The halving of the channels in words."""
    return f"halved{' twice' if halvings == 2 else ''}, but not to fewer than {LEAST}"


def least_share(forecast: Forecast, seconds: float) -> float:
    """The share of its updates that the most shortened training has."""
    return min((n / of for stage, (n, of) in forecast.fits(seconds).items() if stage != "evaluate"), default=1.0)
