"""The gated U-Net, classifiers, Defense and their files."""

from __future__ import annotations

import copy
import functools
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atop_fast import (
    PGD,
    RT1,
    RT2,
    RT3,
    Defense,
    FinetuneConfig,
    PretrainConfig,
    build_classifier,
    build_purifier,
    evaluate,
    finetune,
    load_model,
    pretrain,
    save_model,
)
from atop_fast._core import transformer as _transformer
from atop_fast._core.files import load_weights
from atop_fast.checkpoints import read_header
from atop_fast.classifiers import fold_batch_norm
from atop_fast.ops.conv3x3 import FrozenConv3x3
from atop_fast.ops.frozen_conv import FrozenConv
from atop_fast.purifiers import PURIFIERS, GatedUNet, MaskedAutoencoder, mae
from atop_fast.randomness import seeded
from atop_fast.training import PretrainStep

X = torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 32, 32), (3, 4, 8), (5, 20, 12)])
def test_unet_takes_any_size_divisible_by_four(channels, height, width):
    y = GatedUNet(channels, width=4)(torch.randn(2, channels + 2, height, width))
    assert y.shape == (2, channels, height, width)
    assert y.abs().max() <= 1.02


def test_unet_starts_as_a_contrast_of_its_input():
    z = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(GatedUNet(1, 4)(z), 1.02 * torch.tanh(2 * z[:, :1]))


def test_shuffled_unet_is_the_unet_on_unshuffled_images():
    """The network on s x s times the channels, built from the other's parts."""
    with seeded(0):
        net = GatedUNet(2, 8, blocks=1, shuffle=2)
        nn.init.normal_(net.to_image.weight, std=0.1)
    z = torch.randn(3, 4, 16, 24)
    plain = GatedUNet(8, 8, blocks=1)
    plain.down0.conv = nn.Conv2d(16, 16, 3, padding=1)
    plain.load_state_dict(net.state_dict())
    # 16 channels as [image, two more]: what the plain network adds to is its first 8, here those of 2z's pixels.
    inner = F.pixel_unshuffle(z, 2)
    plain.down0.register_forward_pre_hook(lambda module, args: (inner,))
    y = plain(torch.cat((inner[:, :8], torch.zeros(3, 2, 8, 12)), 1))
    torch.testing.assert_close(net(z), F.pixel_shuffle(y, 2))
    with pytest.raises(ValueError, match=r"divisible by 8, got \(1, 4, 12, 16\)"):
        net(torch.rand(1, 4, 12, 16))


@pytest.mark.parametrize("shuffle", [1, 2])
def test_unet_channels_last_agrees(shuffle):
    with seeded(0):
        net = GatedUNet(3, 8, shuffle=shuffle)
        nn.init.normal_(net.to_image.weight, std=0.05)
    z = torch.randn(2, 5, 16, 16)
    y = copy.deepcopy(net).to(memory_format=torch.channels_last)(z.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, net(z), rtol=1e-4, atol=1e-5)


def test_unet_gradients_reach_every_parameter():
    net = GatedUNet(1, 4)
    nn.init.normal_(net.to_image.weight)
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_first_updates_of_wide_unets_are_as_large_as_those_of_narrow_ones():
    """Updates that grow with the width drove large networks into tanh's saturation."""

    def change(width):
        with seeded(0):
            net = GatedUNet(1, width)
        step = PretrainStep(RT2(4, sigma=0.1), net.train(), None, PretrainConfig(gan_weight=0, lr=1e-3), 0)
        labels = torch.zeros(4, dtype=torch.int64)
        for _ in range(3):
            step(X, labels, torch.arange(4), 0)
        z = RT2(4, sigma=0.1)(X)
        with torch.no_grad():
            return ((net(z) / 1.02).atanh() - 2 * z[:, :1]).abs().mean().item()

    narrow, wide = change(8), change(48)
    assert narrow > 0
    assert wide < 2 * narrow


def test_unets_of_earlier_files_keep_their_gain(tmp_path):
    net = GatedUNet(1, 24)
    nn.init.normal_(net.to_image.weight)
    earlier = {name: value for name, value in net.state_dict().items() if name != "gain"}
    loaded = GatedUNet(1, 24)
    loaded.load_state_dict(earlier)
    assert net.gain == 4
    assert loaded.gain == 8
    path = tmp_path / "earlier.safetensors"
    header = {"kind": "purifier", "name": "unet", "options": {"channels": 1, "width": 24}}
    save_file(earlier, path, {"atop_fast": json.dumps(header)})
    z = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(load_model(path, "purifier")(z), loaded(z))


