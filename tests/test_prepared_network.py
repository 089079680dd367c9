"""The network under attack: folding is exact where it is done, and the caller's model stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atop_fast import RT2, Defense, build_classifier, build_purifier
from atop_fast.attacks import frozen, prepared
from atop_fast.classifiers import fold_batch_norm
from atop_fast.ops import FrozenConv, FrozenConv3x3
from atop_fast.randomness import seeded

X = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block as CIFAR networks have it: two foldable pairs, and one norm that stands alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.alone, self.linear = nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h)) + h
        h = F.avg_pool2d(F.relu(self.alone(h)), 16)
        return self.linear(h.view(h.size(0), -1))


def trained(module):
    """In evaluation mode, with batch norm statistics and weights that are not the initial ones."""
    with seeded(0):
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return module.eval()


def norms(module):
    return sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())


def gradient(network):
    leaf = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(network(leaf).logsumexp(dim=1).sum(), leaf)
    return g


def test_folds_batch_norm_exactly():
    block = trained(Block())
    network = fold_batch_norm(block)
    assert norms(network) == 1
    torch.testing.assert_close(network(X), block(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(network), gradient(block), rtol=1e-4, atol=1e-6)
    assert norms(block) == 3


def test_a_convolution_used_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.conv(x)))

    class Read(Twice):
        def forward(self, x):
            h = self.conv(x)
            return self.bn(h) + h

    for kind in (Twice, Read):
        model = trained(kind())
        assert norms(fold_batch_norm(model)) == 1
        torch.testing.assert_close(fold_batch_norm(model)(X), model(X), rtol=1e-5, atol=1e-5)


class Counts(Block):
    """State that a trace would freeze."""

    calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x) + self.calls


class CountsInAll(Block):
    calls = 0

    def forward(self, x):
        CountsInAll.calls += 1
        return super().forward(x) + CountsInAll.calls


class Noisy(Block):
    def forward(self, x):
        return super().forward(x + torch.rand_like(x))


class NoisyByItself(Block):
    """Noise that does not depend on the input: a trace would hold one draw of it."""

    def forward(self, x):
        return super().forward(x + torch.rand(16))


class Branching(Block):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)


@pytest.mark.parametrize("kind", [Counts, CountsInAll, Noisy, NoisyByItself, Branching])
def test_models_with_state_randomness_or_branches_are_left_alone(kind):
    model = trained(kind())
    before = dict(vars(model))
    assert fold_batch_norm(model) is model
    assert vars(model) == before


@pytest.mark.parametrize(
    ("name", "options", "size", "left"),
    [
        ("resnet18_256", {"width": 16}, 64, 0),
        # Norms of sums: the first ones of the later two blocks, and the last one of all.
        ("wrn_28_10", {"depth": 10, "widen": 2}, 32, 3),
        ("vit_tiny", {"image_size": 16}, 16, 0),
    ],
)
def test_classifiers_keep_their_logits(name, options, size, left):
    model = trained(build_classifier(name, **options))
    network, x = fold_batch_norm(model), torch.rand(4, 3, size, size)
    assert network is not model
    assert norms(network) == left
    with torch.no_grad():
        expected = model(x)
        assert (network(x) - expected).norm() <= 1e-5 * expected.norm()
        model.double()
        expected = model(x.double())
        assert (fold_batch_norm(model)(x.double()) - expected).norm() <= 1e-12 * expected.norm()


def test_transformers_are_laid_out():
    purifier = build_purifier("mae", image_size=16).eval()
    nn.init.normal_(purifier.to_pixels.weight)
    network, x = fold_batch_norm(purifier, torch.bfloat16), torch.rand(2, 5, 16, 16)
    assert network.patch_embed.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.to_pixels.weight.dtype is torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), purifier(x))
    assert purifier.to_pixels.weight.dtype is torch.float32


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match=r"fold_batch_norm: model must be a torch\.nn\.Module, got builtin"):
        fold_batch_norm(len)


def test_hooks_and_training_mode_are_left_alone():
    model = trained(Block())
    model.conv1.register_forward_hook(lambda *args: None)
    assert fold_batch_norm(model) is model
    for hooked in (build_purifier("unet", width=4).eval(), build_purifier("mae", image_size=16).eval()):
        next(hooked.children()).register_forward_hook(lambda *args: None)
        assert fold_batch_norm(hooked) is hooked
    for training in (Block().train(), build_purifier("unet", width=4).train()):
        assert fold_batch_norm(training) is training


def test_purifiers_of_this_package_are_copied():
    purifier = build_purifier("unet", channels=3, width=4).eval()
    copy = fold_batch_norm(purifier)
    assert copy is not purifier
    x = torch.rand(8, 5, 16, 16)
    torch.testing.assert_close(copy(x), purifier(x), rtol=1e-5, atol=1e-6)


def test_prepared_defense_answers_as_the_defense():
    defense = Defense(RT2(4, sigma=0.1), build_purifier("unet", channels=3, width=4), trained(Block())).train()
    with prepared(defense) as network:
        assert network is not defense
        expected = defense(X, 3, None, 5)
        torch.testing.assert_close(network(X, 3, None, 5), expected, rtol=1e-4, atol=1e-5)
    assert defense.training
    assert defense.classifier.training
    assert all(p.requires_grad for p in defense.parameters())


def test_other_callables_are_passed_on():
    def model(x):
        return x.flatten(1)

    with prepared(model) as network:
        assert network is model


def test_state_is_restored_after_an_error():
    model = Block().train()
    model.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def fail():
        with prepared(model):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.training
    assert not model.bn1.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with frozen(model):
        assert not model.training


class Sums(nn.Module):
    """Operations that are fused into a convolution: sums and clamps, written in all ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.other, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = 2 * x - 1
        h = self.conv(x)
        if self.kind == "add":
            return (F.relu(h + x) + x).flatten(1)
        if self.kind == "sum":
            return torch.relu(x + h).flatten(1)
        if self.kind == "iadd":
            h += self.other(x)
            return self.relu(h).flatten(1)
        if self.kind == "read twice":
            return (F.relu(h + x) + h.mean()).flatten(1)
        if self.kind == "changed between":
            x = F.relu(x, inplace=True)
            return self.relu(h + x).flatten(1)
        if self.kind == "twice":
            return torch.relu(h + h).flatten(1)
        if self.kind == "number":
            return (h + 1.5).relu().flatten(1)
        if self.kind == "scaled":
            return torch.add(h, x, alpha=2).relu().flatten(1)
        return h.add(x.mean(dim=(2, 3), keepdim=True)).relu().flatten(1)


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("add", "add"),
        ("sum", ""),
        ("iadd", ""),
        ("read twice", "add relu mean add"),
        ("changed between", "relu add relu"),
        ("twice", "add relu"),
        ("number", "add relu"),
        ("scaled", "add relu"),
        ("broadcast", "mean"),
    ],
)
def test_sums_and_clamps_go_into_convolutions_where_they_can(kind, left):
    """And nowhere else: what is read twice, or changed in-place meanwhile, is left alone."""
    model = Sums(kind).eval().requires_grad_(False)
    network = fold_batch_norm(model)
    nodes = [node for node in network.graph.nodes if node.op.startswith("call") and "conv" not in str(node.target)]
    names = [getattr(node.target, "__name__", node.target) for node in nodes]
    assert [name for name in names if name != "other"] == ["mul", "sub", *left.split(), "flatten"]
    torch.testing.assert_close(network(X), model(X), rtol=1e-5, atol=1e-5)
    if kind != "changed between":  # of which torch has no gradient either
        torch.testing.assert_close(gradient(network), gradient(model), rtol=1e-4, atol=1e-6)


def test_residual_networks_have_fused_convolutions_alone():
    """Besides the convolutions, two reductions remain, and logits are the same in a batch of any size."""
    network = fold_batch_norm(trained(build_classifier("small_resnet")))
    kinds = [type(m) for m in network.modules() if not list(m.children())]
    assert (kinds.count(FrozenConv3x3), kinds.count(FrozenConv), kinds.count(nn.Linear)) == (4, 5, 1)
    assert sum(m.relu for m in network.modules() if isinstance(m, FrozenConv | FrozenConv3x3)) == 7
    x = torch.rand(24, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x)[8:16], network(x[8:16].clone()))


def test_a_network_of_the_registry_is_folded_without_change():
    model = build_classifier("small_cnn", channels=3).eval()
    torch.testing.assert_close(fold_batch_norm(model)(X), model(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: build_purifier("unet", channels=1, width=4),
        lambda: build_purifier("deepfill_v2", cnum=8),
        lambda: build_classifier("vit_tiny", image_size=32, patch_size=8),
    ],
)
def test_own_networks_that_no_trace_survives_are_laid_out(build):
    network = build().eval()
    assert fold_batch_norm(network) is not network
