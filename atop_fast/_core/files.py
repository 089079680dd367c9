"""Atomic files and checkpoints: a reader, or a run that resumes after kill -9, sees a complete file or none.

Reading a file never executes code from it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checks import message

# First bytes of files that commonly stand in for the real one, and their description in the error message.
SIGNATURES = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"),
    (b"<!doctype html", "is text (HTML), probably of a failed download"),
    (b"<html", "is text (HTML), probably of a failed download"),
)
# Errors from file systems that cannot sync a folder, such as some network mounts.
CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it to `path`; OSError if that fails."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # As the umask has it: safetensors makes files that only their owner can read.
        temporary.chmod(stat.S_IMODE(mode))
        _sync(temporary)
        temporary.replace(path)
        # Without this, the rename may not survive a power failure.
        _sync_names(path.parent)
    except (RuntimeError, SafetensorError) as error:
        # On a full disk, the messages of torch and safetensors do not mention the disk.
        reason = str(error).partition("\n")[0]
        free = shutil.disk_usage(path.parent).free
        raise OSError(f"{path} could not be written ({reason}); its disk has {free / 1e6:.1f} MB left") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str = "*") -> None:
    """Remove the temporary files of processes that were killed while writing files of this stem to `folder`."""
    for temporary in folder.glob(f".{stem}.*"):
        if (found := re.search(r"\.(\d+)(\.\w+)?$", temporary.name)) and not _is_alive(int(found[1])):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of a file's name that are no UTF-8 stay as they are."""
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8", errors="surrogateescape"))


def save_checkpoint(path: Path, fingerprint: Mapping[str, str], state: dict[str, Any]) -> None:
    """Atomically write tensors, numbers and containers of them, with the fingerprint of the run they belong to."""
    write_atomic(path, lambda p: torch.save({**state, "fingerprint": dict(fingerprint)}, p))


def load_checkpoint(function: str, path: Path | None, fingerprint: Mapping[str, str]) -> dict[str, Any] | None:
    """Read the state from save_checkpoint; None if there is no file, ValueError if it is damaged or of another run.

    Args:
        function: name for error messages.
        path: the file.
        fingerprint: what the run depends on -> its text; the message names those that differ.
    """
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        found = state["fingerprint"]
        if found != fingerprint:
            keys = sorted(k for k in fingerprint.keys() | found.keys() if fingerprint.get(k) != found.get(k))
            raise ValueError(f"it belongs to a run with another {', '.join(keys)}")
    except Exception as error:
        # torch.load raises several unrelated types for damaged files; all mean the same to the caller.
        expected = "a checkpoint of this run (delete it to start again)"
        raise ValueError(message(function, "checkpoint", expected, f"{path}: {_reason(path, error)}")) from error
    return state


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Sync a folder if its file system supports that."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def identify(path: Path) -> str | None:
    """Describe a folder, or a file that is empty, a Git LFS pointer or text instead of binary data; None for others."""
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.safetensors"))
        return f"is a folder{'; it holds ' + ', '.join(files) if files else ''}"
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if not start:
        return "is empty"
    for signature, meaning in SIGNATURES:
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(signature):
            return meaning
    try:
        # The read may have cut the last character.
        text = start.decode("utf-8", errors="strict" if len(start) < 512 else "ignore")
    except UnicodeDecodeError:
        return None
    if len(text.encode()) < len(start) - 3 or not all(c.isprintable() or c in "\t\r\n" for c in text):
        return None
    return f"is text, beginning with {text.strip()[:40]!r}"


def _reason(path: Path, error: Exception) -> str:
    """One line on why a file cannot be read, without torch's advice to allow code from it."""
    if (found := identify(path)) is not None:
        return found
    if isinstance(error, pickle.UnpicklingError):
        objects = re.findall(r"GLOBAL ([\w.]+)", str(error))
        return f"it holds {objects[0]}" if objects else "it is no file of torch.save, or holds other objects"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # The process belongs to another user.
        return True
    return True


