"""Public checkpoints of DeepFillV2, its discriminator and AToP: read, written, and refused."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from atop_fast import build_purifier, load_model, save_model
from atop_fast.purifiers import DeepFillV2, SNPatchDiscriminator, load_deepfill, load_sn_patch, save_public
from atop_fast.randomness import seeded

FIRST = "stage1.conv1.conv.weight"


@pytest.fixture(scope="module")
def generator():
    with seeded(0):
        return DeepFillV2(8)


@pytest.fixture(scope="module")
def discriminator():
    with seeded(1):
        return SNPatchDiscriminator(3, 4, 6)


def equal(module, state):
    ours = module.state_dict()
    return ours.keys() == state.keys() and all(torch.equal(ours[k], v) for k, v in state.items())


def atop(state):
    """A state dict as AToP's files have it, with the classifier beside the generator."""
    classifier = {"res.conv1.weight": torch.ones(2, 3, 3, 3), "res.bn1.num_batches_tracked": torch.tensor(7)}
    return OrderedDict({f"generator.{name}": tensor for name, tensor in state.items()} | classifier)


@pytest.mark.parametrize("form", [dict, OrderedDict, atop])
@pytest.mark.parametrize("alone", [False, True])
def test_public_files_load(form, alone, generator, discriminator, tmp_path):
    g, d = generator.state_dict(), discriminator.state_dict()
    adam = torch.optim.Adam(generator.parameters()).state_dict()
    content = {"G": form(g), "D": OrderedDict(d), "G_optim": adam, "D_optim": adam, "n_iter": 3}
    torch.save(content["G"] if alone else content, tmp_path / "g.pth")
    torch.save(content["D"] if alone else content, tmp_path / "d.pth")
    state = torch.get_rng_state()
    net, judge = load_deepfill(tmp_path / "g.pth"), load_sn_patch(str(tmp_path / "d.pth"))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(net, g)
    assert equal(judge, d)
    assert not net.training
    assert not judge.training
    assert all(p.requires_grad and p.is_leaf for p in (*net.parameters(), *judge.parameters()))
    x = torch.rand(2, 5, 16, 24).round()
    with torch.no_grad():
        assert torch.equal(net(x), generator(x))
        images = torch.rand(2, 4, 64, 64)
        assert torch.equal(judge(images[:, :3], images[:, 3:]), discriminator.eval()(images[:, :3], images[:, 3:]))


@pytest.mark.parametrize("form", [dict, atop])
def test_safetensors_load(form, generator, discriminator, tmp_path):
    save_file(form(generator.state_dict()), tmp_path / "g.safetensors")
    save_file(discriminator.state_dict(), tmp_path / "d.safetensors")
    assert equal(load_deepfill(tmp_path / "g.safetensors"), generator.state_dict())
    assert equal(load_sn_patch(tmp_path / "d.safetensors"), discriminator.state_dict())


def test_weights_share_no_memory_and_are_float32(generator, tmp_path):
    state = dict(generator.state_dict())
    base = torch.randn(2 * state[FIRST].numel(), dtype=torch.float16)
    state[FIRST] = base[::2].view_as(state[FIRST])
    state["stage2.conv_bn7.conv.bias"] = state["stage2.conv_bn6.conv.bias"]
    torch.save({"G": state}, tmp_path / "g.pth")
    net = load_deepfill(tmp_path / "g.pth")
    assert equal(net, {name: tensor.float() for name, tensor in state.items()})
    assert all(p.dtype == torch.float32 and p.is_contiguous() for p in net.parameters())
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == len(list(net.parameters()))


