"""The SN-PatchGAN discriminator: spectral normalization, its buffers, and the hinge losses."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from atop_fast.purifiers import SNPatchDiscriminator, discriminator_loss, generator_loss
from atop_fast.purifiers.discriminator import SpectralConv2d
from atop_fast.randomness import seeded

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(2, 3, 16, 16, generator=GENERATOR) * 2 - 1
MASK = (torch.rand(2, 1, 16, 16, generator=GENERATOR) < 0.5).float()


@pytest.fixture
def net():
    with seeded(0):
        return SNPatchDiscriminator(3, 8, 3)


def buffers(module):
    return [buffer.clone() for buffer in module.buffers()]


def unchanged(module, before):
    return all(torch.equal(a, b) for a, b in zip(module.buffers(), before, strict=True))


def test_names_and_shapes_are_the_public_ones():
    with torch.device("meta"):
        state = SNPatchDiscriminator().state_dict()
    sizes = (4, 64, 128, 256, 256, 256, 256)
    expected = {}
    for i, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        shapes = {"weight": (outputs, inputs, 5, 5), "bias": (outputs,), "weight_u": (outputs, 1)}
        expected |= {f"conv{i}.conv_sn.{name}": shape for name, shape in shapes.items()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_scores_are_those_of_the_layers_normalized_by_their_largest_singular_value():
    with seeded(0):
        net = SNPatchDiscriminator(3, 4, 4).double()
    for _ in range(500):
        scores = net(IMAGES.double(), MASK.double())
    h = torch.cat((IMAGES, MASK), dim=1).double()
    for i in range(1, 5):
        layer = net.get_submodule(f"conv{i}.conv_sn")
        weight = layer.weight / torch.linalg.svdvals(layer.weight.flatten(1))[0]
        h = nn.functional.conv2d(h, weight, layer.bias, stride=2, padding=2)
        h = torch.where(h > 0, h, 0.2 * h)
    assert scores.shape == (2, 16)
    torch.testing.assert_close(scores, h.flatten(1), rtol=1e-6, atol=1e-9)


def test_gradients_are_those_of_the_largest_singular_value():
    with seeded(0):
        layer = SpectralConv2d(3, 6, 5, stride=2, padding=2).double()
        theirs = spectral_norm(nn.Conv2d(3, 6, 5, stride=2, padding=2)).double()
    theirs.parametrizations.weight.original.data.copy_(layer.weight)
    for _ in range(500):
        layer.normalized_weight()
        theirs(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    dy = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    (dweight,) = torch.autograd.grad(layer.normalized_weight(), layer.weight, dy)
    weight = layer.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(weight / torch.linalg.matrix_norm(weight.flatten(1), 2), weight, dy)
    torch.testing.assert_close(dweight, expected, rtol=1e-6, atol=1e-9)
    (dtheirs,) = torch.autograd.grad(theirs.weight, theirs.parametrizations.weight.original, dy)
    torch.testing.assert_close(dweight, dtheirs, rtol=1e-6, atol=1e-9)


def test_new_layers_are_near_norm_one(net):
    for layer in net.children():
        norm = torch.linalg.matrix_norm(layer.conv_sn.normalized_weight().flatten(1), 2)
        assert norm.item() == pytest.approx(1, abs=0.05)


def test_buffers_change_in_training_mode_alone(net):
    before = buffers(net)
    first = net.eval()(IMAGES, MASK)
    assert unchanged(net, before)
    assert torch.equal(net(IMAGES, MASK), first)
    # The first call in training mode sees the same estimate, and keeps it.
    assert torch.equal(net.train()(IMAGES, MASK), first)
    assert not unchanged(net, before)
    for buffer in net.buffers():
        assert buffer.norm().item() == pytest.approx(1)
        assert not buffer.requires_grad


def test_backward_after_two_calls(net):
    """A discriminator's step calls it for real and fake images before it goes back."""
    loss = discriminator_loss(net(IMAGES, MASK), net(-IMAGES, MASK))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_the_power_iteration_is_in_float32_under_autocast(net):
    with seeded(0):
        other = SNPatchDiscriminator(3, 8, 3)
    expected = net(IMAGES, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        scores = other(IMAGES, MASK)
    assert scores.dtype == torch.bfloat16
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=3e-2 * expected.abs().max().item())
    assert unchanged(other, buffers(net))


def test_sixteen_bit_weights(net):
    expected = net(IMAGES, MASK)
    scores = net.bfloat16()(IMAGES.bfloat16(), MASK.bfloat16())
    assert scores.dtype == net.conv1.conv_sn.weight_u.dtype == torch.bfloat16
    torch.testing.assert_close(scores.float(), expected, rtol=0, atol=5e-2 * expected.abs().max().item())


def test_compiles_without_graph_breaks(net):
    with seeded(0):
        other = SNPatchDiscriminator(3, 8, 3)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(IMAGES, MASK), net(IMAGES, MASK))
    assert unchanged(other, buffers(net))


def test_hinge_losses_follow_their_formulas():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * 0.25 + 0.5 * 0.5)
    assert generator_loss(fake).item() == pytest.approx(1.0)


@pytest.mark.skipif("ATOP_FAST_GOLDEN" not in os.environ, reason="set ATOP_FAST_GOLDEN to the folder of golden outputs")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("state", "output"), [("state_before", "y_first_call"), ("state_after", "y_call_51")])
def test_golden_outputs(state, output, training):
    golden = load_file(Path(os.environ["ATOP_FAST_GOLDEN"]) / "discriminator_cnum8_64.safetensors")
    net = SNPatchDiscriminator(3, 8, 6).train(training)
    net.load_state_dict({k.partition("/")[2]: v for k, v in golden.items() if k.startswith(f"{state}/")})
    x, expected = golden["x"], golden[output]
    error = (net(x[:, :3], x[:, 3:]) - expected).abs().max() / expected.abs().max()
    assert error < 1e-3
