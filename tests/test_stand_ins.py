"""Attacks judge the given network: only modules that can be analyzed completely are copied.

For every module of a zoo, the network that replaces it has its logits and input gradients, and afterwards the module
and every generator are as they were.
"""

from __future__ import annotations

import contextlib
import random
import time
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from atop_fast import PGD, RT1, RT2, RT3, Defense, build_classifier, build_purifier
from atop_fast.attacks import prepared
from atop_fast.attacks.network import Probe
from atop_fast.classifiers import fold_batch_norm
from atop_fast.randomness import seeded


def trunk():
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2))


def tail():
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 10))


def plain(*layers):
    return nn.Sequential(*trunk(), *layers, *tail())


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()
        self.sign, self.calls, self.seen = 1.0, 0, []

    def forward(self, x):
        return self.net(x)


def body(forward=None, **attributes):
    """A Body whose class has another forward."""
    kind = type("Odd", (Body,), {} if forward is None else {"forward": forward})
    model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


# Modules that are copied.


class Residual(nn.Module):
    def __init__(self, pick="add"):
        super().__init__()
        self.a, self.b, self.pick = trunk()[:2], nn.Conv2d(6, 6, 3, padding=1), pick
        self.norm, self.tail = nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x):
        h = F.relu(self.a(2 * x - 1))
        return self.tail(self.joined(self.norm(self.b(h)), h).mean(dim=(2, 3)))

    def joined(self, a, b):
        if self.pick == "cat":
            return torch.cat((a, b), dim=1)[:, 3:9]
        if self.pick == "mul":
            return a * torch.sigmoid(b)
        return F.silu(a + b)


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([trunk()[0], trunk()[1], nn.ELU()])
        self.heads = nn.ModuleDict({"only": nn.Linear(6, 10)})

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return self.heads["only"](x.mean(dim=(2, 3)))


class Normal(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))

    def forward(self, x):
        return self.net((x - self.mean) / 0.25)


class Own(nn.Sequential):
    """A container of somebody's own."""


def twice():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), conv, *plain())


def defense(transform=None, purifier=None, classifier=None):
    return Defense(transform or RT2(patch=4), purifier, classifier or plain().eval())


COPIED = {
    "sequential": plain,
    **{kind.__name__: lambda kind=kind: plain(kind()) for kind in (nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Sigmoid)},
    "tanh": lambda: plain(nn.Tanh()),
    "max pool": lambda: nn.Sequential(trunk()[0], nn.MaxPool2d(2), trunk()[1], nn.AvgPool2d(4), *tail()),
    "dropout": lambda: plain(nn.Dropout(0.5), nn.Dropout2d(0.5)),
    "group norm": lambda: plain(nn.GroupNorm(2, 6)),
    "identity": lambda: plain(nn.Identity()),
    "upsample": lambda: nn.Sequential(nn.Upsample(scale_factor=2), *plain()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3, bias=False), nn.BatchNorm2d(3), *plain()),
    "strided": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), *plain()),
    "dilated": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, dilation=2, padding=2), nn.BatchNorm2d(3), *plain()),
    "a convolution used twice": twice,
    "nested": lambda: nn.Sequential(nn.Sequential(trunk(), nn.Identity()), tail()),
    "own container": lambda: Own(trunk(), tail()),
    "residual": Residual,
    "concatenated": lambda: Residual("cat"),
    "gated": lambda: Residual("mul"),
    "listed": Listed,
    "normalized": lambda: Normal(plain()),
    "module with constants": body,
    "float64": lambda: plain().double(),
    "channels_last": lambda: plain().to(memory_format=torch.channels_last),
    "trained in part": lambda: plain().requires_grad_(False),
    "small_cnn": lambda: build_classifier("small_cnn", channels=3),
    "small_resnet": lambda: build_classifier("small_resnet"),
    "resnet18": lambda: build_classifier("resnet18"),
    "wrn": lambda: build_classifier("wrn_28_10", depth=10, widen=1),
    "vit": lambda: build_classifier("vit_tiny", image_size=16),
    "RT1": lambda: defense(RT1()),
    "RT2": lambda: defense(RT2(patch=4)),
    "RT3": lambda: defense(RT3()),
    "unet": lambda: defense(purifier=build_purifier("unet", channels=3, width=4)),
    "mae": lambda: defense(purifier=build_purifier("mae", image_size=16)),
    "a hidden forward in the purifier": lambda: defense(purifier=replaced(build_purifier("unet", channels=3, width=4))),
}