def test_round_trip_is_bit_exact(generator, discriminator, tmp_path):
    """Public to ours, to a file of save_model, and back to public names."""
    content = {"G": generator.state_dict(), "D": discriminator.state_dict(), "n_iter": 5}
    torch.save(content, tmp_path / "public.pth")
    net, judge = load_deepfill(tmp_path / "public.pth"), load_sn_patch(tmp_path / "public.pth")
    save_model(tmp_path / "g.safetensors", net, "purifier", "deepfill_v2", cnum=8)
    save_model(tmp_path / "d.safetensors", judge, "discriminator", "sn_patch", channels=3, width=4, depth=6)
    net = load_model(tmp_path / "g.safetensors", "purifier")
    judge = load_model(tmp_path / "d.safetensors", "discriminator")
    save_public(tmp_path / "again.pth", net, judge)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again.keys() == {"G", "D"}
    for key in again:
        assert list(again[key]) == list(content[key])
        assert all(torch.equal(again[key][name], tensor) for name, tensor in content[key].items())
    assert equal(load_deepfill(tmp_path / "g.safetensors"), generator.state_dict())
    save_public(tmp_path / "again.pth", net)
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == {"G"}
    assert {p.name for p in tmp_path.iterdir()} == {"public.pth", "again.pth", "g.safetensors", "d.safetensors"}


def test_only_networks_of_the_public_code_are_written(generator, tmp_path):
    path = tmp_path / "x.pth"
    with pytest.raises(TypeError, match="save_public: generator must be a DeepFillV2, got GatedUNet"):
        save_public(path, build_purifier("unet"))
    with pytest.raises(TypeError, match="discriminator must be an SNPatchDiscriminator or None, got Identity"):
        save_public(path, generator, nn.Identity())
    assert not path.exists()


class Malicious:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("load", [load_deepfill, load_sn_patch])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"G": {FIRST: bad}, "D": {"n": bad}}])
def test_files_that_hold_code_are_refused(wrap, load, tmp_path):
    path, touched = tmp_path / "c.pth", tmp_path / "touched"
    torch.save(wrap(Malicious(touched)), path)
    with pytest.raises(ValueError, match=rf"{load.__name__}: path must be .* of tensors alone .*, got .*c\.pth \("):
        load(path)
    assert not touched.exists()


