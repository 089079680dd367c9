"""The network under attack: frozen, batch norm folded into convolutions, in the layout that runs fastest.

    conv(x) * s + (b - mean) * s + beta,  s = gamma / sqrt(var + eps)        one convolution instead of two passes

What is changed is a copy; the caller's model is left as it was.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .. import purifiers
from ..defense import Defense
from ..ops.conv3x3 import FrozenConv3x3

Model = Callable[..., Tensor]
# Folding a network takes as long as some of its passes. How many images there are must not matter: rounding would
# depend on it.
WORTHWHILE = 8

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
    nn.LayerNorm, nn.GroupNorm, nn.Sequential, nn.ModuleList,
)  # fmt: skip


@contextlib.contextmanager
def prepared(model: Model, dtype: torch.dtype | None = None, passes: int = WORTHWHILE) -> Iterator[Model]:
    """The model as attacks call it: frozen inside the block, and folded where that is exact and worth its time.

    Args:
        model: a Defense, or any callable from images to logits.
        dtype: the type in which an autocast will run it: weights are cast here once instead of in every pass.
        passes: how often each image will go through it, about.

    Yields:
        A module or callable that returns what `model` returns in evaluation mode, up to rounding. Parameters get no
        gradients. Mode, buffers and requires_grad flags of `model` are restored afterwards, also after an error.
    """
    with frozen(model):
        if passes < WORTHWHILE:
            network = model
        elif type(model) is Defense:
            purifier = None if model.purifier is None else folded(model.purifier, dtype)
            network = Defense(model.transform, purifier, folded(model.classifier, dtype)).eval()
        else:
            network = folded(model, dtype) if isinstance(model, nn.Module) else model
        yield network


def folded(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy with each batch norm folded into the convolution before it, for a fast pass; or `module` itself.

    Weights are in channels_last, and in `dtype` where an autocast casts them anyway.

    `module` itself is returned where its graph is not made of well-known deterministic layers and functions alone, or
    where it has hooks. It must be in evaluation mode. The copy shares what it does not change.
    """
    graph = _traced(module)
    if graph is None:
        return _laid_out(module, dtype) if _stateless(module) else module
    layers: dict[str, Any] = dict(module.named_modules())
    uses = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        if _folds(node, layers, uses):
            source = node.args[0]
            layers[source.target] = _fused(layers[source.target], layers[node.target])
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    for target in {node.target for node in graph.nodes if node.op == "call_module"}:
        layers[target] = _laid_out(layers[target], dtype)
    root = {node.target: layers[node.target] for node in graph.nodes if node.op == "call_module"}
    attributes = [node.target for node in graph.nodes if node.op == "get_attr"]
    root |= {name: operator.attrgetter(name)(module) for name in attributes}
    return fx.GraphModule(root, graph, type(module).__name__).eval()


def _traced(module: nn.Module) -> fx.Graph | None:
    """The module's graph, or None where it may not be rewritten."""
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules()):
        return None
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # tracing runs the caller's code on symbols, which may fail in any way
        return None
    layers = dict(module.named_modules())
    for node in graph.nodes:
        known = {
            "placeholder": lambda node: True,
            "output": lambda node: True,
            "get_attr": lambda node: True,
            "call_module": lambda node: type(layers[node.target]) in _LAYERS and not layers[node.target].training,
            "call_function": lambda node: node.target in _FUNCTIONS,
            "call_method": lambda node: node.target in _METHODS,
        }[node.op](node)
        if not known:
            return None
    return graph if sum(node.op == "placeholder" for node in graph.nodes) == 1 else None


def _stateless(module: nn.Module) -> bool:
    """Whether all of `module` is this package's own: its purifiers check shapes, which no trace survives."""
    return all(type(m) in _LAYERS or type(m).__module__.startswith(f"{purifiers.__name__}.") for m in module.modules())


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


def _laid_out(module: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy for frozen passes: in channels_last, which CPUs and tensor cores prefer, and with prepared weights."""
    module = copy.deepcopy(module).requires_grad_(False).to(memory_format=torch.channels_last)
    for name, layer in list(module.named_modules()):
        if dtype is not None and isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)
        if FrozenConv3x3.accepts(layer):
            if not name:
                return FrozenConv3x3(layer)
            module.set_submodule(name, FrozenConv3x3(layer))
    return module


@contextlib.contextmanager
def frozen(*models: object) -> Iterator[None]:
    """Evaluation mode and no parameter gradients inside the block; both restored afterwards, also after an error."""
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    parameters = [p for model in models if isinstance(model, nn.Module) for p in model.parameters()]
    training, requires_grad = [m.training for m in modules], [p.requires_grad for p in parameters]
    try:
        for m in modules:
            m.training = False
        for p in parameters:
            p.requires_grad_(False)
        yield
    finally:
        for m, was in zip(modules, training, strict=True):
            m.training = was
        for p, was in zip(parameters, requires_grad, strict=True):
            p.requires_grad_(was)