def test_unet_grows_and_starts_as_the_one_without_blocks():
    with seeded(0):
        small = GatedUNet(3, 8)
    grown = GatedUNet(3, 8, blocks=2)
    missing = grown.load_state_dict(small.state_dict(), strict=False).missing_keys
    assert missing
    assert all("_blocks." in name for name in missing)
    nn.init.normal_(small.to_image.weight)
    grown.load_state_dict(small.state_dict(), strict=False)
    z = torch.randn(2, 5, 16, 16)
    torch.testing.assert_close(grown(z), small(z))
    with torch.device("meta"):
        assert sum(p.numel() for p in GatedUNet(width=32, blocks=2).parameters()) == 2_199_971


def test_autoencoder_does_not_depend_on_the_batch_nor_see_masked_patches():
    with seeded(0):
        net = MaskedAutoencoder(1, 16, 4)
        nn.init.normal_(net.to_pixels.weight)
    z = torch.cat([RT1(4, ratio)(X) for ratio in (0.25, 0.75, 1.0)])
    with torch.no_grad():
        y = net(z)
        torch.testing.assert_close(torch.cat([net(part) for part in z.split(5)]), y, rtol=1e-4, atol=1e-5)
        hidden = torch.where(z[:, -1:] == 1, torch.cat((torch.rand_like(z[:, :1]), z[:, 1:]), 1), z)
        torch.testing.assert_close(net(hidden), y)
        partly = z.clone()
        partly[:, -1, :2, :2] = 1
        assert not torch.allclose(net(partly)[:4], y[:4])


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: MaskedAutoencoder(1, 16, 4), lambda: GatedUNet(1, 4, blocks=2)])
def test_checkpointing_and_compiling_change_nothing(build, monkeypatch):
    monkeypatch.setitem(_transformer.SIZES, "tiny", (64, 2, 2))
    monkeypatch.setitem(mae.DECODERS, "tiny", (32, 1, 1))
    with seeded(0):
        net = build()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.05)
    z = RT1(4)(X)
    expected = torch.autograd.grad(net(z).square().sum(), list(net.parameters()))
    net.checkpointing = True
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for module in (net, compiled):
        torch.testing.assert_close(torch.autograd.grad(module(z).square().sum(), list(net.parameters())), expected)


@pytest.mark.slow
def test_autoencoder_learns_to_restore_masked_patches(monkeypatch):
    """Waves of random direction and phase: masked pixels come out better than as gray or as the mean image."""

    def waves(count):
        angle, at = torch.rand(count, 3, 1, 1), torch.arange(16) / 16 * 6.28
        slope = 2 * angle[:, :2] - 1
        phase = slope[:, 0] * at[:, None] + slope[:, 1] * at + 6.28 * angle[:, 2]
        return (0.5 + 0.45 * torch.sin(phase))[:, None]

    monkeypatch.setitem(_transformer.SIZES, "tiny", (64, 3, 2))
    monkeypatch.setitem(mae.DECODERS, "tiny", (32, 2, 1))
    images, unseen, transform = waves(512), waves(64), RT2(4, 0.5, 0.1)
    net = MaskedAutoencoder(1, 16, 4)
    config = PretrainConfig(epochs=10, batch_size=32, lr=1e-3, gan_weight=0)
    history = pretrain(net, transform, images, config=config, progress=False)
    assert history[-1]["l1"] < 0.6 * history[0]["l1"]
    z, wanted = transform(unseen), 2 * unseen - 1
    masked = z[:, -1:] == 1
    with torch.no_grad():
        error = (net(z) - wanted)[masked].square().mean()
    assert error < 0.6 * wanted[masked].square().mean()
    assert error < 0.6 * ((2 * images - 1).mean(0, keepdim=True) - wanted)[masked].square().mean()


