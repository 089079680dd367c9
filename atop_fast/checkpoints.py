"""Model files: safetensors whose header names the architecture, so that a file loads without anything else said."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ._checks import check_choice, message
from ._files import load_weights, write_atomic
from .classifiers import CLASSIFIERS
from .purifiers import DISCRIMINATORS, PURIFIERS

KINDS: dict[str, Mapping[str, Callable[..., nn.Module]]] = {
    "classifier": CLASSIFIERS,
    "purifier": PURIFIERS,
    "discriminator": DISCRIMINATORS,
}


def save_model(path: str | Path, module: nn.Module, kind: str, name: str, **options: object) -> None:
    """Write the weights of a module and how to build it; atomic.

    Args:
        path: file to write.
        module: the module.
        kind: "classifier", "purifier" or "discriminator".
        name: its architecture, e.g. "unet" (see build_purifier and build_classifier).
        options: the architecture's options.

    Raises:
        ValueError: another kind or name, or `module` is not of the architecture's class: the file would be that of
            another network. A class of your own can be added to the registry of its kind, such as purifiers.PURIFIERS.
    """
    check_choice("save_model", "kind", kind, list(KINDS))
    factory = KINDS[kind][check_choice("save_model", "name", name, list(KINDS[kind]))]
    built = factory.func if isinstance(factory, functools.partial) else factory
    # A function's class is not known before it is called.
    if isinstance(built, type) and type(module) is not built:
        raise ValueError(
            message("save_model", "module", f"a {built.__name__}, which {name!r} is", type(module).__name__)
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    metadata = {"atop_fast": json.dumps({"kind": kind, "name": name, "options": options})}
    write_atomic(Path(path), lambda p: save_file(tensors, str(p), metadata))


def load_model(path: str | Path, kind: str) -> nn.Module:
    """Build the module that a file of save_model holds, with its weights, on the CPU and in evaluation mode.

    Raises:
        ValueError: no such file, not a safetensors file, one without the architecture, of another kind, or whose
            weights do not fit.
    """
    check_choice("load_model", "kind", kind, list(KINDS))
    header = read_header(path)
    if header.get("kind") != kind:
        raise ValueError(
            message("load_model", "path", f"a {kind} written by save_model", f"{path} ({header.get('kind')})")
        )
    try:
        build = functools.partial(KINDS[kind][header["name"]], **header["options"])
        state = load_file(str(path))
        _check_fits(build, header["options"], state)
        module = build()
        load_weights(module, state)
    except Exception as error:
        # Options that no architecture has may fail in it anywhere; each failure means the same to the caller.
        reason = " ".join(str(error).split())
        raise ValueError(
            message("load_model", "path", f"a {kind} with fitting weights", f"{path} ({reason})")
        ) from error
    return module.eval()


def _check_fits(build: Callable[[], nn.Module], options: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise unless the file holds the weights of what its options build, which may be larger than any memory."""
    most = max([len(state), *(8 * size for tensor in state.values() for size in tensor.shape)])
    if large := [name for name, value in options.items() if _largest(value) > most]:
        raise ValueError(f"{large[0]}={options[large[0]]!r} is no option of so few weights")
    try:
        with torch.device("meta"):
            module = build()
    except Exception:
        # Not every module can be built without memory; what is wrong with the options, the next attempt says.
        return
    module.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
    if sum(t.numel() for t in module.buffers()) > 2**20 + 16 * sum(t.numel() for t in state.values()):
        raise ValueError("its options make more constants than it has weights")


def _largest(value: object) -> float:
    """The largest number in an option."""
    if isinstance(value, (list, dict)):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, (int, float)) else 0


def read_header(path: str | Path) -> dict[str, Any]:
    """What save_model wrote about the module: {"kind", "name", "options"}; ValueError for another file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("atop_fast", "null"))
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(message("load_model", "path", "a readable safetensors file", f"{path} ({error})")) from error
    if not isinstance(header, dict):
        raise ValueError(message("load_model", "path", "a file written by save_model", f"{path} (no architecture)"))
    return header