def read_state(
    function: str, argument: str, path: Path, keys: Sequence[str], key: str | None = None, offer_key: bool = False
) -> dict[str, Tensor]:
    """Read a third-party file as a state dict: tensors by name, on the CPU.

    Args:
        function, argument: for error messages.
        path: a safetensors file if its name ends in .safetensors, otherwise a file of torch.save.
        keys: entries under which to look for the state dict; the file may also be the state dict itself.
        key: the entry that the caller chose: a dictionary in the file, or a prefix of the tensors' names.
        offer_key: error messages suggest `key`, as `function` has that option.

    Raises:
        ValueError: the file is missing, damaged or without a state dict, or holds objects other than tensors, numbers
            and containers of them.
    """
    try:
        # weights_only refuses everything except tensors, numbers and containers of them, so that no code can run.
        safe = path.suffix == ".safetensors"
        content: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        expected = "a checkpoint of tensors alone (other objects could run code and are refused)"
        raise ValueError(message(function, argument, expected, f"{path} ({_reason(path, error)})")) from error
    except Exception as error:
        # torch.load raises several unrelated types for damaged files; all mean the same to the caller.
        expected = "a readable checkpoint of torch.save, or of safetensors and so named"
        raise ValueError(message(function, argument, expected, f"{path} ({_reason(path, error)})")) from error
    held = content if isinstance(content, dict) else {}
    if key is not None:
        state = held[key] if key in held else below(key, held)
    else:
        state = next((held[name] for name in keys if _is_state(held.get(name))), content)
    if not _is_state(state):
        found = [str(name) for name, value in held.items() if _is_state(value)]
        shown = ", ".join(map(repr, list(held)[:10])) if held else type(content).__name__
        names = ", ".join(map(repr, found))
        several = f"; key={found[0]!r} takes one of its dictionaries {names}" if offer_key and found else ""
        if key is None:
            expected = f"a state dict, or {{{json.dumps(keys[0])}: ...}}"
        else:
            expected = f"a checkpoint with a dictionary or tensors {key!r}"
        raise ValueError(message(function, argument, expected, f"{path} (with {shown}{several})"))
    return dict(state)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the submodule `prefix`, by their names in it."""
    start = f"{prefix}."
    return {k.removeprefix(start): v for k, v in state.items() if isinstance(k, str) and k.startswith(start)}


def unwrapped(state: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """Strip the prefixes that wrappers add to a network's parameter names `own` from a state dict.

    Wrappers are torch.compile, DataParallel, AveragedModel, Lightning's modules and any module that holds the network
    as one of its attributes. ValueError if two parts of the state dict could be the network.
    """
    state = {name.replace("_orig_mod.", ""): value for name, value in state.items() if name != "n_averaged"}
    own = set(own)
    while not own & state.keys():
        heads = sorted({name.partition(".")[0] for name in state if "." in name})
        parts = {head: below(head, state) for head in heads}
        whole = [head for head, part in parts.items() if own <= part.keys()]
        if len(whole) > 1:
            raise ValueError(f"it holds several such networks: {', '.join(f'key={head!r}' for head in whole)}")
        if not whole and not (len(parts) == 1 and len(parts[heads[0]]) == len(state)):
            break
        state = parts[whole[0] if whole else heads[0]]
    return dict(state)


def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy the tensors of a file into a module with the same names and shapes.

    Raises:
        ValueError, RuntimeError: names or shapes differ, an integer tensor stands for a floating-point one, or a value
            is NaN or infinite.
    """
    own = module.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{name} is of {tensor.dtype}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        if problems := _misfits(own, state):
            raise ValueError(problems) from error
        raise
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity")


def _misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The names that make a state dict another network's, three of each kind and how many more there are."""
    kinds = {
        "Missing key(s)": [name for name in own if name not in state],
        "Unexpected key(s)": [name for name in state if name not in own],
        "size mismatch for": [
            f"{name} ({tuple(state[name].shape)} in the file, {tuple(tensor.shape)} in the network)"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    parts = []
    for kind, names in kinds.items():
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        parts += [f"{kind} {', '.join(names[:3])}{more}"] if names else []
    return "; ".join(parts)


def describe(*tensors: Tensor) -> str:
    """Identify data or weights: the shapes of tensors, and a hash of their values in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        # In chunks, because the images may take half of the memory.
        for part in tensor.detach().reshape(-1).split(2**24):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    shapes = " ".join(str(tuple(t.shape)) for t in tensors[:2])
    return f"{shapes}{' ...' if len(tensors) > 2 else ''} sha256:{digest.hexdigest()[:32]}"


def describe_module(module: nn.Module) -> str:
    """Identify a network: hashes of its printed form, and of its weights and buffers, also those of no state dict."""
    values = {**module.state_dict(), **dict(module.named_buffers())}
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    return f"{hashlib.sha256(shown(module).encode()).hexdigest()[:32]} {describe(*tensors)}"


def shown(value: object) -> str:
    """The repr of an attack or a model without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def writable_folder(function: str, argument: str, path: str | Path) -> Path:
    """Create the folder `path` if needed and return it; ValueError if it is not writable."""
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
    """Claim `folder` for a run, described by <folder>/run.json; a folder with other content is not touched.

    Raises:
        ValueError: the folder belongs to a run with another header, holds other files, or is not writable.
    """
    path = folder / "run.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it describes no run")
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(message(function, "out", "a readable run folder", f"{path} ({error})")) from error
        # The round trip turns tuples into lists, as in the file.
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
