"""Defenses on disk: one file gives the defense back to the bits, and others are refused by name."""

from __future__ import annotations

import json
import struct
import warnings

import pytest
import torch
from torch import nn

import atop_fast.checkpoints
from atop_fast import (
    RT1,
    RT2,
    RT3,
    Defense,
    PretrainConfig,
    RandomResizePad,
    build_classifier,
    build_purifier,
    list_defenses,
    load_defense,
    load_model,
    pretrain,
    save_defense,
    save_model,
)
from atop_fast.checkpoints import read_header
from atop_fast.classifiers import CLASSIFIERS, Normalized, Resized
from atop_fast.randomness import seeded
from atop_fast.transforms import FixedRandomness, describe_transform, restore_transform

TRANSFORMS = [
    *(RT1(4), RT1(4, (0.1, 0.4), 16, True), RT2(4, sigma=0.1), RT2(2, 0.5, 0.06, (16, 16)), RT3(4, 3, 0.2)),
    RandomResizePad(12, 16),
]
X = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def networks():
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4)
        return purifier, build_classifier("small_cnn", channels=1, classes=3, width=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_the_size_are_rounded_once(dtype, tmp_path):
    purifier, classifier = networks()
    save_defense(tmp_path / "d.safetensors", Defense(RT2(4), purifier, classifier), dtype=dtype)
    loaded = load_defense(tmp_path / "d.safetensors")
    for name, value in classifier.state_dict().items():
        rounded = value.to(dtype).float() if value.is_floating_point() else value
        assert torch.equal(loaded.classifier.state_dict()[name], rounded)
        assert loaded.classifier.state_dict()[name].dtype == value.dtype
    # The second file has the same weights: nothing is rounded twice.
    save_defense(tmp_path / "e.safetensors", loaded, dtype=dtype)
    again = load_defense(tmp_path / "e.safetensors")
    assert torch.equal(again(X, draw=1), loaded(X, draw=1))
    assert (tmp_path / "d.safetensors").stat().st_size < 0.7 * sum(
        4 * v.numel() for network in (purifier, classifier) for v in network.state_dict().values()
    )


def test_weights_too_large_for_half_precision_are_refused(tmp_path):
    purifier, classifier = networks()
    with torch.no_grad():
        next(classifier.parameters()).fill_(1e5)
    with pytest.raises(ValueError, match="finite weights"):
        save_defense(tmp_path / "d.safetensors", Defense(RT2(4), purifier, classifier), dtype=torch.float16)
    with pytest.raises(TypeError, match="dtype"):
        save_defense(tmp_path / "d.safetensors", Defense(RT2(4), purifier, classifier), dtype=torch.int8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_a_file_gives_the_defense_back(transform, tmp_path):
    purifier, classifier = networks()
    defense = Defense(transform, purifier, Resized(Normalized(classifier, [0.4], [0.2]), 12)).eval()
    path, second = str(tmp_path / "d.safetensors"), tmp_path / "e.safetensors"
    threat = {"norm": "L2", "eps": 0.5}
    metadata = {"classes": ("a", "b", "c"), "shape": (1, 16, 16), **threat, "license": "Apache-2.0"}
    save_defense(path, defense, metadata=metadata)
    before = torch.get_rng_state()
    loaded = load_defense(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loaded(X, draw=5), defense(X, draw=5))
    assert not any(module.training for module in loaded.modules())
    assert repr(loaded.transform) == repr(transform)
    assert loaded.metadata["classes"] == ["a", "b", "c"]
    assert (loaded.metadata["eps"], loaded.metadata["license"]) == (0.5, "Apache-2.0")
    save_defense(second, loaded)
    assert second.read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_transform_alone_and_the_carried_ones(tmp_path, monkeypatch):
    classifier = networks()[1]
    (tmp_path / "weights").mkdir()
    save_defense(tmp_path / "weights/mine.safetensors", Defense(RT1(4), None, classifier))
    monkeypatch.setattr(atop_fast.checkpoints.importlib.resources, "files", lambda name: tmp_path)
    assert list_defenses() == ["mine"]
    assert load_defense("mine").purifier is None
    with pytest.raises(ValueError, match=r"load_defense: path_or_name must be .*one of 'mine'\), got 'cifar10-rt2'"):
        load_defense("cifar10-rt2")
    monkeypatch.setattr(atop_fast.checkpoints.importlib.resources, "files", lambda name: tmp_path / "none")
    assert list_defenses() == []
    with pytest.raises(ValueError, match="the package carries none"):
        load_defense("mine")


def refused(tmp_path, match, error=ValueError, **parts):
    purifier, classifier = networks()
    given = {"transform": RT1(4), "purifier": purifier, "classifier": classifier} | parts
    with pytest.raises(error, match=match):
        save_defense(tmp_path / "d.safetensors", Defense(**given))
    assert not list(tmp_path.iterdir())


def test_what_a_file_could_not_give_back_is_refused(tmp_path):
    class Own(RT1):
        pass

    changed = networks()[1]
    changed.add_module("more", nn.Linear(1, 1))
    patched = networks()[1]
    patched.forward = lambda x: -x
    broken = networks()[0]
    next(broken.parameters()).data.view(-1)[0] = torch.nan
    refused(tmp_path, "defense.transform must be one of transforms.TRANSFORMS", transform=Own(4))
    refused(tmp_path, "defense.purifier must be of build_classifier, .* got Conv2d", purifier=nn.Conv2d(3, 1, 1))
    refused(tmp_path, "defense.classifier must be what 'small_cnn' .* builds", classifier=changed)
    refused(tmp_path, "its class's forward, got SmallCNN", classifier=patched)
    refused(tmp_path, "of finite weights, got NaN or infinity in purifier", purifier=broken)
    # No state dict has these: layers, their options, hooks, and a forward of a subclass.
    layer, option, hooked, outer = (networks()[1] for _ in range(4))
    layer.relu = nn.Identity()
    option.conv1.padding = (0, 0)
    hooked.conv2.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    outer = Normalized(outer, [0.5], [0.5])
    outer.register_forward_hook(lambda module, inputs, output: -output)
    refused(tmp_path, r"relu is Identity\(\) .* instead of None", classifier=layer)
    refused(tmp_path, r"conv1 is Conv2d\(.* instead of Conv2d\(.*padding", classifier=option)
    refused(tmp_path, r"conv2 is .* and 1 hook\(s\) instead of", classifier=hooked)
    refused(tmp_path, "a module without hooks, got Normalized", classifier=outer)

    class Rounded(Defense):
        def purify(self, *args, **options):
            return super().purify(*args, **options).round()

    with pytest.raises(TypeError, match="defense must be a Defense, got the subclass Rounded"):
        save_defense(tmp_path / "d.safetensors", Rounded(RT1(4), *networks()))
    defense = Defense(RT1(4), *networks())
    for metadata, error in (({"classes": "ab"}, ValueError), ({"shape": (1, 2)}, ValueError), ({"x": {1j}}, TypeError)):
        with pytest.raises(error, match=f"save_defense: ({next(iter(metadata))}|metadata) must be"):
            save_defense(tmp_path / "d.safetensors", defense, metadata=metadata)
    with pytest.raises(TypeError, match="save_defense: metadata must be names and values, got list"):
        save_defense(tmp_path / "d.safetensors", defense, metadata=["a"])
    with pytest.raises(TypeError, match="save_defense: defense must be a Defense, got SmallCNN"):
        save_defense(tmp_path / "d.safetensors", defense.classifier)


def rewritten(content, change):
    """A safetensors file with another header of ours; `change` edits it."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["atop_fast"])
    change(described)
    header["__metadata__"]["atop_fast"] = json.dumps(described)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


CHANGES = {
    "kind": lambda h: h.update(kind="purifier"),
    "no transform": lambda h: h.pop("transform"),
    "transform unknown": lambda h: h["transform"].update(name="os.system"),
    "transform is a list": lambda h: h.update(transform=[1]),
    "transform with more": lambda h: h["transform"].update(more=1),
    "a huge size": lambda h: h["transform"].update(size=[10**9, 8]),
    "no classifier": lambda h: h.update(classifier=None),
    "no purifier, but its weights": lambda h: h.update(purifier=None),
    "a purifier as classifier": lambda h: h.update(classifier=h["purifier"]),
    "width": lambda h: h["purifier"]["options"].update(width=10**9),
    "another width": lambda h: h["purifier"]["options"].update(width=8),
    "wrapper": lambda h: h.update(classifier={"name": "resized", "options": {}, "inside": h["classifier"]}),
    "nested": lambda h: [h.update(classifier={"name": "x", "options": {}, "inside": h["classifier"]}) for _ in "ab"],
    "another package's": lambda h: h["classifier"].update(name="timm:resnet18", options={"checkpoint_path": "/x"}),
    "metadata": lambda h: h.update(metadata=[]),
    "classes": lambda h: h["metadata"].update(classes=[1]),
    "eps": lambda h: h["metadata"].update(eps="x"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_headers_are_refused(change, tmp_path):
    path = tmp_path / "d.safetensors"
    save_defense(path, Defense(RT2(4), *networks()))
    path.write_bytes(rewritten(path.read_bytes(), CHANGES[change]))
    with pytest.raises(ValueError, match=f"load_defense: path_or_name must be .*{path}"):
        load_defense(path)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_transforms_are_described(transform):
    described = json.loads(json.dumps(describe_transform(transform)))
    again = restore_transform(described)
    assert describe_transform(again) == described
    assert torch.equal(again(X, 3, draw=2), transform(X, 3, draw=2))


def test_a_purifier_remembers_its_transform(tmp_path):
    path = tmp_path / "p.safetensors"
    purifier, classifier = networks()
    pretrain(purifier, RT2(4, sigma=0.1), X, config=PretrainConfig(epochs=0), progress=False)
    save_model(path, purifier, "purifier", "unet", channels=1, width=4)
    assert read_header(path)["transform"] == describe_transform(RT2(4, sigma=0.1))
    for each in (purifier, load_model(path, "purifier")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Defense(RT2(4, sigma=0.1), each, classifier)
            Defense(FixedRandomness(RT2(4, sigma=0.1), seed=7), each, classifier)
        with pytest.warns(UserWarning, match=r"trained under RT2\(.*sigma=0.1,.* stands behind RT2\(.*sigma=0.25,"):
            Defense(RT2(4), each, classifier)
    # Behind another transform it does not forget.
    with pytest.warns(UserWarning, match="trained under"):
        save_defense(tmp_path / "d.safetensors", Defense(RT2(4), purifier, classifier))
    with pytest.warns(UserWarning, match=r"trained under RT2\(.*sigma=0.1,.* stands behind RT2\(.*sigma=0.25,"):
        loaded = load_defense(tmp_path / "d.safetensors")
    assert loaded.purifier.trained_under == purifier.trained_under
    save_model(path, build_purifier("unet", channels=1, width=4), "purifier", "unet", channels=1, width=4)
    assert "transform" not in read_header(path)
    save_model(path, purifier, "purifier", "unet", transform=RT1(4), channels=1, width=4)
    assert read_header(path)["transform"]["name"] == "rt1"


def test_save_model_takes_the_recorded_architecture(tmp_path):
    path = tmp_path / "model.safetensors"
    classifier = build_classifier("small_cnn", channels=1, width=8).eval()
    wrapped = Normalized(classifier, [0.3], [0.6]).eval()
    purifier = build_purifier("unet", channels=1, width=4).eval()
    masked = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for kind, module, x in (("classifier", classifier, X), ("classifier", wrapped, X), ("purifier", purifier, masked)):
        save_model(path, module)
        for loaded in (load_model(path), load_model(str(path))):
            assert type(loaded) is type(module)
            assert torch.equal(loaded(x), module(x))
        assert read_header(path)["kind"] == kind
        save_model(path, load_model(path))
    with pytest.raises(ValueError, match=r"a classifier written by save_model, got .*purifier"):
        load_model(path, "classifier")


class Tied(nn.Module):
    """Two layers with one weight, and a buffer that is a view of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(16))
        self.register_buffer("start", self.scale[:8])

    def forward(self, x):
        return self.second(self.first(x.flatten(1)[:, :16]) * self.scale)[:, :8] * self.start


def test_tied_weights_are_saved(tmp_path, monkeypatch):
    """After its training, such a classifier could not be written, and the message spoke of the disk."""
    monkeypatch.setitem(CLASSIFIERS, "tied", Tied)
    path, model = tmp_path / "tied.safetensors", build_classifier("tied").eval()
    save_model(path, model)
    loaded = load_model(path)
    assert torch.equal(loaded(X), model(X))
    assert loaded.first.weight is loaded.second.weight


def test_save_model_says_what_it_lacks(tmp_path):
    path = tmp_path / "model.safetensors"
    for call, pattern in (
        (lambda: save_model(path, nn.Linear(2, 2)), "module must be of build_classifier, build_purifier or load_model"),
        (lambda: save_model(path, build_purifier("unet"), width=4), r"name must be given with options, got None with"),
        (lambda: save_model(path, build_purifier("unet"), "classifier"), "save_model: module must be what 'unet' with"),
        (lambda: save_model(path, build_purifier("unet"), name="unet"), "kind must be one of 'classifier', 'purifier'"),
    ):
        with pytest.raises(ValueError, match=pattern):
            call()
    save_defense(path, Defense(RT2(4), *networks()))
    with pytest.raises(ValueError, match=r"load_model: path must be a model written by save_model, got .*defense"):
        load_model(path)


def test_a_folder_is_named_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"must be a readable safetensors file, got .* \(is a folder\)"):
        load_defense(tmp_path)
