"""Batch norm folded into the convolution before it, and networks laid out for fast passes.

    norm(conv(x)) = conv(x) * s + (b - mean) * s + beta,  s = gamma / sqrt(var + eps)    one convolution, not two passes

Only a copy is changed; the caller's model stays as it was.
"""

from __future__ import annotations

import copy
import linecache
import operator
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .._core.checks import message
from .._core.plain import is_plain, reads_nothing_that_changes
from ..ops.conv3x3 import FrozenConv3x3
from ..ops.frozen_conv import FrozenConv
from ..randomness import watched_generators

# A graph is rewritten only if it consists of these: a module may hold state or randomness of its own, and tracing would
# bake it in.
_FUNCTIONS = {
    F.relu, F.leaky_relu, F.elu, F.gelu, F.silu, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate,
    F.linear, F.pad, torch.relu, torch.sigmoid, torch.tanh, torch.flatten, torch.cat, torch.add, torch.mul, torch.mean,
    operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv,
    operator.neg, operator.getitem, getattr,
}  # fmt: skip
_METHODS = {"view", "reshape", "flatten", "mean", "size", "contiguous", "relu", "sigmoid", "tanh", "add", "mul"}
_LAYERS = (
    nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh,
    nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Upsample, nn.Dropout, nn.Dropout2d,
    nn.LayerNorm, nn.GroupNorm, nn.Sequential, nn.ModuleList, nn.ModuleDict,
)  # fmt: skip
_FORWARDS = {kind: kind.forward for kind in _LAYERS}
# This package's own networks have no state or randomness, but their checks of shapes cannot be traced.
_OWN = tuple(f"{__name__.partition('.')[0]}.{name}" for name in ("purifiers.", "classifiers.", "_core.transformer"))


# A trace intercepts the module calls of all threads: only one may run at a time.
_TRACING = threading.Lock()


class _Tracer(fx.Tracer):
    """A tracer that ignores modules called by other threads meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


def fold_batch_norm(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a trained network for fast passes, with each batch norm folded into the convolution before it.

    A BatchNorm2d with running statistics is folded if it alone reads a Conv2d and both are called once. The weights are
    folded in float64. They are in channels_last, which CPUs and tensor cores prefer. If that can be faster,
    convolutions become FrozenConv3x3 or FrozenConv, fused with the sum and the relu that follow them.

    Args:
        model: in evaluation mode.
        dtype: the type in which an autocast will run the copy: weights of convolutions and linear layers are cast here
            once instead of in every pass. None leaves them as they are.

    Returns:
        A module with the outputs of `model` up to rounding, in evaluation mode and without parameter gradients. It does
        not follow later changes of `model`.

        `model` itself is returned if the copy might compute something else: in training mode, with hooks,
        parametrizations or patched methods, if its code reads mutable state or draws random numbers, or if it has
        anything but well-known deterministic layers and functions. This package's own networks that
        cannot be traced, the purifiers and the vision transformer, are laid out without folding. Only a deep copy is
        traced: neither `model` nor any random generator changes.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> network = fold_batch_norm(build_classifier("resnet18").eval())
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("fold_batch_norm", "model", "a torch.nn.Module", type(model).__name__))
    if not is_rewritable(model):
        return model
    try:
        copied = copy.deepcopy(model)
    except Exception:  # any object that it holds may refuse to be copied
        return model
    graph = _traced(copied)
    if graph is None:
        # A new copy: a trace that failed may have changed the first one.
        return _arranged(copy.deepcopy(model), dtype) if _stateless(model) else model
    layers: dict[str, Any] = dict(copied.named_modules())
    uses = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        if _folds(node, layers, uses):
            source = node.args[0]
            layers[source.target] = _fused(layers[source.target], layers[node.target])
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    if dtype is None:
        _fuse(graph, layers)
    for target in {node.target for node in graph.nodes if node.op == "call_module"}:
        layers[target] = _arranged(layers[target], dtype)
    root = {node.target: layers[node.target] for node in graph.nodes if node.op == "call_module"}
    attributes = [node.target for node in graph.nodes if node.op == "get_attr"]
    root |= {name: operator.attrgetter(name)(copied).detach() for name in attributes}
    folded = fx.GraphModule(root, graph, type(model).__name__).eval()
    weakref.finalize(folded, _forget, folded.forward.__code__.co_filename)
    return folded


def _forget(file: str) -> None:
    """Remove the source of a generated function, which torch would keep forever."""
    linecache.cache.pop(file, None)
    fx.graph_module._loader.eval_cache.pop(file, None)


def is_rewritable(model: nn.Module, read: list[Any] | None = None) -> bool:
    """Whether the model consists of layers whose code is known, and of modules whose code may be traced.

    `read` is that of reads_nothing_that_changes.
    """
    modules = list(model.modules())
    if any(getattr(m, "training", True) or not is_plain(m) for m in modules):
        return False
    others = [m for m in modules if not type(m).__module__.startswith(_OWN)]
    if any(type(m) in _LAYERS and type(m).forward is not _FORWARDS[type(m)] for m in others):
        return False
    return reads_nothing_that_changes((m for m in others if type(m) not in _LAYERS), read)


def _traced(copied: nn.Module) -> fx.Graph | None:
    """The graph of a copy of the model, or None if it may not be rewritten."""
    before = _state(copied)
    graphs = []
    with watched_generators() as generators:
        # The graphs differ if the code depends on the call, or on whether gradients are enabled.
        for mode in (False, True):
            try:
                with _TRACING, torch.set_grad_enabled(mode):
                    graphs.append(_Tracer().trace(copied))
            except Exception:  # tracing runs the model's code on symbols, which may fail in any way
                return None
    if generators.drawn or _state(copied) != before or str(graphs[0]) != str(graphs[1]):
        return None
    graph, model = graphs[0], copied
    layers = dict(model.named_modules())
    for node in graph.nodes:
        known = {
            "placeholder": lambda node: True,
            "output": lambda node: True,
            "get_attr": lambda node: True,
            "call_module": lambda node: type(layers[node.target]) in _LAYERS,
            "call_function": lambda node: node.target in _FUNCTIONS,
            "call_method": lambda node: node.target in _METHODS,
        }[node.op](node)
        if not known:
            return None
    return graph if sum(node.op == "placeholder" for node in graph.nodes) == 1 else None


def _state(model: nn.Module) -> list[Any]:
    """The state that a trace must leave unchanged: attributes, by identity, and versions of tensors."""
    state = list[Any]()
    for module in model.modules():
        state += [(name, id(value)) for name, value in vars(module).items()]
        for table in (module._parameters, module._buffers, module._modules):
            state += [(name, id(value), getattr(value, "_version", 0)) for name, value in table.items()]
    return state


def _stateless(model: nn.Module) -> bool:
    """Whether all of `model` is this package's own or a well-known layer."""
    return all(type(m) in _LAYERS or type(m).__module__.startswith(_OWN) for m in model.modules())


