"""The network under attack: frozen, batch norm folded into convolutions, in the layout that runs fastest."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._core.flags import holding
from .._core.hidden import foreign_modules
from .._core.plain import is_plain
from ..defense import Defense
from ..randomness import watched_generators
from .copies import copy_of, forget
from .folding import fold_batch_norm

Model = Callable[..., Tensor]
# Folding a network takes as long as some of its passes. The decision must not depend on the number of images:
# rounding would, too.
WORTHWHILE = 8
# Tolerances of a copy's outputs and gradients, relative to their norms; docs/reliability.md has the measurements.
TOLERANCES = {torch.float64: (1e-9, 1e-6), torch.float32: (1e-3, 3e-2)}
# Copies that replace models: they draw no random numbers and do not write into their input.
_PACKAGE = __name__.partition(".")[0]
_COPIES: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Models whose copy turned out to compute something else.
_UNLIKE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_SAID: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class Probe(NamedTuple):
    """Images at which a copy must agree with its model."""

    x: Tensor  # (B, C, H, W), in [0, 1]
    ids: Tensor  # int64 (B,): sample ids; with the seed, they key the draw of a Defense, number 0
    seed: int = 0


@contextlib.contextmanager
def prepared(
    model: Model, dtype: torch.dtype | None = None, passes: int = WORTHWHILE, probe: Probe | None = None
) -> Iterator[Model]:
    """The model as attacks call it: frozen inside the block, and folded if that is exact and worth its time.

    Args:
        model: a Defense, or any callable from images to logits.
        dtype: the type in which an autocast will run it: weights are cast here once instead of in every pass.
        passes: approximate number of passes of each image.
        probe: images at which logits and input gradients of the copy must be the model's, up to rounding; else the
            model itself is yielded, with a warning, now and later. None: the copy is not compared.

    Yields:
        A module or callable that returns what `model` returns in evaluation mode, up to rounding. Parameters get no
        gradients. Mode, buffers and requires_grad flags of `model` are restored afterwards, also after an error.
    """
    with frozen(model):
        network = model
        if isinstance(model, nn.Module) and passes >= WORTHWHILE and model not in _UNLIKE:
            # Values cannot be read while a CUDA graph is captured.
            if probe is None or (probe.x.is_cuda and torch.cuda.is_current_stream_capturing()):
                network = _copied(model, dtype, fold_batch_norm)
            else:
                network = _compared(model, dtype, probe)
        yield network


def is_copy(network: object) -> bool:
    """Whether prepared() made all of this network, so that it neither draws nor writes into its input."""
    return isinstance(network, nn.Module) and network in _COPIES


def _compared(model: nn.Module, dtype: torch.dtype | None, probe: Probe) -> nn.Module:
    """A copy that agrees with the model at the probe, or the model itself."""
    for last in (False, True):
        network = _copied(model, dtype, copy_of)
        # Rounding in lower precision would hide errors: the copy is compared in the model's own precision.
        exact = network if dtype is None or network is model else _copied(model, None, copy_of)
        if exact is model:
            return network
        if agrees(model, exact, probe, last):
            if exact not in _COPIES:
                _COPIES.discard(network)
            return network
        # A copy that was kept might not know of a change, such as a function of torch that was replaced.
        forget(model)
    return model


def _copied(
    model: nn.Module, dtype: torch.dtype | None, fold: Callable[[nn.Module, torch.dtype | None], nn.Module]
) -> nn.Module:
    """A copy for fast passes, or the model itself."""
    if type(model) is not Defense:
        network, known = fold(model, dtype), True
    elif not is_plain(model) or model.training:
        return model
    else:
        parts = [model.classifier] if model.purifier is None else [model.classifier, model.purifier]
        folded = [fold(part, dtype) for part in parts]
        if all(a is b for a, b in zip(parts, folded, strict=True)):
            return model
        network = Defense(model.transform, folded[1] if model.purifier is not None else None, folded[0]).eval()
        known = _is_ours(model.transform) and not any(a is b for a, b in zip(parts, folded, strict=True))
    if known and network is not model:
        _COPIES.add(network)
    return network


def _is_ours(transform: nn.Module) -> bool:
    """Whether all of a transform is this package's code, unchanged: one may hold another, such as a user's."""
    modules = list(transform.modules())
    return all(type(m).__module__.startswith((f"{_PACKAGE}.", "torch.nn.modules.")) and is_plain(m) for m in modules)


def agrees(model: nn.Module, network: nn.Module, probe: Probe, last: bool = True) -> bool:
    """Whether the network computes what the model does at the probe.

    If not, and this comparison is the `last`, the model gets no further copies, and a warning follows, once.
    """
    with watched_generators() as generators:
        try:
            expected = _response(model, probe)
        except Exception:  # the attack will raise the model's own error
            return False
    if generators.drawn:
        # Its calls differ with or without a copy.
        if last:
            _UNLIKE.add(model)
        return False
    with watched_generators() as generators:
        try:
            given = _response(network, probe)
        except Exception:  # any error of the copy alone is a disagreement
            given = None
    if not generators.drawn and given is not None and _are_close(given, expected):
        return True
    if last and expected[0].isfinite().all():
        _UNLIKE.add(model)
        name = type(model).__name__
        _say_once(
            model,
            f"a faster copy of the model {name} computes something else than {name}, which is attacked as it is; "
            "please report it, with the model",
        )
    return False


def _response(network: nn.Module, probe: Probe) -> tuple[Tensor, Tensor | None]:
    """Logits, and the input gradient of a fixed combination of them, if there is one."""
    leaf = probe.x.clone().requires_grad_()
    key = (probe.seed, probe.ids, 0) if isinstance(network, Defense) else ()
    with torch.enable_grad(), torch.autocast(leaf.device.type, enabled=False):
        copied = leaf.clone()
        version = copied._version
        logits = network(copied, *key)
        if copied._version != version:
            # A first layer such as an in-place relu: it must still get copies.
            _COPIES.discard(network)
        weights = (2.4 * torch.arange(logits.shape[-1], device=leaf.device)).cos()
        total = (logits * weights.to(logits.dtype)).sum()
    if not total.requires_grad:
        return logits, None
    return logits.detach(), torch.autograd.grad(total, leaf, allow_unused=True)[0]


def _are_close(given: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> bool:
    if given[0].shape != expected[0].shape or given[0].dtype != expected[0].dtype:
        return False
    if (given[1] is None) != (expected[1] is None):
        return False
    # Rounding of networks in 16 bits cannot be told from an error.
    tolerances = TOLERANCES.get(expected[0].dtype)
    if tolerances is None:
        return False
    for one, other, tolerance in zip(given, expected, tolerances, strict=True):
        if one is None or other is None:
            continue
        a, b = one.flatten(1).double(), other.flatten(1).double()
        # An offset common to all logits does not matter, but it is rounded, too.
        size = (b - b.mean(dim=1, keepdim=True)).norm(dim=1) + 1e-2 * b.norm(dim=1)
        if not bool(((a - b).norm(dim=1) <= tolerance * size + 1e-30).all()):
            return False
    return True


@contextlib.contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; both restored afterwards, also after an error.

    A module in training mode below one in evaluation mode was left so on purpose, such as dropout that is meant to
    draw: it keeps its mode, with a warning, and its buffers are restored. So does a module in training mode that a
    plain function calls, which is the model or an attribute of it, as in BPDA. If several blocks share a network,
    nested or in threads, the last one restores it.
    """
    flags: list[tuple[object, str, object]] = []
    kept: list[nn.Module] = []
    for model in models:
        kept += _called_in_training(model)
        if not isinstance(model, nn.Module):
            continue
        evaluated, training = _modes(model)
        if training:
            _say_once(
                model,
                f"{type(model).__name__} is in evaluation mode, but these of its modules are in training mode, and "
                f"stay so: {_some(training)}; call eval() on the model if that is not intended",
            )
        flags += [(module, "training", False) for module in evaluated]
        flags += [(p, "requires_grad", False) for p in model.parameters() if p.is_leaf]
        kept += training.values()
    buffers = [(b, b.clone()) for module in kept for b in module.buffers(recurse=False)]
    try:
        with holding(flags):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _modes(model: nn.Module) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """The modules that belong in evaluation mode, and, by name, those that were left in training mode on purpose."""
    evaluated: list[nn.Module] = []
    training: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, on_purpose: bool) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        # Frozen TorchScript lacks the attribute.
        mode = getattr(module, "training", None)
        if mode and on_purpose:
            training[name] = module
        # A module of torch.compile shows the flag of the one in it.
        elif mode is not None and "_orig_mod" not in module._modules:
            evaluated.append(module)
        for part, child in module.named_children():
            visit(f"{name}.{part}".lstrip("."), child, on_purpose if mode else mode is not None)

    visit("", model, False)
    return evaluated, training


