"""The caller's model and images: modes and flags, inputs that are written to, gradients that cannot be had."""

from __future__ import annotations

import threading
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from atop_fast import APGD, FGSM, PGD, RT2, AutoAttack, Defense, Square, evaluate
from atop_fast._core.flags import _HELD, holding
from atop_fast.attacks import BPDA, FAB, GradientEstimator, draw_logits, frozen
from atop_fast.defenses import GaussianNoise
from atop_fast.randomness import seeded

X = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8)


def network():
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Linear(24, 10),
        ).eval()  # fmt: skip


def modes(model):
    return [getattr(m, "training", None) for m in model.modules()], [p.requires_grad for p in model.parameters()]


WRAPPED = {
    "plain": lambda m: m,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "compiled inside": lambda m: nn.Sequential(torch.compile(m, backend="eager")),
    "DataParallel": nn.DataParallel,
    "scripted": torch.jit.script,
    "frozen script": lambda m: torch.jit.freeze(torch.jit.script(m.eval())),
    "Defense": lambda m: Defense(RT2(patch=4), None, m),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# Torch's compiler looks at what its input is, and warns of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", WRAPPED)
def test_modes_and_flags_come_back(kind, training):
    inner = network()
    inner[0].bias.requires_grad = False
    model = WRAPPED[kind](inner)
    if kind != "frozen script":
        model.train(training)
    before = modes(model), modes(inner)
    with frozen(model):
        assert not any(modes(model)[0])
        with frozen(inner), frozen(model):
            assert not any(modes(inner)[1])
    assert (modes(model), modes(inner)) == before
    PGD(model, steps=1)(X, Y)
    assert (modes(model), modes(inner)) == before
    assert not _HELD


def test_flags_that_cannot_be_set_or_put_back_leave_nothing_held():
    class Stubborn:
        flag, other = 1, 1

        def __setattr__(self, name, value):
            if name == "flag" or value == 1:
                raise KeyError(name)
            super().__setattr__(name, value)

    thing, fine = Stubborn(), torch.zeros(1, requires_grad=True)
    for name in ("flag", "other", "none"):
        with pytest.raises((KeyError, AttributeError)), holding([(fine, "requires_grad", False), (thing, name, 2)]):
            pass
        assert fine.requires_grad
        assert not _HELD


def test_flags_are_those_of_the_object_and_not_of_its_id():
    """An object that is held stays: no other one gets its id, and its flags."""
    import gc
    import weakref

    thing = nn.Linear(1, 1)
    seen = weakref.ref(thing)
    with holding([(thing, "training", False)]):
        del thing
        gc.collect()
        assert seen() is not None
    gc.collect()
    assert seen() is None


def test_models_made_in_inference_mode_are_named():
    with torch.inference_mode():
        model = network()
    with pytest.raises(ValueError, match=r"PGD: model must be made outside of torch\.inference_mode"):
        PGD(model, steps=2)(X, Y)
    assert all(p.requires_grad for p in model.parameters())
    assert not _HELD


@pytest.mark.parametrize(
    "attack", [lambda m: PGD(m, steps=8), lambda m: APGD(m, steps=2), lambda m: Square(m, n_queries=5)]
)
def test_attacks_work_in_inference_mode(attack):
    model = network()
    expected = attack(model)(X, Y)
    with torch.inference_mode():
        assert torch.equal(attack(model)(X.clone(), Y.clone()), expected)


def test_dropout_that_is_to_draw_does_so_and_is_named():
    for wrap in (lambda m: m, lambda m: Defense(RT2(patch=4), None, m), nn.Sequential):
        model = network()
        model[3].train()
        whole = wrap(model)
        block = frozen(whole)
        with pytest.warns(RuntimeWarning, match=r"in training mode, and stay so: (\w+\.)*3;"):
            block.__enter__()
        assert model[3].training
        assert not torch.equal(model(X), model(X))
        block.__exit__(None, None, None)
        with frozen(whole):  # said once
            assert model[3].training


def test_norms_in_training_mode_keep_their_statistics():
    model = network()
    model[1].train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="stay so: 1;"):
        PGD(model, steps=2)(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Holder:
    """A class around a network, such as foolbox.PyTorchModel."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)

    def logits(self, x):
        return self.net(x)


def default(m):
    def function(x, net=m):
        return net(x)

    return function


HIDDEN = {
    "closure": lambda m: lambda x: m(x),
    "nested": lambda m: (lambda f: lambda x: 2 * f(x))(lambda x: m(x)),
    "ensemble": lambda m: (lambda nets: lambda x: sum(net(x) for net in nets))([m, network()]),
    "default": default,
    "partial": lambda m: partial(torch.func.functional_call, m, {}),
    "callable object": Holder,
    "bound method": lambda m: Holder(m).logits,
    "attribute": lambda m: (lambda holder: lambda x: holder.net(x))(Holder(m)),
}


@pytest.mark.parametrize("wrap", HIDDEN.values(), ids=HIDDEN)
def test_networks_that_a_function_calls_in_training_mode_are_named_and_keep_their_statistics(wrap):
    model = network()
    function = wrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(function, steps=2)(X, Y)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="a function that calls Sequential, of which .* and stay so: 1, 3;"):
        PGD(function, steps=2)(X, Y)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("place", ["model", "forward"])
def test_networks_that_bpda_calls_by_a_function_are_named_and_keep_their_statistics(place):
    model = network().train()
    parts = {"model": (lambda x: model(x), torch.round), "forward": (nn.Identity(), lambda x: model(x), first_ten)}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(RuntimeWarning, match="the model has a function that calls Sequential, of which .* and stay so"):
        PGD(BPDA(*parts[place]), steps=2)(X, Y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def first_ten(x):
    return x.flatten(1)[:, :10]


def test_a_function_that_calls_layers_without_a_mode_causes_no_warning():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(768, 10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PGD(lambda x: model(x), steps=2)(X, Y)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x.sub_(0.5).mul_(2))


ATTACKS = {
    "PGD": lambda m: PGD(m, steps=3),
    "PGD-8": lambda m: PGD(m, steps=8, n_restarts=2),
    "APGD": lambda m: APGD(m, steps=3, n_restarts=2),
    "FAB": lambda m: FAB(m, steps=3, target_classes=2),
    "Square": lambda m: Square(m, n_queries=5),
    "Square L2": lambda m: Square(m, norm="L2", eps=0.5, n_queries=5),
    "AutoAttack": lambda m: AutoAttack(m, version="custom", attacks_to_run=["apgd-ce", "square"], steps=2, n_queries=5),
}


@pytest.mark.parametrize("kind", ["module", "function", "behind the tensor", "Defense"])
@pytest.mark.parametrize("name", ATTACKS)
def test_models_that_write_into_their_input(name, kind):
    """The result equals that of the function without the write, and the caller's images stay unchanged."""
    inner = network()

    def behind(x):
        x.data.sub_(0.5).mul_(2)
        return inner(x)

    def outside(x):
        return inner((x - 0.5) * 2)

    model, other = {
        "module": (InPlace().eval(), outside),
        "function": (lambda x: inner(x.sub_(0.5).mul_(2)), outside),
        "behind the tensor": (behind, None),
        "Defense": (Defense(RT2(patch=4), None, InPlace()), None),
    }[kind]
    x = X.clone()
    out = ATTACKS[name](model)(x, Y)
    assert torch.equal(x, X)
    assert out.min() >= 0
    assert out.max() <= 1
    if "L2" not in name:
        assert (out - x).abs().max() <= 8 / 255 + 1e-6
    if kind == "function":
        assert torch.equal(out, ATTACKS[name](other)(x, Y))


@pytest.mark.parametrize("mode", ["exact", "checkpointed", "bpda", "blind"])
def test_parts_of_a_defense_that_write_into_their_input(mode):
    """A recomputation finds its input unchanged."""
    clean = Defense(RT2(patch=4), None, network())
    writes = Defense(clean.transform, None, InPlace())

    class Outside(InPlace):
        def forward(self, x):
            return self.net((x - 0.5) * 2)

    clean.classifier = Outside()
    results = [
        GradientEstimator(m.eval(), mode)(X, Y, torch.arange(8), torch.zeros(8, dtype=torch.int64))
        for m in (clean, writes)
    ]
    assert torch.equal(results[0].gradient, results[1].gradient)


def test_frozen_script_is_evaluated():
    """It has no mode, neither for attacks nor for the checks before them."""
    model = torch.jit.freeze(torch.jit.script(network()))
    report = evaluate(model, X, model(X).argmax(dim=1), attacks={"pgd": PGD(model, steps=2)}, progress=False)
    assert report.settings["draws"] == 1


def in_place_first(in_place):
    with seeded(0):
        return nn.Sequential(
            nn.SiLU(inplace=in_place), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1176, 10)
        )