@pytest.mark.parametrize(("stride", "side"), [(1, 16), (2, 8)])
def test_resnet_halves_the_resolution_and_doubles_the_channels(stride, side):
    net = build_classifier("resnet18", channels=2, classes=7, width=4, blocks=(1, 2, 1), stride=stride).eval()
    shapes = []
    for stage in (net.layer1, net.layer2, net.layer3):
        stage.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[1:])))
    assert net(torch.rand(2, 2, 16, 16)).shape == (2, 7)
    assert shapes == [(4, side, side), (8, side // 2, side // 2), (16, side // 4, side // 4)]
    assert [len(stage) for stage in (net.layer1, net.layer2, net.layer3)] == [1, 2, 1]


def test_image_resnet_follows_its_formula():
    """AToP's ablation network, written out with functions and the names of its public files."""
    with seeded(0):
        net = build_classifier("resnet18_256", width=16).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.uniform_(module.bias)
    state, used = net.state_dict(), set()

    def weight(name):
        used.add(name)
        return state[name]

    def conv(h, name, stride=1, padding=1):
        return F.conv2d(h, weight(f"{name}.weight"), None, stride, padding)

    def norm(h, name):
        names = ("running_mean", "running_var", "weight", "bias")
        used.add(f"{name}.num_batches_tracked")
        return F.batch_norm(h, *(weight(f"{name}.{key}") for key in names))

    x = torch.rand(2, 3, 256, 256)
    h = F.max_pool2d(F.relu(norm(conv(x * 2 - 1, "conv1", 2), "bn1")), 3, 2, 1)
    shapes = []
    for stage, stride in enumerate((1, 2, 2, 2), 1):
        for block, step in enumerate((stride, 1)):
            at, short = f"layer{stage}.{block}", h
            if step == 2:
                short = norm(conv(h, f"{at}.shortcut.0", 2, 0), f"{at}.shortcut.1")
            h = F.relu(norm(conv(h, f"{at}.conv1", step), f"{at}.bn1"))
            h = F.relu(norm(conv(h, f"{at}.conv2"), f"{at}.bn2") + short)
        shapes.append(tuple(h.shape[1:]))
    assert shapes == [(16, 64, 64), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    pooled = F.avg_pool2d(h, 8, stride=1)
    assert pooled.shape == (2, 128, 1, 1)
    expected = F.linear(pooled.flatten(1), weight("linear.weight"), weight("linear.bias"))
    assert used == set(state)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_resnet9_follows_its_formula():
    with seeded(0):
        net = build_classifier("resnet9", channels=2, classes=7, widths=(8, 6, 10)).eval()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.weight)
                nn.init.uniform_(module.bias)
    state = net.state_dict()

    def conv(h, name):
        return F.conv2d(h, state[f"{name}.weight"], padding=1)

    def norm(h, name):
        return F.batch_norm(h, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    def pair(h, name):
        inner = F.relu(norm(conv(h, f"{name}.conv1"), f"{name}.bn1"))
        return h + F.relu(norm(conv(inner, f"{name}.conv2"), f"{name}.bn2"))

    def pooled(h, name):
        return F.relu(norm(F.max_pool2d(conv(h, f"{name}.conv"), 2), f"{name}.bn"))

    x = torch.rand(3, 2, 16, 24)
    h = F.relu(norm(conv(2 * x - 1, "conv"), "bn"))
    assert h.shape == (3, 4, 16, 24)
    h = pair(pooled(h, "layer1.0"), "layer1.1")
    h = pooled(h, "layer2")
    assert h.shape == (3, 6, 4, 6)
    h = pair(pooled(h, "layer3.0"), "layer3.1")
    assert h.shape == (3, 10, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(net(x), F.linear(h.mean((2, 3)), state["linear.weight"], state["linear.bias"]))


def test_resnet9_is_as_large_and_as_costly_as_its_docstring_says():
    net = build_classifier("resnet9")
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 1.6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.rand(1, 3, 32, 32))
    assert round(counter.get_total_flops() / 1e9, 2) == 0.19


def test_resnet9_under_attack_has_prepared_convolutions():
    """All but the first, which has too few channels for them, and is a FrozenConv."""
    with seeded(0):
        net = build_classifier("resnet9", widths=(32, 32, 32))
        for _ in range(3):
            net(torch.rand(8, 3, 32, 32))
    frozen = fold_batch_norm(net.eval())
    kinds = [type(module) for module in frozen.modules()]
    assert (kinds.count(FrozenConv3x3), kinds.count(FrozenConv), kinds.count(nn.Conv2d)) == (7, 1, 0)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x), rtol=1e-3, atol=1e-4)


def test_resnet18_equals_pyautoattacks(monkeypatch):
    """Another's network with the same parameters gives the same logits."""
    pyautoattack = pytest.importorskip("pyautoattack")
    monkeypatch.syspath_prepend(str(Path(pyautoattack.__file__).parent / "examples"))
    theirs = importlib.import_module("resnet").ResNet18().eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var)
    ours = build_classifier("resnet18").eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", ["small_cnn", "small_resnet", "resnet9"])
