"""DeepFillV2: the numbers and gradients of its definition, sample by sample, and of the public network."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from atop_fast import RT2, Defense, build_classifier, build_purifier
from atop_fast.purifiers import DeepFillV2
from atop_fast.randomness import seeded

PLAIN = Path(__file__).parent.parent / "atop_fast" / "bench" / "deepfill_plain.py"
# 64x64 pixels and 3 samples; 128x128 and one.
GOLDEN = {"deepfill_v2_cnum8_64": 8, "deepfill_v2_cnum16_128": 16}
needs_golden = pytest.mark.skipif(
    "ATOP_FAST_GOLDEN" not in os.environ, reason="set ATOP_FAST_GOLDEN to the folder of golden outputs"
)


@pytest.fixture(scope="module")
def plain():
    """atop_fast/bench/deepfill_plain.py, the definition."""
    spec = importlib.util.spec_from_file_location("deepfill_plain", PLAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(cnum=8, gain=3.0):
    """Weights above the default's size, so that no layer fades away."""
    with seeded(0):
        net = DeepFillV2(cnum)
        for parameter in net.parameters():
            parameter.data.mul_(gain)
    return net


def inputs(height=24, width=40, batch=4):
    """Blocks masked at random, other ones in every sample; nothing in the first, everything in the last."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(batch, 1, height // 8, width // 8, generator=generator) < 0.25).float()
    mask[0], mask[-1] = 0, 1
    mask = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)
    image = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    return torch.cat((image * (1 - mask), torch.ones_like(mask), mask), dim=1)


def gradients(net, stages, x, weight):
    """Both images, and the gradients in x and in all parameters of their sum weighted by `weight` and its square."""
    x = x.clone().requires_grad_()
    coarse, refined = stages(x)
    loss = (coarse * weight.square() + refined * weight).sum()
    grads = torch.autograd.grad(loss, [x, *net.parameters()])
    return [coarse.detach(), refined.detach(), *grads]


def error(a, b):
    return float((a.detach() - b).abs().max() / b.abs().max())


def test_names_and_shapes_are_those_of_the_definition(plain):
    with torch.device("meta"):
        ours, theirs = DeepFillV2().state_dict(), plain.PlainDeepFill().state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert len(ours) == 85
    assert sum(t.numel() for name, t in ours.items() if not name.endswith("fuse_weight")) == 4_052_478


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 16), (8, 8)])
def test_outputs_and_all_gradients_are_those_of_the_definition(height, width, checkpointing, plain):
    ours, theirs = network(4).double(), plain.PlainDeepFill(4).double()
    theirs.load_state_dict(ours.state_dict())
    ours.checkpointing = checkpointing
    x = inputs(height, width).double()
    weight = torch.randn(4, 3, height, width, dtype=torch.float64)
    results = gradients(ours, ours.stages, x, weight)
    expected = gradients(theirs, theirs, x, weight)
    names = ["coarse", "refined", "x", *(name for name, _ in theirs.named_parameters())]
    assert [name for name, _ in ours.named_parameters()] == names[3:]
    for name, a, b in zip(names, results, expected, strict=True):
        assert b.abs().max() > 0, name
        assert error(a, b) < 1e-9, name


def test_every_sample_has_its_own_mask():
    net, x = network().eval(), inputs()
    with torch.no_grad():
        whole = net(x)
        for i in range(len(x)):
            torch.testing.assert_close(net(x[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-5)
        assert torch.equal(net(x), net.stages(x)[1])
        other = torch.cat((x[:, :4], x[:1, 4:].expand(4, -1, -1, -1)), dim=1)
        assert not torch.allclose(net(other)[1], whole[1], atol=1e-3)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_channels_last_agrees_and_stays(weights):
    x, weight = inputs(), torch.randn(4, 3, 24, 40)
    net = network()
    expected = gradients(net, net.stages, x, weight)
    net.to(memory_format=weights)
    kept = []
    for module in net.modules():
        if type(module).__name__ in ("GatedConv", "ContextualAttention"):
            module.register_forward_hook(lambda module, args, output: kept.append(output))
    results = gradients(net, net.stages, x.contiguous(memory_format=torch.channels_last), weight)
    assert len(kept) > 30
    assert all(h.is_contiguous(memory_format=torch.channels_last) for h in (*results[:2], *kept))
    for a, b in zip(results, expected, strict=True):
        assert error(a, b) < 1e-4


def test_autocast():
    net, x = network(gain=1.5), inputs()
    with torch.no_grad():
        expected = net.stages(x)
        with torch.autocast("cpu", torch.bfloat16):
            images = net.stages(x)
    for a, b in zip(images, expected, strict=True):
        assert a.dtype == torch.float32
        assert 0 < error(a, b) < 3e-2


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointing_gives_the_same_bits(frozen):
    net, x, weight = network(), inputs(), torch.randn(4, 3, 24, 40)
    net.requires_grad_(not frozen)

    def run():
        z = x.clone().requires_grad_()
        coarse, refined = net.stages(z)
        return torch.autograd.grad((coarse * weight + refined).sum(), [z, *(p for p in net.parameters() if not frozen)])

    kept = run()
    net.checkpointing = True
    assert net.checkpointing
    assert all(torch.equal(a, b) for a, b in zip(run(), kept, strict=True))


def peak(net, x):
    """The most bytes allocated at once from before the forward pass to the end of the backward pass."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        net(x).square().sum().backward()
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def test_checkpointing_saves_memory():
    net, x = network().requires_grad_(False), inputs(64, 64).requires_grad_()
    kept = peak(net, x)
    net.checkpointing = True
    assert 0 < peak(net, x) < 0.5 * kept