@pytest.mark.parametrize("name", ["PGD", "Square", "Square, max_batch", "checkpointed"])
def test_a_copy_whose_first_layer_works_in_place(name):
    """The network that stands in for the model writes into its input, too."""
    attacks = {
        "PGD": lambda m: PGD(m, steps=10),
        "Square": lambda m: Square(m, n_queries=20),
        "Square, max_batch": lambda m: Square(m, n_queries=20, max_batch=8),
        "checkpointed": lambda m: PGD(Defense(RT2(patch=4), None, m), steps=10, gradient="checkpointed"),
    }
    results = []
    for in_place in (False, True):
        model = in_place_first(in_place).eval()
        with torch.no_grad():
            labels = model(X.clone()).argmax(dim=1)
        x = X.clone()
        results.append(attacks[name](model)(x, labels))
        assert torch.equal(x, X)
    torch.testing.assert_close(*results)
    assert (results[0] - X).abs().max() > 0.01


def test_a_model_that_returns_the_same_memory_in_every_call():
    inner, memory = network(), torch.zeros(8, 10)

    def model(x):
        return memory[: len(x)].copy_(inner(x))

    ids, t = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    x = torch.cat((X, 1 - X))
    estimate = GradientEstimator(model, max_batch=8).logits(x, torch.arange(16), torch.zeros(16, dtype=torch.int64))
    with torch.no_grad():
        torch.testing.assert_close(estimate[:, 0], inner(x))
    assert len(ids) == len(t)