def test_classifier_files_round_trip(name, tmp_path):
    net = build_classifier(name, channels=2).eval()
    save_model(tmp_path / "c.safetensors", net, "classifier", name, channels=2)
    x = torch.rand(2, 2, 16, 16)
    assert torch.equal(load_model(tmp_path / "c.safetensors", "classifier")(x), net(x))


class Identity(nn.Module):
    """Passes the masked image on."""

    def forward(self, z):
        return z[:, :-2]


@pytest.mark.parametrize("transform", [RT1(4, 0.0), RT2(4, 0.0, 0.0), RT2(4, 0.25, 0.0)], ids=repr)
def test_defense_without_effect_is_the_classifier(transform):
    classifier = build_classifier("small_cnn", channels=1).eval()
    purified = Defense(transform, None, classifier).purify(X, draw=0)
    kept = transform(X, 0, None, 0)[:, -1:] == 0
    torch.testing.assert_close(purified[kept], X[kept])
    assert (purified[~kept] == 0.5).all()
    assert torch.equal(Defense(transform, Identity(), classifier)(X, draw=0), classifier(purified))


def test_defense_assembles_rt3():
    """A purifier that paints every copy in its own value: each pixel must come from the copy that masked it."""

    class Paint(nn.Module):
        def forward(self, z):
            return (torch.arange(len(z)) % 4 / 10)[:, None, None, None] * torch.ones_like(z[:, :1])

    transform = RT3(4, 4, 0.0)
    purified = Defense(transform, Paint(), nn.Identity()).purify(X, draw=0)
    masks = transform(X, 0, None, 0)[:, -1].unflatten(0, (4, 4))
    expected = (masks * torch.arange(4)[None, :, None, None] / 10).sum(1, keepdim=True)
    torch.testing.assert_close(purified, (expected + 1) / 2)


