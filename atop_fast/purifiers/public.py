"""Reads and writes checkpoints of the public DeepFillV2 and AToP code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .._core.checks import message
from .._core.files import read_state, unwrapped, write_atomic
from .deepfill import DeepFillV2
from .discriminator import SNPatchDiscriminator

# Prefixes of the generator and of the frozen classifier in AToP's files.
GENERATOR, CLASSIFIER = "generator.", "res."

Network = TypeVar("Network", bound=nn.Module)


def load_deepfill(path: str | Path) -> DeepFillV2:
    """Load a public DeepFillV2 checkpoint: on the CPU, in float32 and in evaluation mode.

    Args:
        path: a file of torch.save with {"G": state dict, ...} or the state dict alone, or a .safetensors file. In AToP
            files, the prefix "generator." is stripped and the classifier "res." is ignored. The width of the network is
            inferred from the weights.

    Raises:
        ValueError: the file is missing or damaged, holds objects other than tensors (no code in it runs), or its names
            and shapes are not those of a DeepFillV2.

    Source: Yu et al., ICCV 2019; AToP, ICLR 2024.
    """
    state = read_state("load_deepfill", "path", Path(path), ("G",))
    generator = {name: tensor for name, tensor in state.items() if not name.startswith(CLASSIFIER)}
    if all(name.startswith(GENERATOR) for name in generator):
        state = {name.removeprefix(GENERATOR): tensor for name, tensor in generator.items()}
    with torch.device("meta"):
        state = unwrapped(state, DeepFillV2(4).state_dict())
    first = _find("load_deepfill", path, state, "stage1.conv1.conv.weight")
    net = _build("load_deepfill", path, lambda: DeepFillV2(len(first)), state)
    if not torch.equal(net.stage2.contextual_attention.fuse_weight, torch.eye(3)[None, None]):
        expected = "a checkpoint with the identity as stage2.contextual_attention.fuse_weight"
        raise ValueError(message("load_deepfill", "path", expected, f"{path} (with another)"))
    return net


def load_sn_patch(path: str | Path) -> SNPatchDiscriminator:
    """Load a public SN-PatchGAN discriminator: on the CPU, in float32 and in evaluation mode.

    Args:
        path: a file of torch.save with {"D": state dict, ...} or the state dict alone, or a .safetensors file.
            Channels, width and depth are inferred from the weights.

    Raises:
        ValueError: as in load_deepfill.

    Source: Yu et al., ICCV 2019.
    """
    state = read_state("load_sn_patch", "path", Path(path), ("D",))
    width, inputs, *_ = _find("load_sn_patch", path, state, "conv1.conv_sn.weight").shape
    depth = sum(re.fullmatch(r"conv\d+\.conv_sn\.weight", name) is not None for name in state)
    return _build("load_sn_patch", path, lambda: SNPatchDiscriminator(inputs - 1, width, depth), state)


def save_public(path: str | Path, generator: DeepFillV2, discriminator: SNPatchDiscriminator | None = None) -> None:
    """Atomically write networks for the public code: a file of torch.save with {"G": state dict, "D": state dict}.

    Args:
        path: file to write.
        generator: the purifier, "G".
        discriminator: "D", omitted if None.

    Raises:
        TypeError: a network is of another class, which the public code cannot read.
    """
    if not isinstance(generator, DeepFillV2):
        raise TypeError(message("save_public", "generator", "a DeepFillV2", type(generator).__name__))
    content = {"G": {name: _copy(tensor) for name, tensor in generator.state_dict().items()}}
    if discriminator is not None:
        if not isinstance(discriminator, SNPatchDiscriminator):
            given = type(discriminator).__name__
            raise TypeError(message("save_public", "discriminator", "an SNPatchDiscriminator or None", given))
        content["D"] = {name: _copy(tensor) for name, tensor in discriminator.state_dict().items()}
    write_atomic(Path(path), lambda p: torch.save(content, p))


def _find(function: str, path: str | Path, state: dict[str, Tensor], name: str) -> Tensor:
    """The weights of the first convolution."""
    if name not in state or state[name].dim() != 4:
        given = f"{path} ({f'of shape {tuple(state[name].shape)}' if name in state else 'without it'})"
        raise ValueError(message(function, "path", f"a checkpoint with convolution weights {name}", given))
    return state[name]


def _build(function: str, path: str | Path, build: Callable[[], Network], state: dict[str, Tensor]) -> Network:
    """Build the network and load the weights, whose names and shapes must all match."""
    try:
        # On the meta device, so that a wrong width costs no memory, and weights about to be replaced no random numbers.
        with torch.device("meta"):
            net = build()
        if others := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
            raise ValueError(f"not of real numbers: {', '.join(others)}")
        # Check shapes first: an expanded view is small in the file but could be huge as a copy.
        net.load_state_dict({name: tensor.to("meta") for name, tensor in state.items()}, assign=True)
        copies = {name: _copy(tensor.float()) for name, tensor in state.items()}
        if others := [name for name, tensor in copies.items() if not tensor.isfinite().all()]:
            raise ValueError(f"NaN or infinity in {', '.join(others)}")
        net.load_state_dict(copies, assign=True)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        expected = "a checkpoint whose weights fit the network"
        raise ValueError(message(function, "path", expected, f"{path} ({reason})")) from error
    return net.eval()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
