"""Atomic files and checkpoints: a reader, or a run that resumes after kill -9, sees a whole file or none.

Reading a file runs nothing in it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ._checks import message


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there; OSError if that fails."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
        # Only then is it there after a power failure, too.
        _sync(path.parent)
    except (RuntimeError, SafetensorError) as error:
        # What torch and safetensors raise on a full disk tells nobody that it is full.
        reason = str(error).partition("\n")[0]
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} could not be written ({reason}); its disk has {free / 1e6:.1f} MB left") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str = "*") -> None:
    """Remove temporary files of processes that were killed while they wrote files of this stem into `folder`."""
    for temporary in folder.glob(f".{stem}.*"):
        if (found := re.search(r"\.(\d+)(\.\w+)?$", temporary.name)) and not _lives(int(found[1])):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def save_checkpoint(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Write tensors, numbers and containers of them, with the text that tells to which run they belong; atomic."""
    write_atomic(path, lambda p: torch.save({**state, "fingerprint": fingerprint}, p))


def load_checkpoint(function: str, path: Path | None, fingerprint: str) -> dict[str, Any] | None:
    """What save_checkpoint wrote, or None where nothing was; ValueError for a damaged file or one of another run."""
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["fingerprint"] != fingerprint:
            raise ValueError("it belongs to another configuration")
    except Exception as error:
        # torch.load raises several unrelated types on a damaged file; each means the same to the caller.
        expected = "a checkpoint of this run (delete it to start again)"
        raise ValueError(message(function, "checkpoint", expected, f"{path}: {error}")) from error
    return state


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # It is somebody else's.
        return True
    return True


def read_state(function: str, argument: str, path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a network by their names, from a file of others, on the CPU.

    Args:
        function, argument: for errors.
        path: a safetensors file if its name ends in .safetensors, else one of torch.save.
        key: the name of the state dict where the file holds more; it may also be all that it holds.

    Raises:
        ValueError: no such file, a damaged one, one with other objects than tensors, numbers and containers of them, or
            without a state dict.
    """
    try:
        # Not executable: weights_only refuses whatever is not a tensor, a number or a container of them.
        safe = path.suffix == ".safetensors"
        content: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        expected = "a checkpoint of tensors alone (other objects could run code and are refused)"
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(message(function, argument, expected, f"{path} ({reason})")) from error
    except Exception as error:
        # torch.load raises several unrelated types on a damaged file; each means the same to the caller.
        expected = "a readable checkpoint of torch.save, or of safetensors and so named"
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(message(function, argument, expected, f"{path} ({reason})")) from error
    state = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        held = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(message(function, argument, f'a state dict, or {{"{key}": ...}}', f"{path} (with {held})"))
    return dict(state)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into a module that has the same names and shapes, and reals where they are.

    Raises:
        ValueError, RuntimeError: other names, shapes or types, NaN or infinity.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}")
    module.load_state_dict(state)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def describe(*tensors: Tensor) -> str:
    """Shapes and sums of tensors: enough to notice that a checkpoint is used with other data or weights."""
    return " ".join(f"{tuple(t.shape)}:{float(t.sum(dtype=torch.float64)):.9g}" for t in tensors)


def writable_folder(function: str, argument: str, path: str | Path) -> Path:
    """The folder `path`, made if needed; ValueError if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(message(function, argument, "a writable folder", f"{folder} ({error.strerror})")) from error
    return folder


def claim_folder(function: str, folder: Path, header: dict[str, Any]) -> None:
    """Make `folder` the one of a run, which <folder>/run.json describes; nothing in a folder of others is touched.

    Raises:
        ValueError: it is of a run with another header, holds something else, or cannot be written.
    """
    path = folder / "run.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it describes no run")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(message(function, "out", "a readable run folder", f"{path} ({error})")) from error
        # Through JSON, so that tuples compare as the lists that they become.
        expected = json.loads(json.dumps(header))
        if found != expected:
            keys = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
            given = f"{folder}, which belongs to a run with another {', '.join(keys)}"
            raise ValueError(message(function, "out", "a new folder or one of this run", given))
        remove_leftovers(folder)
        return
    if folder.is_dir() and (others := sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))):
        given = f"{folder}, which holds {others[0]!r} and no run.json"
        raise ValueError(message(function, "out", "a new folder or one of this run", given))
    writable_folder(function, "out", folder)
    write_text(path, json.dumps(header, indent=2) + "\n")