def test_defense_takes_a_new_draw_with_every_bare_call():
    def fresh():
        return Defense(RT2(4), None, nn.Flatten())

    defense, state = fresh(), torch.get_rng_state()
    first, second = defense(X), defense(X)
    assert not torch.equal(first, second)
    assert torch.equal(first, defense(X, draw=0))
    assert torch.equal(second, defense(X, draw=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert "draw" not in defense.state_dict()


@pytest.mark.parametrize(
    ("call", "error", "pattern"),
    [
        (
            lambda: GatedUNet(1)(X),
            ValueError,
            r"GatedUNet: x must be of shape \(B, 3, H, W\) with H and W divisible by 4",
        ),
        (lambda: GatedUNet(1)(torch.rand(1, 3, 6, 8)), ValueError, r"divisible by 4, got \(1, 3, 6, 8\)"),
        (
            lambda: Defense(nn.Identity(), None, nn.Identity()),
            TypeError,
            "Defense: transform must be a RandomTransform",
        ),
        (lambda: Defense(RT1(4), None, len), TypeError, "Defense: classifier must be a torch.nn.Module, got builtin"),
        (
            lambda: build_purifier("vae"),
            ValueError,
            "build_purifier: name must be one of 'deepfill_v2', 'mae', 'unet', 'residual_filters', got 'vae'",
        ),
        (lambda: build_classifier("resnet18", blocks=()), ValueError, r"ResNet: blocks must be .*, got \(\)"),
        (lambda: build_classifier("resnet18", blocks=(0,)), ValueError, "ResNet: blocks must be an integer and >= 1"),
        (lambda: build_classifier("x"), ValueError, "name must be one of 'small_cnn', .* got 'x'"),
    ],
)
def test_wrong_input_is_named(call, error, pattern):
    with pytest.raises(error, match=pattern):
        call()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_model_files_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_model(tmp_path / "m.safetensors", build_purifier("unet", width=4), "purifier", "unet", width=4)
    finally:
        os.umask(before)
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_weights_of_another_network_are_named_by_threes():
    """And counted: a network has hundreds."""
    other, own = (build_classifier(name, width=4) for name in ("small_cnn", "resnet18"))
    with pytest.raises(ValueError, match=r"^Missing key") as error:
        load_weights(own, other.state_dict())
    missing, unexpected = (set(a.state_dict()) - set(b.state_dict()) for a, b in ((own, other), (other, own)))
    first, second, *_ = str(error.value).split("; ")
    assert first.endswith(f"and {len(missing) - 3} more")
    assert sum(name in first for name in missing) >= 3
    assert "Unexpected key(s) " in second
    assert len(unexpected) < 4 or second.endswith(f"and {len(unexpected) - 3} more")
    changed = {key: torch.zeros(7) if key.endswith("weight") else value for key, value in own.state_dict().items()}
    with pytest.raises(ValueError, match=r"size mismatch for .* \(\(7,\) in the file, \(4, 3, 3, 3\) in the network\)"):
        load_weights(own, changed)


def test_model_files_round_trip(tmp_path):
    path = tmp_path / "purifier.safetensors"
    net = build_purifier("unet", channels=2, width=4)
    save_model(path, net, "purifier", "unet", channels=2, width=4)
    loaded = load_model(path, "purifier")
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert not loaded.training
    assert read_header(path) == {"kind": "purifier", "name": "unet", "options": {"channels": 2, "width": 4}}
    assert [p.name for p in tmp_path.iterdir()] == ["purifier.safetensors"]


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"path must be a readable safetensors file, got .*x\.safetensors"):
        load_model(path, "purifier")
    path.write_bytes(b"\x80\x02}q\x00." * 10)
    with pytest.raises(ValueError, match="readable safetensors file"):
        load_model(path, "purifier")
    save_model(path, build_purifier("unet", width=4), "purifier", "unet", width=4)
    with pytest.raises(ValueError, match=r"a classifier written by save_model, got .* \(purifier\)"):
        load_model(path, "classifier")
    save_model(path, build_purifier("unet", width=4), "purifier", "unet", width=8)
    with pytest.raises(ValueError, match="a purifier with fitting weights"):
        load_model(path, "purifier")


class Blur(nn.Module):
    """A user's purifier: one convolution of [masked image, ones, mask]."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + 2, channels, 5, padding=2)

    def forward(self, z):
        return torch.tanh(self.conv(z))


def test_a_users_purifier_trains_is_evaluated_and_saved(tmp_path, monkeypatch):
    with seeded(0):
        purifier, classifier = Blur(), build_classifier("small_cnn", channels=1).eval()
    before, labels = copy.deepcopy(purifier.state_dict()), torch.arange(4)
    defense = Defense(RT2(4), purifier, classifier)
    history = finetune(defense, X, labels, config=FinetuneConfig(epochs=1, batch_size=4, gan_weight=0), progress=False)
    assert len(history) == 1
    assert not torch.equal(purifier.conv.weight, before["conv.weight"])
    attacks = {"pgd": PGD(defense, steps=2)}
    report = evaluate(defense, X, labels, attacks=attacks, draws=3, selection_draws=2, progress=False)
    assert report.complete
    assert (report.robust.images, report.robust.draws) == (4, 3)
    assert report.passes["pgd"]["backward"] > 0
    monkeypatch.setitem(PURIFIERS, "blur", functools.partial(Blur, channels=1))
    save_model(tmp_path / "p.safetensors", purifier, "purifier", "blur")
    loaded = load_model(tmp_path / "p.safetensors", "purifier")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in purifier.state_dict().items())
    # Trainings leave a network in channels_last, in which convolutions may round otherwise.
    torch.testing.assert_close(loaded(RT2(4)(X)), purifier(RT2(4)(X)))


@pytest.mark.parametrize(
    ("module", "kind", "name", "pattern"),
    [
        (Blur(), "purifier", "unet", "save_model: module must be a GatedUNet, which 'unet' is, got Blur"),
        (
            build_classifier("resnet18_256", width=4),
            "classifier",
            "resnet18",
            "a ResNet, which .*, got ImageResNet",
        ),
        (build_classifier("resnet18", width=4), "classifier", "resnet34_256", "an? ImageResNet, which .*, got ResNet"),
        (nn.DataParallel(Blur()), "purifier", "mae", "a MaskedAutoencoder, which 'mae' is, got DataParallel"),
    ],
)
def test_modules_of_another_class_are_not_saved(module, kind, name, pattern, tmp_path):
    with pytest.raises(ValueError, match=pattern):
        save_model(tmp_path / "x.safetensors", module, kind, name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    save_model(path, build_purifier("unet", width=4), "purifier", "unet", width=4)
    before = path.read_bytes()

    def fail(tensors, file, metadata):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("atop_fast.checkpoints.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(path, build_purifier("unet", width=4), "purifier", "unet", width=4)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]