def _folds(node: fx.Node, layers: dict[str, Any], uses: list[Any]) -> bool:
    """Whether `node` is a batch norm that can go into the convolution before it."""
    if node.op != "call_module" or type(layers[node.target]) is not nn.BatchNorm2d:
        return False
    source, norm = node.args[0], layers[node.target]
    if not isinstance(source, fx.Node) or source.op != "call_module" or type(layers[source.target]) is not nn.Conv2d:
        return False
    alone = len(source.users) == 1 and uses.count(source.target) == 1 and uses.count(node.target) == 1
    return alone and norm.running_mean is not None


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """The two as one convolution, folded in float64."""
    wide = fuse_conv_bn_eval(copy.deepcopy(conv).double(), copy.deepcopy(norm).double())
    return wide.to(conv.weight.dtype).requires_grad_(False)


def _fuse(graph: fx.Graph, layers: dict[str, Any]) -> None:
    """Fuse residual sums, and a relu that follows, into convolutions whose output only the sum reads."""
    uses = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        kind = _frozen(layers[node.target]) if node.op == "call_module" and uses.count(node.target) == 1 else None
        if kind is None:
            continue
        chain, residual = [node], list[Any]()
        follower = _follower(node)
        if follower is not None and _adds(follower, node) and not _changed_between(node, follower, layers):
            chain.append(follower)
            residual = [term for term in follower.args if term is not node]
        follower = _follower(chain[-1])
        relu = follower is not None and _is_relu(follower, layers)
        chain += [follower] if follower is not None and relu else []
        layers[node.target] = kind(layers[node.target], relu)
        if len(chain) > 1:
            with graph.inserting_after(chain[-1]):
                fused = graph.call_module(node.target, (node.args[0], *residual))
            chain[-1].replace_all_uses_with(fused)
            for replaced in reversed(chain):
                graph.erase_node(replaced)


def _frozen(layer: Any) -> Any:
    """The class that replaces the layer in frozen networks, or None."""
    return next((kind for kind in (FrozenConv3x3, FrozenConv) if kind.accepts(layer)), None)


def _follower(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, if it is one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds(node: fx.Node, term: fx.Node) -> bool:
    """Whether `node` is `term` plus one other tensor. In-place, a sum is that of its first term."""
    if node.kwargs or len(node.args) != 2 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return False
    if node.args[0] is node.args[1] or (node.target is operator.iadd and node.args[0] is not term):
        return False
    return node.target in {operator.add, operator.iadd, torch.add} or (node.op, node.target) == ("call_method", "add")


def _changed_between(first: fx.Node, last: fx.Node, layers: dict[str, Any]) -> bool:
    """Whether a node between the two works in-place: the inputs of `first` may have changed at `last`."""
    node = first.next
    while node is not last:
        module = layers[node.target] if node.op == "call_module" else None
        in_place = node.target in {operator.iadd, operator.isub, operator.imul} or getattr(module, "inplace", False)
        if in_place or True in node.args or node.kwargs.get("inplace", False):
            return True
        node = node.next
    return False


def _is_relu(node: fx.Node, layers: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return type(layers[node.target]) is nn.ReLU
    return node.target in {F.relu, torch.relu} or (node.op, node.target) == ("call_method", "relu")


def _arranged(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A network, changed for frozen passes: in channels_last, and with prepared weights."""
    if isinstance(model, FrozenConv3x3 | FrozenConv):
        return model
    model = model.requires_grad_(False).to(memory_format=torch.channels_last)
    for name, layer in list(model.named_modules()):
        if dtype is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)
        if FrozenConv3x3.accepts(layer):
            if not name:
                return FrozenConv3x3(layer).train(layer.training)
            model.set_submodule(name, FrozenConv3x3(layer).train(layer.training))
    return model