# Modules that are not.


def replaced(model):
    forward = model.forward
    model.forward = lambda x: forward(x).flip(1)
    return model


def inside(change):
    """The change applied to a module deep inside."""
    model = nn.Sequential(nn.Sequential(trunk()), tail())
    change(model[0][0][0])
    return model


class Called(Body):
    def __call__(self, x):
        return super().__call__(1 - x)


class CallImpl(Body):
    def _call_impl(self, x):
        return super()._call_impl(1 - x)


class Delegates(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()

    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return self.net(x)


class Count(nn.Module):
    def __init__(self):
        super().__init__()
        self.n, self.features = 0, []
        self.register_buffer("total", torch.zeros(()))


class CountCalls(Count):
    def forward(self, x):
        self.n += 1
        return x


class Features(Count):
    def forward(self, x):
        self.features.append(x)
        return x


class CountInBuffer(Count):
    def forward(self, x):
        self.total.add_(1)
        return x * (1 + 0.01 * self.total)


class Swapped(nn.Conv2d):
    """A layer of somebody's own that computes something else."""

    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * np.random.rand())


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (255 * x).round() / 255

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Quantized(nn.Module):
    def forward(self, x):
        return Rounded.apply(x)


class Turned(Defense):
    def forward(self, x, *key):
        return super().forward(1 - x, *key)


STATE, RECORD = {"sign": -1.0}, []
TEMPERATURE = torch.tensor(2.0)


def keep(x):
    RECORD.append(1)
    return x


def decorated(self, x):
    return self.net(x.round()) + Body.forward(self, x)


def choice():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = nn.ModuleList([plain(), plain()])

        def forward(self, x):
            return self.nets[int(torch.randint(2, (1,)))](x)

    return Choice()


def without_gradient(self, x):
    with torch.no_grad():
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return self.net(x - mean)


def in_autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return self.net(x).float()


def by_mode(self, x):
    return self.net(x) * (2.0 if torch.is_grad_enabled() else 1.0)


def closure():
    state = [1.0]

    def forward(self, x):
        return self.net(x) * state[0]

    return body(forward)


def hooked(register, *options):
    return inside(lambda m: getattr(m, register)(*options))


