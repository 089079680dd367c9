"""Untrusted YAML: plain values of bounded size, without tags that construct objects or aliases that expand."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_CHARACTERS = 2**20
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """SafeLoader, which constructs no Python objects, without aliases, duplicate keys and deep nesting.

    Aliases can double the size with every line; a duplicate key would silently replace the first one.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_fraction(self, node: Any) -> float:
        above, below = node.value.split("/")
        if not float(below):
            raise yaml.constructor.ConstructorError(None, None, f"{node.value} divides by zero", node.start_mark)
        return float(above) / float(below)


# Accept 8/255, as radii are written, and 1e-3, which JSON takes for a number and YAML 1.1 for text.
_FRACTION, _FLOAT = r"[0-9]+(\.[0-9]*)?/[0-9]+(\.[0-9]*)?$", r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"
_Loader.add_implicit_resolver("!fraction", re.compile(_FRACTION), list("0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789"))
_Loader.add_constructor("!fraction", _Loader.construct_fraction)


class _WithoutDates(_Loader):
    """_Loader that reads dates as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for start, resolvers in _Loader.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str, dates: bool = True) -> Any:
    """The values of a YAML document; fractions such as 8/255 are numbers, and dates are text if `dates` is False.

    Raises:
        ValueError: the text is too long, is not YAML, or has Python tags, aliases, duplicate keys or deep nesting.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"longer than {MAX_CHARACTERS} characters")
    try:
        return yaml.load(text, _Loader) if dates else yaml.load(text, _WithoutDates)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