def _called_in_training(model: object) -> list[nn.Module]:
    """Modules in training mode, by which they compute otherwise, that plain functions call; a warning names them."""
    found: list[nn.Module] = []
    verb = "has" if isinstance(model, nn.Module) else "is"
    for network in foreign_modules(model):
        if not getattr(network, "training", False):
            continue
        training = {name: m for name, m in network.named_modules() if _depends_on_mode(m)}
        if training:
            _say_once(
                network,
                f"the model {verb} a function that calls {type(network).__name__}, of which these modules are in "
                f"training mode, and stay so: {_some(training)}; call eval() on it if that is not intended",
            )
        found += training.values()
    return found


def _some(names: Iterable[str]) -> str:
    """The first five of the names of modules."""
    found = [name or "itself" for name in names]
    return ", ".join(found[:5]) + (" ..." if len(found) > 5 else "")


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a module is in training mode, and its forward asks for the mode; a dropout of p = 0 does not count."""
    code = getattr(getattr(type(module), "forward", None), "__code__", None)
    reads = code is not None and "training" in code.co_names
    return reads and getattr(module, "training", False) and getattr(module, "p", 1) != 0


def _say_once(model: nn.Module, text: str) -> None:
    """Warn, once for each model."""
    said = _SAID.setdefault(model, set())
    if text not in said:
        said.add(text)
        warnings.warn(text, RuntimeWarning, stacklevel=4)