GIVEN = {
    "forward replaced": lambda: replaced(plain()),
    "forward replaced inside": lambda: inside(replaced),
    "own network, forward replaced": lambda: replaced(build_classifier("small_resnet")),
    "own block, forward replaced": lambda: (
        m := build_classifier("small_cnn", channels=3),
        replaced(next(m.children())),
    )[0],
    "method of a layer replaced": lambda: inside(
        lambda m: setattr(m, "_conv_forward", lambda x, w, b: F.conv2d(x, 2 * w, b, padding=1))
    ),
    "__call__ overridden": Called,
    "__call__ overridden inside": lambda: nn.Sequential(Called()),
    "_call_impl overridden": CallImpl,
    "__getattr__ overridden": Delegates,
    "forward hook": lambda: hooked("register_forward_hook", lambda m, x, y: 2 * y),
    "forward pre-hook": lambda: hooked("register_forward_pre_hook", lambda m, x: (1 - x[0],)),
    "full backward hook": lambda: hooked("register_full_backward_hook", lambda m, gi, go: None),
    "full backward pre-hook": lambda: hooked("register_full_backward_pre_hook", lambda m, go: (2 * go[0],)),
    "parametrized": lambda: inside(lambda m: parametrizations.orthogonal(m, "weight")),
    "weight norm": lambda: inside(parametrizations.weight_norm),
    "spectral norm": lambda: inside(torch.nn.utils.spectral_norm),
    "pruned": lambda: inside(lambda m: prune.l1_unstructured(m, "weight", 0.3)),
    "counts calls": lambda: nn.Sequential(CountCalls(), *plain()),
    "collects features": lambda: nn.Sequential(Features(), *plain()),
    "counts in a buffer": lambda: nn.Sequential(CountInBuffer(), *plain()),
    "reads a dictionary": lambda: body(lambda self, x: self.net(x) * STATE["sign"]),
    "reads a list": lambda: body(lambda self, x: self.net(x) * self.seen[0], seen=[2.0]),
    "reads a tensor from elsewhere": lambda: body(lambda self, x: self.net(x) * TEMPERATURE),
    "reads an object": lambda: body(lambda self, x: self.net(x) * self.sign.denominator, sign=np.int64(3)),
    "reads a closure": closure,
    "reads the clock": lambda: body(lambda self, x: self.net(x) + 0 * time.time()),
    "calls what records": lambda: body(lambda self, x: self.net(keep(x))),
    "draws in torch": lambda: body(lambda self, x: self.net(x + 0.1 * torch.rand(16, 16))),
    "draws like": lambda: body(lambda self, x: self.net(x + 0.1 * torch.rand_like(x))),
    "draws in Python": lambda: body(lambda self, x: self.net(x * random.random())),
    "draws in numpy": lambda: body(lambda self, x: self.net(x * float(np.random.rand()))),
    "draws in a layer": lambda: nn.Sequential(Swapped(3, 3, 1), *plain()),
    "chooses a network": choice,
    "always drops out": lambda: body(lambda self, x: self.net(F.dropout(x, 0.5, True))),
    "branches": lambda: body(lambda self, x: self.net(x if x.mean() > 0.2 else -x)),
    "branches on the mode of gradients": lambda: body(by_mode),
    "a part without gradients": lambda: body(without_gradient),
    "autocast": lambda: body(in_autocast),
    "decorated": lambda: body(torch.enable_grad()(decorated)),
    "detaches": lambda: body(lambda self, x: self.net(x + (x.round() - x).detach())),
    "own autograd function": lambda: nn.Sequential(Quantized(), *plain()),
    "writes into its input": lambda: body(lambda self, x: self.net(x.sub_(0.5).div_(0.2))),
    "in 16 bits": lambda: body(lambda self, x: self.net(x.bfloat16()).float(), net=plain().bfloat16()),
    "a norm of the batch": lambda: plain(nn.InstanceNorm2d(6)),
    "DataParallel": lambda: nn.DataParallel(plain()),
    "torch.compile": lambda: torch.compile(plain(), backend="eager"),
    "compiled in place": lambda: (m := plain(), m.compile(backend="eager"))[0],
    "scripted": lambda: torch.jit.script(plain().eval()),
    "traced": lambda: torch.jit.trace(plain().eval(), torch.rand(8, 3, 16, 16)),
    "frozen script": lambda: torch.jit.freeze(torch.jit.script(plain().eval())),
    "scripted inside": lambda: nn.Sequential(torch.jit.script(trunk().eval()), tail()),
    "a Defense of another class": lambda: Turned(RT2(patch=4), None, plain()),
    "a Defense with a hook": lambda: (m := defense(), m.register_forward_hook(lambda m, x, y: 2 * y))[0],
    "a Defense with another purify": lambda: (m := defense(), setattr(m, "purify", lambda x, *key: 1 - x))[0],
    "a Defense of a random classifier": lambda: defense(classifier=choice()),
}


def test_the_zoo_is_large():
    assert len(COPIED) + len(GIVEN) >= 90


def made(build):
    """In evaluation mode, with statistics of batch norms that are not the initial ones."""
    with seeded(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        model = build()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 2)
                nn.init.uniform_(m.weight, 0.5, 1.5)
    with contextlib.suppress(AttributeError, RuntimeError):  # frozen TorchScript has no mode
        model.eval()
    return model


