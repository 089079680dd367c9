"""Copies kept from attack to attack: unchanged models get the same copy again, changed models never an old one."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import PGD, RT2, Defense, build_classifier, build_purifier
from atop_fast.attacks import copies, folding, prepared
from atop_fast.attacks.network import Probe
from atop_fast.randomness import seeded

X = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(2)
SHIFT = 0.5


class Net(nn.Module):
    """Foldable, with all that a copy may depend on: a constant, a number, a tuple, a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Tanh())
        self.act, self.linear = nn.ReLU(), nn.Linear(8, 5)
        self.scale, self.mean = 2.0, torch.full((3, 1, 1), 0.4)

    def forward(self, x):
        h = F.relu(self.bn(self.conv((x - self.mean) * self.scale)))
        return self.linear(self.act(self.blocks(h)).mean(dim=(2, 3))) + SHIFT


def net():
    with seeded(0):
        model = Net()
        model.requires_grad_(False)
        for t in model.state_dict().values():
            if t.is_floating_point():
                # Small, so that tanh does not saturate.
                t.uniform_(0.02, 0.2)
        model.linear.bias.zero_()
    return model.eval()


@pytest.fixture(autouse=True)
def none_kept(monkeypatch):
    monkeypatch.setattr(copies, "_KEPT", [])


@pytest.fixture
def folds(monkeypatch):
    """The models that were folded anew."""
    done = []

    def fold(model, dtype=None):
        done.append(model)
        return folding.fold_batch_norm(model, dtype)

    monkeypatch.setattr(copies, "fold_batch_norm", fold)
    return done


def response(model, x=X, compared=True):
    probe = Probe(x[:2], IDS) if compared else None
    with prepared(model, probe=probe) as network, torch.no_grad():
        return network(x)


def test_an_unchanged_model_is_folded_once(folds):
    model = net()
    first = response(model)
    model.train()
    model.eval()
    model.requires_grad_(False)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    assert torch.equal(response(model), first)
    assert folds == [model]
    defense = Defense(RT2(4, sigma=0.1), build_purifier("unet", channels=3, width=4), model).eval()
    attack = PGD(defense, steps=8, precision="bfloat16")
    results = [attack(X, IDS[:1].expand(8)) for _ in range(2)]
    assert torch.equal(*results)
    # Both networks in both precisions, but the classifier's float32 is known.
    assert folds.count(model) == 2
    assert folds.count(defense.purifier) == 2


def assigned(name, value):
    return lambda model: setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], value)


def by_numpy(model):
    model.conv.weight.detach().numpy()[0, 0, 0, 0] += 0.01


def by_storage(model):
    torch.from_numpy(model.linear.bias.detach().numpy()).add_(0.01)


def by_optimizer(model):
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    model.requires_grad_(False)
    for p in model.parameters():
        p.grad = None


def by_training(model):
    model.train()
    with torch.no_grad():
        model(3 * X)
    model.eval()


def swapped(model):
    weight = model.linear.weight.data
    weight[0], weight[1] = weight[1].clone(), weight[0].clone()


def reordered(model):
    parts = list(model.blocks)
    model.blocks = nn.Sequential(*(parts[i] for i in (0, 3, 2, 1))).eval()


def reordered_in_place(model):
    table = model.blocks._modules
    table["1"], table["3"] = table["3"], table["1"]


def reloaded(model):
    model.load_state_dict({name: value * 1.001 for name, value in model.state_dict().items()})


def with_hook(model):
    model.conv.register_forward_hook(lambda module, inputs, output: 2 * output)


def with_own_forward(model):
    model.forward = lambda x: Net.forward(model, x) + 1


def with_forward_of_a_layer(model):
    model.act.forward = lambda x: x + 1


