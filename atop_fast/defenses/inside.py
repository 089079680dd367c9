"""Defenses inside a classifier: replacement of its layers, and their random numbers.

A classifier is wrapped, not rewritten: while the wrapper runs, it intercepts calls of certain functions (relu, conv2d)
by modules and by the code of a forward. Its class attribute `keyed` tells Defense to pass the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._core.checks import message
from ..randomness import derive_seed, key_tensors

Key = tuple[Tensor, Tensor, Tensor]
Compute = Callable[[Tensor], Tensor]
Replace = Callable[[Compute, Tensor, int, Key], Tensor]
CONVOLUTIONS = frozenset({torch.conv2d})
ACTIVATIONS = frozenset(
    {
        F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu,
        F.hardswish, F.softplus, F.mish, F.selu, F.celu, F.prelu, F.rrelu,
        # nn.ReLU6 calls it.
        F.hardtanh,
    }
)  # fmt: skip
IN_PLACE = (torch.relu_, Tensor.relu_)


class Replaced(nn.Module):
    """A classifier in which some functions are replaced while it is called through this wrapper.

    Args:
        model: the classifier; its weights are shared, and it is not changed. No part of it may draw by a key, which it
            would not get here.

    A subclass defines `replace` and `functions`. Calls inside compiled or TorchScript modules cannot be intercepted.
    Networks that recompute (torch.utils.checkpoint inside the classifier) are refused, because the recomputation would
    run outside of this call.

    Attributes:
        keyed: whether draws are needed: a Defense then calls the module with its key.
        functions: functions of torch that are replaced.
    """

    keyed = True
    functions: frozenset[Callable[..., Any]] = ACTIVATIONS

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(message(type(self).__name__, "model", "a torch.nn.Module", type(model).__name__))
        if keyed := [type(part).__name__ for part in model.modules() if getattr(part, "keyed", False)]:
            raise ValueError(message(type(self).__name__, "model", "a network without keyed draws", keyed[0]))
        self.model = model

    def forward(
        self, x: Tensor, seed: int | Tensor | None = None, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W) in [0, 1]; the key is as in RandomTransform.forward.

        Without a seed, torch's global generator draws one, so that calls differ as with dropout.
        """
        return self.intercepted(x, self.key(x, seed, sample_ids, draw), self.replace)

    def key(
        self, x: Tensor, seed: int | Tensor | None, sample_ids: Tensor | None = None, draw: int | Tensor = 0
    ) -> Key:
        """The key of a call as tensors."""
        if seed is None:
            # A tensor of x's device: a CUDA graph draws another one in each replay, and would repeat a number.
            seed = torch.randint(2**62, (), device=x.device) if self.keyed else 0
        return key_tensors(type(self).__name__, len(x), x.device, seed, sample_ids, draw)

    def intercepted(self, x: Tensor, key: Key, replace: Replace) -> Tensor:
        """Logits of the classifier, whose calls of `functions` go to `replace`, see there."""
        name = type(self).__name__
        with _Calls(self, key, replace) as calls:
            logits: Tensor = self.model(x)
        if not calls.count:
            some = ", ".join(sorted({getattr(f, "__name__", str(f)) for f in self.functions}))
            raise ValueError(message(name, "model", f"a network that calls one of {some}", "no such call"))
        return logits

    def replace(self, compute: Compute, x: Tensor, index: int, key: Key) -> Tensor:
        """The replacement of compute(x), x (B, ...), for call number `index` of the pass; `key` is its key."""
        raise NotImplementedError


class _Calls(TorchFunctionMode):
    """Sends the calls of one pass to a Replaced; inside `replace`, the original functions run."""

    def __init__(self, owner: Replaced, key: Key, replace: Replace) -> None:
        super().__init__()
        self.owner, self.key, self.replace, self.count = owner, key, replace, 0
        self.recording = _recording()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self.owner.functions:
            return func(*args, **(kwargs or {}))
        name, options = type(self.owner).__name__, dict(kwargs or {})
        x, *rest = args if args else (options.pop("input"),)
        ids = self.key[1]
        if x.shape[:1] != ids.shape:
            expected = f"a network whose layers keep the batch of {len(ids)} images"
            raise ValueError(message(name, "model", expected, f"a layer on {tuple(x.shape)}"))
        if _recording() != self.recording:
            expected = "a network without torch.utils.checkpoint and without no_grad"
            raise ValueError(message(name, "model", expected, "one of them around a replaced function"))
        # `inplace` is the last parameter of all functions that have it.
        writes = func in IN_PLACE or bool(options.get("inplace", rest and rest[-1] is True))

        def compute(t: Tensor) -> Tensor:
            result: Tensor = func(t.clone() if writes else t, *rest, **options)
            return result

        seed, index = derive_seed(self.key[0], self.count), self.count
        self.count += 1
        result = self.replace(compute, x.clone() if writes else x, index, (seed, *self.key[1:]))
        # The caller's code may rely on the in-place write.
        return x.copy_(result) if writes else result


def _recording() -> tuple[bool, Any]:
    """Whether autograd records, and the innermost saved-tensor hooks: a checkpoint changes one of them."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)