def snapshot(model):
    """Everything that a caller may look at: attributes, tensors, flags, hooks, and generators."""
    found = []
    for name, m in model.named_modules():
        attributes = {k: (id(v), len(v) if isinstance(v, (list, dict)) else None) for k, v in vars(m).items()}
        found.append((name, type(m), getattr(m, "training", None), attributes))
    tensors = [
        (p.requires_grad, p.dtype, p.stride(), p.grad is None, p.detach().double().sum().item())
        for p in (*model.parameters(), *model.buffers())
    ]
    state = np.random.get_state()
    return found, tensors, torch.get_rng_state().tolist(), random.getstate(), state[1].tolist(), state[2], len(RECORD)


def response(network, x):
    leaf = x.clone().requires_grad_()
    key = (3, torch.arange(len(x)), 0) if isinstance(network, Defense) else ()
    with seeded(5):
        logits = network(leaf.clone(), *key)
        (gradient,) = torch.autograd.grad((logits * torch.arange(logits.shape[1])).sum(), leaf)
    return logits.detach(), gradient


def close(one, other, tolerance):
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [*COPIED, *GIVEN])
# Torch's compiler looks at what its input is, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_what_stands_in_for_a_model_is_the_model(name):
    model = made((COPIED | GIVEN)[name])
    size = 32 if name in ("small_resnet", "resnet18", "wrn", "own network, forward replaced") else 16
    dtype = torch.float64 if name == "float64" else torch.float32
    x = torch.rand(8, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with prepared(model, probe=Probe(x[:2], torch.arange(2))) as network:
            assert (network is model) == (name in GIVEN)
            if name in COPIED:
                assert close(response(network, x), response(model, x), 1e-9 if dtype is torch.float64 else 5e-4)
    assert snapshot(model) == before
    given = x.clone()
    out = PGD(model, eps=8 / 255, steps=8)(x, torch.arange(8))
    assert torch.equal(x, given)
    assert (out - x).abs().max() <= 8 / 255 + 1e-6
    after = snapshot(model)
    # Attributes that the model itself replaces in every call.
    if any(word in name for word in ("counts", "collects", "records", "spectral", "pruned", "frozen script")):
        RECORD.clear()
        after, before = after[2:6], before[2:6]
    assert after == before


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_count(kind):
    from torch.nn.modules import module

    register = getattr(module, f"register_module_{kind}_hook")
    handle = register(lambda *args: None)
    try:
        model = made(plain)
        assert fold_batch_norm(model) is model
    finally:
        handle.remove()
    assert fold_batch_norm(model) is not model


def test_a_copy_that_is_another_network_is_not_attacked(monkeypatch):
    """After any disagreement the model itself is attacked, and one warning names it."""
    from atop_fast.attacks import copies as module

    model, x = made(Residual), torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for scale in (0.0, 0.9, 1.1):
        model = made(Residual)

        def fold(m, dtype=None, scale=scale):
            return Normal(m).eval() if scale == 0 else _Scaled(m, scale).eval()

        monkeypatch.setattr(module, "fold_batch_norm", fold)
        with pytest.warns(RuntimeWarning, match="copy of the model Residual computes something else") as said:
            out = [PGD(model, steps=8)(x, torch.arange(8)) for _ in range(2)][1]
        assert len(said) == 1
        assert torch.equal(out, PGD(model, steps=8)(x, torch.arange(8)))
        with prepared(model) as network:
            assert network is model


class _Scaled(nn.Module):
    """The same logits, and other gradients."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, scale

    def forward(self, x):
        y = self.net(x)
        return y.detach() + self.scale * (y - y.detach())


def test_a_model_that_cannot_be_copied_is_left_alone():
    import threading

    model = made(body)
    model.lock = threading.Lock()
    assert fold_batch_norm(model) is model


def test_the_results_of_models_that_draw_depend_on_the_seed_alone():
    x = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for name in (
        "draws in torch",
        "draws in Python",
        "draws in numpy",
        "chooses a network",
        "a Defense of a random classifier",
    ):
        results = []
        for state in (1, 2):
            model = made(GIVEN[name])
            torch.manual_seed(state), random.seed(state), np.random.seed(state)
            results.append(PGD(model, steps=3, eot_iter=2)(x, torch.arange(8)))
        assert torch.equal(*results), name
