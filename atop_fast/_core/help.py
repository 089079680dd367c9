"""`atop-fast COMMAND --help` from the text of the sources: they import torch, which takes seconds."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# A class, a function or a constant, and the file that defines it.
Definition = tuple["ast.ClassDef | ast.FunctionDef | ast.Assign", Path]


@dataclass
class Option:
    """An option of a command; its type and default as they are written in the source."""

    name: str
    kind: str
    default: str | None
    help: str


def command_help(command: str, width: int = 100) -> str:
    """The description of a command and all its options."""
    found = find_definition(command, PACKAGE / "cli.py")
    assert found is not None
    assert isinstance(found[0], ast.FunctionDef)
    text = re.split(r"\n(?:Args|Raises):\n", ast.get_docstring(found[0]) or "")[0]
    lines = [f"usage: atop-fast {command} [options]", "", text.strip(), "", "options:"]
    for option in options_of(*found):
        lines.append(f"  --{option.name} {option.kind}")
        default = "" if option.default is None else f" (default: {option.default})"
        lines += textwrap.wrap(option.help + default, width, initial_indent=" " * 10, subsequent_indent=" " * 10)
    lines += ["  --config FILE", f"{' ' * 10}Options from a YAML file; those of the command line come after it."]
    return "\n".join(lines) + "\n"


def options_of(function: ast.ClassDef | ast.FunctionDef | ast.Assign, path: Path) -> Iterator[Option]:
    """The options of a command, including those of its dataclasses."""
    assert isinstance(function, ast.FunctionDef)
    helps = _described(function)
    arguments = function.args
    required: list[ast.expr | None] = [None] * (len(arguments.args) - len(arguments.defaults))
    for argument, default in zip(arguments.args, [*required, *arguments.defaults], strict=True):
        yield from _options(argument.arg, argument.annotation, default, helps, path)
    if arguments.kwarg is not None:
        # The dataclass that receives **kwargs.
        calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        for call in calls:
            given = [k.value.id for k in call.keywords if k.arg is None and isinstance(k.value, ast.Name)]
            if given == [arguments.kwarg.arg] and isinstance(call.func, ast.Name):
                yield from _fields(call.func, None, "", path)


def _options(
    name: str, annotation: ast.expr | None, default: ast.expr | None, helps: dict[str, str], path: Path
) -> Iterator[Option]:
    """One argument: an option, or the fields of its dataclass."""
    if isinstance(annotation, ast.Name) and find_definition(annotation.id, path) is not None:
        yield from _fields(annotation, default, f"{name}.", path)
        return
    kind = "" if annotation is None else ast.unparse(annotation)
    yield Option(name, kind, _value(default, path), helps.get(name, ""))


def _fields(annotation: ast.Name, default: ast.expr | None, prefix: str, path: Path) -> Iterator[Option]:
    """The fields of a dataclass, with the values that `default`, a call of it, gives them."""
    given = {k.arg: k.value for k in default.keywords} if isinstance(default, ast.Call) else {}
    for name, (kind, value, helps, where) in _inherited(annotation.id, path).items():
        for option in _options(name, kind, given.get(name, value), helps, where):
            option.name = prefix + option.name
            yield option


def _inherited(name: str, path: Path) -> dict[str, tuple[ast.expr, ast.expr | None, dict[str, str], Path]]:
    """Annotation, default, descriptions and file of each field of a dataclass, inherited fields included."""
    fields: dict[str, tuple[ast.expr, ast.expr | None, dict[str, str], Path]] = {}
    helps: dict[str, str] = {}
    node, where = find_definition(name, path) or (None, path)
    if not isinstance(node, ast.ClassDef):
        return {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            below = _inherited(base.id, where)
            fields |= below
            helps |= {key: text for *_, texts, _ in below.values() for key, text in texts.items()}
    helps |= _described(node)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            fields[line.target.id] = (line.annotation, line.value, helps, where)
    return fields


def find_definition(name: str, path: Path) -> Definition | None:
    """The class, function or constant that a module of the package defines or imports under a name."""
    for node in _parsed(path).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            return node, path
        if isinstance(node, ast.Assign) and name in [
            target.id for target in node.targets if isinstance(target, ast.Name)
        ]:
            return node, path
        if (
            isinstance(node, ast.ImportFrom)
            and node.level
            and name in [alias.asname or alias.name for alias in node.names]
        ):
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            files = (folder.with_suffix(".py"), folder / "__init__.py")
            return next((found for file in files if file.exists() and (found := find_definition(name, file))), None)
    return None


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _described(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    """The descriptions of arguments or attributes in a docstring."""
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    found = re.search(r"^(?:Args|Attributes):\n((?:    .*\n?|\n)*)", text, re.MULTILINE)
    helps: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \S)", found[1]) if found else []:
        names, _, description = entry.partition(":")
        helps |= {name.strip(): " ".join(description.split()) for name in names.split(",")}
    return helps


def _value(default: ast.expr | None, path: Path) -> str | None:
    """A default as the help shows it; None if there is none."""
    if default is None or (isinstance(default, ast.Constant) and default.value is None):
        return None
    if isinstance(default, ast.Name) and (found := find_definition(default.id, path)) is not None:
        assert isinstance(found[0], ast.Assign)
        return _value(found[0].value, found[1])
    if isinstance(default, ast.Call):
        # field(default_factory=dict)
        return "{}"
    if isinstance(default, ast.Constant) and isinstance(default.value, str):
        return default.value or None
    return ast.unparse(default)