def test_truncated_and_damaged_files_are_refused(generator, tmp_path):
    path = tmp_path / "g.pth"
    save_public(path, generator)
    whole = path.read_bytes()
    files = [whole[: int(len(whole) * share)] for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999)]
    # The pickle at the start of the archive, and the directory at its end.
    files += [whole[:k] + b"\xff" * 64 + whole[k + 64 :] for k in (0, 100, 400, 2000, len(whole) - 64)]
    for content in (*files, b"\x00" * 100, b"text"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"load_deepfill: path must be .*, got .*g\.pth \("):
            load_deepfill(path)
    save_file(generator.state_dict(), tmp_path / "g.safetensors")
    whole = (tmp_path / "g.safetensors").read_bytes()
    for share in (0, 0.01, 0.9):
        (tmp_path / "g.safetensors").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"load_deepfill: path must be .* readable .*, got .*g\.safetensors \("):
            load_deepfill(tmp_path / "g.safetensors")


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "."])
def test_missing_files_are_named(name, tmp_path):
    words = r"load_sn_patch: path must be a readable checkpoint .*, got .*(Error: |is a folder)"
    with pytest.raises(ValueError, match=words):
        load_sn_patch(tmp_path / name)


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def replaced(name, tensor):
    return lambda state: {**state, name: tensor}


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without("stage2.conv_bn6.conv.bias"), r"Missing key.*stage2\.conv_bn6\.conv\.bias"),
        (without("stage2.contextual_attention.fuse_weight"), r"Missing key.*fuse_weight"),
        (without(FIRST), rf"convolution weights {FIRST}, got .*g\.pth \(without it\)"),
        (replaced("stage3.x", torch.ones(1)), r"Unexpected key.*stage3\.x"),
        (replaced("res.x", torch.ones(1)), r"Unexpected key.*res\.x"),
        (replaced("generator.stage1.x", torch.ones(1)), r"Unexpected key.*generator\.stage1\.x"),
        (replaced("stage1.conv1.conv.bias", torch.ones(7)), r"size mismatch for stage1\.conv1\.conv\.bias"),
        (replaced(FIRST, torch.ones(12, 5, 5, 5)), "size mismatch for stage1"),
        (replaced(FIRST, torch.ones(6, 5, 5, 5)), "cnum must be divisible by 4, got 6"),
        (replaced(FIRST, torch.ones(8)), rf"convolution weights {FIRST}, got .*\(of shape \(8,\)\)"),
        # More memory than any machine has.
        (replaced(FIRST, torch.ones(1).expand(4_000_000, 1, 1, 1)), "size mismatch"),
        (replaced("stage1.conv1.conv.bias", torch.ones(8, dtype=torch.int64)), "not of real numbers: stage1.conv1"),
        (replaced("stage2.contextual_attention.fuse_weight", torch.ones(1, 1, 3, 3)), "identity as .*fuse_weight"),
        (lambda state: {}, r'a state dict, or {"G": \.\.\.}, got .*g\.pth \(with \'G\'\)'),
        (lambda state: {"state_dict": state}, r'a state dict, or {"G": \.\.\.}, got .*g\.pth \(with \'G\'\)'),
        (lambda state: [state], r'a state dict, or {"G": \.\.\.}, got .*g\.pth \(with \'G\'\)'),
        (lambda state: {**state, 3: torch.ones(1)}, r'a state dict, or {"G": \.\.\.}'),
    ],
)
def test_other_weights_are_refused(change, pattern, generator, tmp_path):
    path = tmp_path / "g.pth"
    torch.save({"G": change(generator.state_dict())}, path)
    with pytest.raises(ValueError, match=rf"load_deepfill: path must be .*({pattern})") as caught:
        load_deepfill(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (without("conv6.conv_sn.weight_u"), r"Missing key.*conv6\.conv_sn\.weight_u"),
        (without("conv3.conv_sn.weight"), r"Missing key.*conv3\.conv_sn\.weight"),
        (without("conv1.conv_sn.weight"), r"convolution weights conv1\.conv_sn\.weight, got .*d\.pth \(without it\)"),
        (replaced("conv2.conv_sn.weight_v", torch.ones(1)), r"Unexpected key.*conv2\.conv_sn\.weight_v"),
        (replaced("conv2.conv_sn.weight_u", torch.ones(8)), r"size mismatch for conv2\.conv_sn\.weight_u"),
        (replaced("conv1.conv_sn.weight", torch.ones(4, 1, 5, 5)), "channels must be an integer and >= 1, got 0"),
    ],
)
def test_other_discriminators_are_refused(change, pattern, discriminator, tmp_path):
    path = tmp_path / "d.pth"
    torch.save({"D": change(discriminator.state_dict())}, path)
    with pytest.raises(ValueError, match=rf"load_sn_patch: path must be .*{pattern}") as caught:
        load_sn_patch(path)
    assert str(path) in str(caught.value)


def test_a_file_without_a_discriminator_says_what_it_has(generator, tmp_path):
    save_public(tmp_path / "g.pth", generator)
    with pytest.raises(ValueError, match=r'a state dict, or {"D": \.\.\.}, got .*g\.pth \(with \'G\'\)'):
        load_sn_patch(tmp_path / "g.pth")


@pytest.mark.skipif("ATOP_FAST_GOLDEN" not in os.environ, reason="set ATOP_FAST_GOLDEN to the folder of golden outputs")
@pytest.mark.parametrize("form", [dict, atop])
def test_golden_weights_load_and_return(form, tmp_path):
    golden = load_file(Path(os.environ["ATOP_FAST_GOLDEN"]) / "deepfill_v2_cnum8_64.safetensors")
    state = {k.removeprefix("state/"): v for k, v in golden.items() if k.startswith("state/")}
    torch.save({"G": form(state)}, tmp_path / "g.pth")
    net = load_deepfill(tmp_path / "g.pth")
    assert equal(net, state)
    save_public(tmp_path / "again.pth", net)
    again = torch.load(tmp_path / "again.pth", weights_only=True)["G"]
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