@pytest.mark.parametrize(
    ("checkpointing", "compiler"),
    [
        # The ops' own tests trace them with aot_eager, too.
        (False, "eager"),
        pytest.param(False, "aot_eager", marks=pytest.mark.slow),
        pytest.param(True, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_breaks(checkpointing, compiler):
    net, x, weight = network(4), inputs(16, 24, 2), torch.randn(2, 3, 16, 24)
    expected = gradients(net, net.stages, x, weight)
    net.checkpointing = checkpointing
    torch._dynamo.reset()
    compiled = torch.compile(net.stages, backend=compiler, fullgraph=True)
    for a, b in zip(gradients(net, compiled, x, weight), expected, strict=True):
        assert error(a, b) < 1e-4


def test_purifies_in_a_defense():
    with seeded(0):
        net = build_purifier("deepfill_v2", cnum=4)
        defense = Defense(RT2(8, sigma=0.1), net, build_classifier("small_cnn", channels=3)).eval()
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = defense(x, draw=0)
    assert torch.equal(logits, defense(x, draw=0))
    (dx,) = torch.autograd.grad(logits.sum(), x)
    assert dx.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "kind", "pattern"),
    [
        (lambda: DeepFillV2(6), ValueError, "DeepFillV2: cnum must be divisible by 4, got 6"),
        (lambda: DeepFillV2(0), ValueError, "DeepFillV2: cnum must be an integer and >= 4, got 0"),
        (lambda: DeepFillV2(8.0), TypeError, "DeepFillV2: cnum must be an integer, got float"),
        (
            lambda: DeepFillV2(4)(torch.zeros(1, 4, 8, 8)),
            ValueError,
            r"x must be of shape \(B, 5, H, W\) with H and W divisible by 8, got \(1, 4, 8, 8\)",
        ),
        (lambda: DeepFillV2(4)(torch.zeros(1, 5, 12, 8)), ValueError, r"divisible by 8, got \(1, 5, 12, 8\)"),
        (lambda: DeepFillV2(4)(torch.zeros(1, 5, 8, 20)), ValueError, r"divisible by 8, got \(1, 5, 8, 20\)"),
        (lambda: DeepFillV2(4)(torch.zeros(1, 5, 0, 8)), ValueError, r"divisible by 8, got \(1, 5, 0, 8\)"),
        (lambda: DeepFillV2(4)(torch.zeros(5, 8, 8)), ValueError, r"got \(5, 8, 8\)"),
    ],
)
def test_wrong_input_is_named(call, kind, pattern):
    with pytest.raises(kind, match=pattern):
        call()


def load_golden(name):
    golden = load_file(Path(os.environ["ATOP_FAST_GOLDEN"]) / f"{name}.safetensors")
    net = DeepFillV2(GOLDEN[name])
    net.load_state_dict({k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")})
    return golden, net


@needs_golden
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs_and_gradients(name, checkpointing, layout):
    golden, net = load_golden(name)
    net.to(memory_format=layout)
    net.checkpointing = checkpointing
    x = golden["x"].contiguous(memory_format=layout).requires_grad_()
    coarse, refined = net.stages(x)
    ((coarse + refined) * golden["loss_weight"]).mean(dim=(1, 2, 3)).sum().backward()
    results = {"x_stage1": coarse, "x_stage2": refined, "grad_x": x.grad}
    results |= {key: net.get_parameter(key[5:]).grad for key in golden if key.startswith("grad/")}
    assert len(results) == 7
    for key, tensor in results.items():
        assert error(tensor, golden[key]) < 1e-4, key


@needs_golden
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_outputs_and_gradients_under_autocast(name):
    golden, net = load_golden(name)
    x = golden["x"].contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        coarse, refined = net.stages(x)
    ((coarse + refined) * golden["loss_weight"]).mean(dim=(1, 2, 3)).sum().backward()
    results = {"x_stage1": coarse, "x_stage2": refined, "grad_x": x.grad}
    results |= {key: net.get_parameter(key[5:]).grad for key in golden if key.startswith("grad/")}
    for key, tensor in results.items():
        assert error(tensor, golden[key]) < 3e-2, key


@needs_golden
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_attention(name):
    golden, net = load_golden(name)
    features = golden["attention/f"].requires_grad_()
    y = net.stage2.contextual_attention(features, golden["mask"])
    (df,) = torch.autograd.grad(y, features, golden["attention/loss_weight"])
    assert error(y, golden["attention/y"]) < 1e-4
    assert error(df, golden["attention/grad_f"]) < 1e-4