CHANGES = {
    "in place": lambda model: model.conv.weight.detach().mul_(1.0001),
    "data": lambda model: model.conv.weight.data.mul_(1.0001),
    "one bit": lambda model: model.linear.weight.data.view(torch.int32)[0, 0].bitwise_xor_(1),
    "numpy": by_numpy,
    "storage": by_storage,
    "optimizer": by_optimizer,
    "statistics": by_training,
    "set_": lambda model: model.linear.bias.set_(torch.full((5,), 0.7)),
    "new data": lambda model: setattr(model.linear.bias, "data", torch.full((5,), 0.7)),
    "new parameter": assigned("linear.bias", nn.Parameter(torch.full((5,), 0.7), requires_grad=False)),
    "no bias": lambda model: model.linear.register_parameter("bias", None),
    "buffer": assigned("bn.running_mean", torch.full((8,), 0.7)),
    "buffer in place": lambda model: model.bn.running_var.add_(0.01),
    "eps of a norm": assigned("bn.eps", 0.1),
    "swap": swapped,
    "load": reloaded,
    "another layer": assigned("act", nn.Sigmoid().eval()),
    "a layer between": lambda model: model.blocks.append(nn.Tanh().eval()),
    "order": reordered,
    "order in place": reordered_in_place,
    "a layer twice": lambda model: setattr(model, "act", model.blocks[3]),
    "padding": assigned("conv.padding", (0, 0)),
    "padding mode": assigned("conv.padding_mode", "reflect"),
    "number": assigned("scale", 3.0),
    "tensor": lambda model: model.mean.add_(0.1),
    "new tensor": assigned("mean", torch.full((3, 1, 1), 0.6)),
    "hook": with_hook,
    "instance's forward": with_own_forward,
    "layer's forward": with_forward_of_a_layer,
    "training": lambda model: model.bn.train(),
    "type": lambda model: model.double(),
    "class": lambda model: setattr(model, "__class__", Other),
    "sign of zero": lambda model: model.linear.bias.data.neg_(),
}


class Other(Net):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.filterwarnings("ignore")
def test_any_change_is_seen(name, folds):
    """A model that is used before and after a change answers as one that was never used."""
    used, new, x = net(), net(), X.double() if name == "type" else X
    response(used)
    for model in (used, new):
        CHANGES[name](model)
    found = response(used, x)
    assert folds[1] is used
    copies._KEPT.clear()
    assert torch.equal(found, response(new, x))
    with torch.no_grad():
        torch.testing.assert_close(found, new(x), rtol=1e-4, atol=1e-4)
    assert len(copies._KEPT) == (name not in ("hook", "instance's forward", "layer's forward", "training"))


def patched_class(monkeypatch):
    monkeypatch.setattr(Net, "forward", lambda self, x: self.linear(self.conv(x).mean(dim=(2, 3))))


def patched_code(monkeypatch):
    function = types.FunctionType(Other.forward.__code__, globals(), closure=Net.__init__.__closure__)
    assert function.__code__ is not Net.forward.__code__
    monkeypatch.setattr(Net.forward, "__code__", (lambda self, x: self.linear(self.conv(x).mean(dim=(2, 3)))).__code__)


OUTSIDE = {
    "class": patched_class,
    "code": patched_code,
    "constant": lambda patch: patch.setitem(globals(), "SHIFT", 0.75),
    "kind of a constant": lambda patch: patch.setitem(globals(), "SHIFT", True),
    "layer's class": lambda patch: patch.setattr(nn.Tanh, "forward", lambda self, x: 2 * x),
    "torch's function": lambda patch: patch.setattr(F, "relu", lambda x, inplace=False: x + 0.5),
    "hook of all modules": lambda patch: None,
}


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.filterwarnings("ignore")
def test_changes_outside_of_the_model_are_seen(name, monkeypatch):
    model = net()
    before = response(model)
    OUTSIDE[name](monkeypatch)
    hook = None
    if name == "hook of all modules":
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: 2 * output if isinstance(module, nn.Tanh) else None
        )
    try:
        found = response(model)
        with torch.no_grad():
            expected = model(X)
    finally:
        if hook is not None:
            hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before)


def test_what_cannot_be_compared_is_not_kept(folds):
    model = net()
    model.unread = object()
    for _ in range(2):
        response(model)
    assert folds == [model, model]
    assert not copies._KEPT
    copies.copy_of(build_classifier("small_cnn", channels=3).eval().to("meta"), None)
    assert not copies._KEPT


def test_trainings_fold_anew(folds):
    """Without images to compare at, and so in a captured update, which reads the weights of each replay."""
    model = net()
    for _ in range(2):
        response(model, compared=False)
    assert not folds
    assert not copies._KEPT


def test_models_and_their_copies_are_freed():
    model = net()
    response(model)
    copy = weakref.ref(copies._KEPT[0].network)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None
    assert copy() is None
    assert not copies._KEPT


def test_memory_is_bounded(monkeypatch):
    models = [net() for _ in range(3)]
    response(models[0])
    monkeypatch.setattr(copies, "LIMIT", int(2.5 * copies._KEPT[0].size()))
    for model in models:
        response(model)
    assert [k.model() for k in copies._KEPT] == models[1:]
    monkeypatch.setattr(copies, "LIMIT", 100)
    response(models[0])
    assert not copies._KEPT
