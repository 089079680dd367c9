"""Classifiers that are programs: a class in a .py file, and archives of TorchScript and torch.export.

A model file carries the source of the class, or the archive. Loading either runs code (an archive can read and write
files, and torch unpickles parts of it), so that it needs consent: the caller names the .py file, or passes `trust`.
Consent is for one program, by its hash, for the rest of the process: files with the same program then load, too.
"""

from __future__ import annotations

import ast
import hashlib
import io
import re
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._core.checks import message

# Names of architectures in model files.
PYTHON, SCRIPT, EXPORT = "python", "torchscript", "export"
ARCHIVES = (SCRIPT, EXPORT)
CONSENTED: set[str] = set()
_NAMED = re.compile(r"(.+\.py)(?::(\w+))?")


def names_program(name_or_path: str | Path) -> bool:
    """Whether a classifier is named as FILE.py:Class."""
    return _NAMED.fullmatch(str(name_or_path)) is not None


def archive_kind(path: str | Path) -> str | None:
    """SCRIPT or EXPORT for such an archive, None for any other file; the archive's table of contents is read."""
    try:
        # zipfile also finds an archive at the end of another file.
        with open(path, "rb") as start:
            if start.read(4) != b"PK\x03\x04":
                return None
        with zipfile.ZipFile(path) as file:
            members = {name.partition("/")[2] for name in file.namelist()} | set(file.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    if "constants.pkl" in members:
        return SCRIPT
    return EXPORT if {"archive_format", "serialized_exported_program.json"} & members else None


def carried_programs(spec: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Hash, description and text (empty for an archive) of each program in the architecture that a file states."""
    while isinstance(spec.get("inside"), dict):
        spec = spec["inside"]
    options = spec.get("options")
    if not isinstance(options, dict):
        return
    if spec.get("name") == PYTHON:
        source = str(options.get("source"))
        name, count = printable(f"{options.get('file')}:{options.get('entry')}"), len(source.splitlines())
        yield _digest(source.encode()), f"{count} lines of Python, {name}", source
    elif spec.get("name") in ARCHIVES:
        yield str(options.get("sha256")), f"an archive of {_title(str(spec['name']))}", ""


def printable(text: str) -> str:
    """The text with escapes for characters by which a terminal could hide a part of it, or show it in another order."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def require_consent(function: str, path: str | Path, spec: Mapping[str, Any], trust: bool) -> None:
    """Raise unless the programs in a file's architecture may run, by `trust` or by earlier consent in this process.

    Raises:
        ValueError: there is a program without consent.
    """
    for digest, what, _ in carried_programs(spec):
        if trust:
            CONSENTED.add(digest)
        elif digest not in CONSENTED:
            expected = f"given (--trust on the command line) to run the program in {path}, if you know its author"
            raise ValueError(message(function, "trust", expected, f"none for {what} (sha256 {digest[:16]})"))


def load_program(function: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """The module that FILE.py:Class builds with `options`; naming the file is consent to run it.

    Raises:
        ValueError: no such file or class; or the file fails, or builds something else.
    """
    found = _NAMED.fullmatch(name)
    assert found is not None
    path, entry = Path(found[1]), found[2]
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source, filename=path.name)
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(message(function, "classifier", "a readable FILE.py:Class", f"{name} ({error})")) from error
    if entry is None:
        classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
        expected = f"FILE.py:Class, such as {path}:{classes[-1] if classes else 'MyNet'}"
        raise ValueError(message(function, "classifier", expected, name))
    CONSENTED.add(_digest(source.encode()))
    return build_program(path.name, entry, source, dict(options))


def build_program(file: str, entry: str, source: str, options: dict[str, Any]) -> nn.Module:
    """The module of a class, or of a function that returns one, in the text of a .py file; it records its architecture.

    Raises:
        ValueError: there is no consent to run the text, it fails, or `entry` builds no module.
    """
    name = f"{file}:{entry}"
    digest = _digest(source.encode())
    if digest not in CONSENTED:
        raise ValueError(f"nobody consented to run {name}")
    try:
        module = imported(file, source)
        if not callable(getattr(module, entry, None)):
            defined = [
                key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
            ]
            raise AttributeError(f"it defines {', '.join(defined) or 'nothing'}")
        network = getattr(module, entry)(**options)
        if not isinstance(network, nn.Module):
            raise TypeError(f"it builds a {type(network).__name__}")
    except ModuleNotFoundError as error:
        expected = f"of installed packages alone, because its text travels without its neighbors ({error})"
        raise ValueError(message("load_classifier", f"the imports of {file}", expected, repr(error.name))) from error
    except Exception as error:
        given = f"{name} with {options} ({type(error).__name__}: {error})"
        raise ValueError(
            message("load_classifier", "FILE.py:Class", "a class or function that builds a torch.nn.Module", given)
        ) from error
    network.architecture = (PYTHON, {"file": file, "entry": entry, "source": source, "options": options})
    return network


def imported(file: str, source: str) -> types.ModuleType:
    """The text of a .py file that the user named, as a module; it runs once in a process.

    The module's name is its own: two files may have the same name, or that of a package that is imported later.
    """
    name = f"{Path(file).stem}_{_digest(source.encode())[:16]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__file__ = file
        # Registered before it runs, because dataclasses look up the module of a class.
        sys.modules[name] = module
        try:
            exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


class Archive(nn.Module):
    """A network in an archive of TorchScript or torch.export; its state dict is the archive.

    Args:
        kind: SCRIPT or EXPORT.
        data: the bytes of the archive.

    Raises:
        ValueError: there is no consent to run it, or torch cannot load it.
    """

    def __init__(self, kind: str, data: bytes) -> None:
        super().__init__()
        digest = _digest(data)
        if digest not in CONSENTED:
            raise ValueError(f"nobody consented to run this archive of {_title(kind)}")
        self.kind, self.data = kind, data
        try:
            file = io.BytesIO(data)
            if kind == SCRIPT:
                self.network = torch.jit.load(file, map_location="cpu")
            else:
                self.network = torch.export.load(file).module()
        except Exception as error:
            # The loaders raise many exception types for damaged archives and for those of other versions.
            raise ValueError(f"torch cannot load this archive of {_title(kind)} ({error})") from error
        self.architecture = (kind, {"sha256": digest})

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), in the range that the network was trained on -> logits (B, classes).

        Raises:
            RuntimeError: the program was exported for images of another size or number.
        """
        try:
            logits: Tensor = self.network(x)
        except AssertionError as error:
            # Exported programs check the shapes of their inputs by assertions.
            raise RuntimeError(
                f"exported for images of other sizes; dynamic_shapes frees the batch: {error}"
            ) from error
        return logits

    def train(self, mode: bool = True) -> Archive:
        """Set the mode, which exported programs and frozen TorchScript do not have."""
        self.training = mode
        if self.kind == SCRIPT and hasattr(self.network, "training"):
            self.network.train(mode)
        return self

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The archive as one tensor of bytes."""
        state = {} if destination is None else destination
        state[f"{prefix}archive"] = torch.frombuffer(bytearray(self.data), dtype=torch.uint8)
        return state


def load_archive(function: str, path: Path, trust: bool) -> Archive:
    """The network in an archive, in evaluation mode; ValueError without `trust` or earlier consent."""
    kind, data = archive_kind(path), path.read_bytes()
    assert kind is not None
    require_consent(function, path, {"name": kind, "options": {"sha256": _digest(data)}}, trust)
    return Archive(kind, data).eval()


def restore_archive(kind: str, state: Mapping[str, Tensor]) -> Archive:
    """The network in the tensors of a model file."""
    if set(state) != {"archive"} or state["archive"].dtype != torch.uint8:
        raise ValueError("it holds other tensors than an archive")
    return Archive(kind, state["archive"].numpy().tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _title(kind: str) -> str:
    return {SCRIPT: "TorchScript", EXPORT: "torch.export"}[kind]