class Again(torch.autograd.Function):
    """Checkpoints as diffusion networks have them: the backward pass computes again, and wants all gradients."""

    @staticmethod
    def forward(ctx, run, x, *parameters):
        ctx.run, ctx.x, ctx.parameters = run, x, parameters
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, upstream):
        with torch.enable_grad():
            x = ctx.x.detach().requires_grad_()
            y = ctx.run(x.view_as(x))
        return None, *torch.autograd.grad(y, (x, *ctx.parameters), upstream, allow_unused=True)


class Recomputes(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = network(), kind

    def forward(self, x):
        if self.kind == "own function":
            return Again.apply(self.net, x, *self.net.parameters())
        if self.kind == "func":
            inner = torch.func.grad(lambda v: self.net(v).logsumexp(1).sum())(x)
            return self.net(x + 0.01 * inner)
        return checkpoint(self.net, x, use_reentrant=self.kind == "reentrant")


@pytest.mark.parametrize("steps", [2, 8])
@pytest.mark.parametrize("kind", ["own function", "func", "reentrant", "not reentrant"])
def test_functions_that_compute_again(kind, steps):
    model = Recomputes(kind).eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    out = PGD(model, steps=steps, random_start=False)(X, Y)
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    if kind != "func":
        assert torch.equal(out, PGD(lambda x: model.net(x), steps=steps, random_start=False)(X, Y))
    whole = Defense(RT2(patch=4), None, model)
    assert not torch.equal(PGD(whole, steps=steps, random_start=False)(X, Y), X)


@pytest.mark.parametrize(
    "cut",
    [
        lambda n: lambda x: n(x).detach(),
        lambda n: lambda x: n(x.detach()),
        lambda n: torch.no_grad()(lambda x: n(x)),
        lambda n: lambda x: F.one_hot(n(x).argmax(1), 10).float(),
    ],
)
def test_models_without_a_gradient_are_named(cut):
    for attack in (PGD, APGD, FAB):
        with pytest.raises(
            ValueError, match=rf"{attack.__name__}: model must be differentiable .* Square .* gradient='bpda'"
        ):
            attack(cut(network()), steps=2)(X, Y)
    assert Square(cut(network()), n_queries=2)(X, Y).shape == X.shape


def test_errors_of_the_model_are_passed_on():
    def model(x):
        raise RuntimeError("the model's own words")

    for attack in (PGD(model, steps=2), Square(model, n_queries=2)):
        with pytest.raises(RuntimeError, match=r"^the model's own words$"):
            attack(X, Y)


@pytest.mark.parametrize(
    ("wrap", "kind", "words"),
    [
        (
            lambda z: {"logits": z},
            TypeError,
            r"return logits \(B, classes\), got dict with \['logits'\]; wrap it: lambda x: model\(x\)\['logits'\]",
        ),
        (
            lambda z: (z, None),
            TypeError,
            r"return logits \(B, classes\), got tuple of 2; wrap it: lambda x: model\(x\)\[0\]",
        ),
        (lambda z: z.numpy(), TypeError, r"return logits \(B, classes\), got ndarray"),
        (
            lambda z: z[:, :, None],
            ValueError,
            r"be a callable with logits of shape \(B, classes\), got \(8, 10, 1\) for 8 images",
        ),
        (lambda z: z[:3], ValueError, r"be a callable with logits of shape \(B, classes\), got \(3, 10\) for 8 images"),
    ],
)
def test_other_results_than_logits_are_named(wrap, kind, words):
    net = network().requires_grad_(False)
    with pytest.raises(kind, match="Square: model must " + words):
        Square(lambda x: wrap(net(x)), n_queries=2)(X, Y)


def test_a_defense_of_another_forward_is_not_taken_apart():
    class Doubled(Defense):
        def forward(self, x, *key):
            return 2 * super().forward(x, *key)

    for mode in ("checkpointed", "bpda"):
        with pytest.raises(TypeError, match="without hooks and with the forward of Defense"):
            PGD(Doubled(RT2(patch=4), None, network()), gradient=mode)(X, Y)


def test_a_defense_that_draws_once_a_call_gets_other_draws_in_every_draw():
    class Choice(nn.Module):
        def forward(self, x):
            return x.new_zeros(len(x), 2) + torch.rand(1) + 0 * x.sum()

    state = torch.get_rng_state()
    ids = torch.arange(8)
    for rows in (None, 64):
        logits = GradientEstimator(Defense(RT2(patch=4), None, Choice()), eot_iter=5, max_batch=rows).logits(
            X, ids, 0 * ids
        )
        assert logits.flatten().unique().numel() == 5
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_of_a_set_of_images_get_other_draws_of_networks_that_draw():
    """The same noise in every block of an evaluation would make its images less independent than its intervals say."""

    class Noisy(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :2] * 0 + torch.randn(len(x), 2)

    for model in (Defense(RT2(patch=4), None, Noisy()), Noisy()):
        parts = [draw_logits(model, X, 3, ids, range(2)) for ids in torch.arange(16).split(8)]
        assert torch.equal(parts[0], draw_logits(model, X, 3, torch.arange(8), range(2)))
        assert not (parts[0] == parts[1]).any()


def test_a_transform_that_draws_is_no_fault_of_a_copy():
    """A warning, which fails this test, would ask for a report of what is meant to be so."""

    class Drawing(RT2):
        def forward(self, x, seed=0, sample_ids=None, draw=0):
            return super().forward(x, seed, sample_ids, draw) + 0.1 * torch.randn(())

    model = Defense(Drawing(patch=4), None, network())
    assert torch.equal(*(PGD(model, steps=10)(X, Y) for _ in range(2)))


def test_threads_that_attack_one_model_get_what_one_gets():
    model = Recomputes("own function").eval()
    attack = PGD(model, steps=3)
    expected, results = attack(X, Y), []
    threads = [threading.Thread(target=lambda: results.append(attack(X, Y))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)
    assert all(p.requires_grad for p in model.parameters())
    assert not _HELD


def test_fgsm_is_too_short_for_a_copy():
    model = network()
    assert torch.equal(FGSM(model)(X, Y), FGSM(lambda x: model(x))(X, Y))


def test_a_defense_that_draws_from_a_generator_of_its_own_is_refused():
    """One pass has all draws, which would share its number: the coin would be judged as deterministic."""

    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.numbers = np.random.default_rng(3)

        def forward(self, x):
            heads = float(self.numbers.random() < 0.5) + 0 * x.flatten(1).sum(dim=1, keepdim=True)
            return torch.cat((heads, 1 - heads), dim=1)

    x, y = torch.rand(8, 3, 4, 4), torch.zeros(8, dtype=torch.int64)
    with pytest.raises(ValueError, match="evaluate: model must be a Defense whose logits are a function of the key"):
        evaluate(Defense(GaussianNoise(0), None, Coin()).eval(), x, y, draws=4, progress=False, diagnostics=())
    # Repeated calls are its draws outside of a Defense, and the global generators are seeded.
    assert evaluate(Coin(), x, y, draws=4, progress=False, diagnostics=()).settings["draws"] == 4
