"""load_classifier: RobustBench's checkpoints by path and by name; files that hold code are refused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from atop_fast import RT2, Defense, build_classifier, load_classifier, load_model, save_model
from atop_fast._core.files import load_checkpoint
from atop_fast.classifiers import Normalized, WideResNet, fold_batch_norm
from atop_fast.classifiers.packages import autoattack_is_pyautoattack
from atop_fast.classifiers.zoo import System, _with_weights, other_threat
from atop_fast.data import Dataset
from atop_fast.randomness import seeded
from atop_fast.recipes.networks import build_networks
from atop_fast.recipes.options import GivenTransform
from atop_fast.recipes.schema import ClassifierSource, Recipe

X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# A file that is no model.
FLOORS = Path(__file__).with_name("floors.json")
TINY = {"depth": 10, "widen": 1}


def randomized(model):
    """Running statistics and weights away from their first values, so that every parameter matters."""
    for parameter in model.state_dict().values():
        if parameter.is_floating_point():
            nn.init.uniform_(parameter, 0.05, 0.2) if parameter.dim() == 1 else nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(X)


@pytest.fixture
def tiny():
    with seeded(0):
        return randomized(build_classifier("wrn_28_10", **TINY))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_173_962),
        ("resnet34_256", 21_282_122),
        ("wrn_28_10", 36_479_194),
        ("wrn_34_10", 46_160_474),
        ("wrn_70_16", 266_796_506),
        ("vit_tiny", 5_526_346),
    ],
)
def test_architectures_have_the_known_number_of_parameters(name, parameters):
    with torch.device("meta"):
        model = build_classifier(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_vit_tiny_equals_timms():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    ours = build_classifier("vit_tiny", classes=1000).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(2 * x - 1), rtol=1e-4, atol=1e-5)


def test_parameter_names_are_those_of_trades():
    names = set(build_classifier("wrn_28_10", depth=16, widen=2).state_dict())
    expected = {"conv1.weight", "block1.layer.0.convShortcut.weight", "block2.layer.0.bn1.running_mean"}
    expected |= {"block3.layer.1.conv2.weight", "block1.layer.1.bn2.weight", "bn1.bias", "fc.weight", "fc.bias"}
    assert expected <= names
    assert "block1.layer.1.convShortcut.weight" not in names


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.model.{key}": value for key, value in state.items()}},
        lambda state: {**state, "sub_block1.layer.0.bn1.weight": torch.ones(16)},
    ],
    ids=["plain", "state_dict", "module", "both", "unused-block"],
)
def test_checkpoints_load_in_every_form(wrap, tiny, tmp_path):
    torch.save(wrap(tiny.state_dict()), tmp_path / "c.pt")
    loaded = load_classifier(tmp_path / "c.pt", "wrn_28_10", **TINY)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(tiny))


def deepmind_name(key):
    """TRADES' names to DeepMind's, written independently of the loader."""
    stage, _, rest = key.partition(".")
    if stage.startswith("block"):
        number, name, kind = rest.removeprefix("layer.").split(".")
        names = {"bn1": "batchnorm_0", "bn2": "batchnorm_1", "conv1": "conv_0", "conv2": "conv_1"}
        name = names.get(name, "shortcut")
        return f"layer.{int(stage[-1]) - 1}.block.{number}.{name}.{kind}"
    return {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"}[stage] + "." + rest


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_deepminds_checkpoints_load(activation, tmp_path):
    with seeded(0):
        model = randomized(WideResNet(**TINY, activation=activation, deepmind=True))
    state = {deepmind_name(key): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "c.pt")
    loaded = load_classifier(tmp_path / "c.pt", "wrn_28_10", **TINY, activation=activation, deepmind=True)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match=r"a checkpoint whose weights fit WideResNet, got .*Missing key"):
        load_classifier(tmp_path / "c.pt", "wrn_28_10", **TINY)


def test_own_files_load(tmp_path):
    model = build_classifier("small_cnn", channels=3).eval()
    save_model(tmp_path / "c.safetensors", model, "classifier", "small_cnn", channels=3)
    assert torch.equal(logits(load_classifier(tmp_path / "c.safetensors")), logits(model))


class Malicious:
    """Pickles into a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"state_dict": {"conv1.weight": bad}}])
def test_files_that_hold_code_are_refused(wrap, tmp_path):
    path, touched = tmp_path / "c.pt", tmp_path / "touched"
    torch.save(wrap(Malicious(touched)), path)
    with pytest.raises(ValueError, match=r"load_classifier: name_or_path must be a checkpoint of tensors alone .* got"):
        load_classifier(path, "wrn_28_10", **TINY)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists(), "the file would have run its code"


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (None, "a readable checkpoint of torch.save"),
        (b"", "a readable checkpoint of torch.save"),
        (b"\x00" * 100, "got .*c.pt"),
        ([1, 2], 'a state dict, or {"state_dict": ...}'),
        ({"epoch": 3}, 'a state dict, or {"state_dict": ...}'),
        ({"conv1.weight": torch.ones(3)}, r"weights fit WideResNet, got .*c\.pt \(Missing key"),
    ],
    ids=["missing", "empty", "zeros", "list", "numbers", "other-weights"],
)
def test_other_files_are_refused(content, pattern, tmp_path):
    path = tmp_path / "c.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"load_classifier: name_or_path must be .*{pattern}"):
        load_classifier(path, "wrn_28_10", **TINY)


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (
            lambda: load_classifier(FLOORS),
            r"architecture must be the architecture of .*: one of 'small_cnn'",
        ),
        (lambda: load_classifier("c.pt"), r"name_or_path must be a file, .*, got c\.pt, which does not exist$"),
        (
            lambda: load_classifier(FLOORS, "vgg"),
            "architecture must be one of 'small_cnn', .* got 'vgg'",
        ),
        (lambda: load_classifier("c.safetensors", width=9), "options must be left out for c.safetensors, got .*9"),
        (lambda: load_classifier("Standard", width=9), "options must be left out for Standard"),
        (lambda: load_classifier("Standard", dataset="mnist"), "dataset must be one of 'cifar10', 'cifar100'"),
        (lambda: load_classifier("Standard", threat_model="L7"), "threat_model must be one of 'Linf', 'L2'"),
        (lambda: WideResNet(depth=12), "WideResNet: depth must be 6 n \\+ 4 for an integer n, got 12"),
        (lambda: WideResNet(deepmind=True, channels=1), "WideResNet: channels must be 3 with deepmind, got 1"),
    ],
)
def test_wrong_input_is_named(call, pattern):
    with pytest.raises(ValueError, match=pattern):
        call()


OPTIONS = {
    "architecture": "resnet18", "weights": "w.pt", "key": "ema", "normalize": "half", "download": True, "width": 9
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("torchvision:resnet18", {"weights", "key", "normalize", "width", "download"}),
        ("net.py:Net", {"weights", "key", "normalize", "width"}),
        ("c.pt", {"architecture", "key", "normalize", "width"}),
        ("archive.pt", {"architecture", "normalize"}),
        ("c.safetensors", {"architecture"}),
        ("Standard", {"architecture", "download"}),
        ("robustbench:Standard", {"download"}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_option_that_means_nothing_is_refused(name, takes, tmp_path, monkeypatch):
    """An architecture makes a checkpoint of any file."""
    monkeypatch.chdir(tmp_path)
    torch.jit.script(nn.Flatten()).save("archive.pt")
    for option, value in OPTIONS.items():
        if option not in takes:
            said = "options" if option == "width" else option
            with pytest.raises(ValueError, match=f"load_classifier: {said} must be left out for {name}, got"):
                load_classifier(name, **{option: value})


def test_recipes_and_commands_give_what_a_classifier_takes(tmp_path, monkeypatch):
    """The sizes of the data are options of networks that are built; a recipe's options, of none that states its own."""
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(*arguments, **options):
        asked.append((arguments, {key: value for key, value in options.items() if value not in (None, False)}))
        return nn.Flatten()

    for place in ("recipes.networks", "classifiers.zoo"):
        monkeypatch.setattr(f"atop_fast.{place}.load_classifier", load)
    data = Dataset(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64), ("a", "b", "c"))
    expected = {
        "torchvision:resnet18": (None, {"num_classes": 3}, True),
        "net.py:Net": (None, {}, True),
        "c.pt": ("small_cnn", {"channels": 1, "classes": 3}, True),
        "c.safetensors": (None, {}, False),
        "Standard": (None, {}, False),
        "robustbench:Standard": (None, {}, False),
    }
    for path, (architecture, sizes, own) in expected.items():
        recipe = Recipe(classifier=ClassifierSource(path=path, name="small_cnn", options={"width": 9}))
        build_networks(recipe, data, 0, torch.device("cpu"))
        named = () if architecture is None else (architecture,)
        assert asked.pop() == ((path, *named), {**sizes, **({"width": 9} if own else {})})
        System(path, None, None, GivenTransform(), architecture).alone(data)
        assert asked.pop() == ((path, architecture), sizes)


def test_a_name_without_robustbench_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "robustbench", None)
    with pytest.raises(ImportError, match=r"'Standard' needs the package robustbench: pip install 'atop-fast\[zoo\]'"):
        load_classifier("Standard")


@pytest.fixture(scope="module")
def zoo():
    """The CIFAR-10 models of the package robustbench for Linf."""
    try:
        with autoattack_is_pyautoattack():
            models = importlib.import_module("robustbench.model_zoo.models").model_dicts
            enums = importlib.import_module("robustbench.model_zoo.enums")
        assert "autoattack" not in sys.modules
    except ImportError as error:
        pytest.skip(f"robustbench is not installed ({error})")
    return models[enums.BenchmarkDataset("cifar10")][enums.ThreatModel("Linf")]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("theirs", "options", "architecture", "ours"),
    [
        ("wide_resnet.WideResNet", {"depth": 16, "widen_factor": 2, "sub_block1": True}, "wrn_28_10", {}),
        ("dm_wide_resnet.DMWideResNet", {"depth": 16, "width": 2}, "wrn_28_10", {"deepmind": True}),
        ("resnet.ResNet18", {}, "resnet18", None),
    ],
)
def test_logits_are_those_of_robustbenchs_network(theirs, options, architecture, ours, zoo, tmp_path):
    module, _, name = theirs.partition(".")
    network = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{module}"), name)
    with seeded(0):
        model = randomized(network(**options))
    torch.save(model.state_dict(), tmp_path / "c.pt")
    ours = {} if ours is None else {"depth": 16, "widen": 2, **ours}
    loaded = load_classifier(tmp_path / "c.pt", architecture, **ours)
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore")
def test_download_asks_robustbench(zoo, tmp_path, monkeypatch):
    asked, model = [], nn.Flatten()

    def fetch(**arguments):
        asked.append(arguments)
        return model

    monkeypatch.setattr("robustbench.utils.load_model", fetch)
    assert load_classifier("Standard", folder=tmp_path, download=True) is model
    assert not model.training
    expected = {"model_name": "Standard", "model_dir": str(tmp_path), "dataset": "cifar10", "threat_model": "Linf"}
    assert asked == [expected]


@pytest.mark.filterwarnings("ignore")
def test_named_models_are_read_and_never_fetched_unasked(zoo, tmp_path, monkeypatch):
    tiny = importlib.import_module("robustbench.model_zoo.architectures.wide_resnet").WideResNet
    monkeypatch.setitem(zoo["Standard"], "model", lambda: tiny(depth=10, widen_factor=1))
    with pytest.raises(ValueError, match=r"a model whose file is at .*Standard\.pt, or download=True, got 'Standard'"):
        load_classifier("Standard", folder=tmp_path)
    expected = r"name_or_path must be an existing file, or one of the \d+ models of RobustBench for cifar10 and Linf"
    with pytest.raises(ValueError, match=rf"{expected}, such as .*Standard.*, got 'Standart'"):
        load_classifier("Standart", folder=tmp_path)
    with pytest.raises(ValueError, match=rf"{expected}, such as .+, got 'x'"):
        load_classifier("x", folder=tmp_path)
    with seeded(0):
        model = randomized(tiny(depth=10, widen_factor=1))
    path = tmp_path / "cifar10" / "Linf" / "Standard.pt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    loaded = load_classifier("Standard", folder=tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    full = load_classifier("robustbench:cifar10/Linf/Standard", folder=tmp_path, normalize=None)
    assert torch.equal(logits(full), logits(model))
    # Its file names the package's constructor.
    save_model(tmp_path / "own.safetensors", loaded, metadata={"classes": list("0123456789")})
    assert torch.equal(logits(load_model(tmp_path / "own.safetensors")), logits(model))
    with pytest.raises(ValueError, match="robustbench:DATASET/NORM/NAME, got robustbench:Linf/Standard"):
        load_classifier("robustbench:Linf/Standard", folder=tmp_path)


@pytest.fixture
def resnet(tmp_path):
    """torchvision's ResNet-18 with weights of our own, and the file of them."""
    models = pytest.importorskip("torchvision").models
    with seeded(0):
        model = models.resnet18(num_classes=7).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "r.pt")
    return model, tmp_path / "r.pt"


def test_torchvisions_models_normalize_inside(resnet, tmp_path):
    model, path = resnet
    loaded = load_classifier("torchvision:resnet18", weights=path, num_classes=7)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = logits(lambda x: model((x - mean[:, None, None]) / std[:, None, None]))
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), expected)
    folded = fold_batch_norm(loaded)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    assert (logits(folded) - expected).norm() <= 1e-5 * expected.norm()
    torch.save(loaded.state_dict(), tmp_path / "again.pt")
    again = load_classifier("torchvision:resnet18", weights=tmp_path / "again.pt", num_classes=7)
    assert torch.equal(logits(again), logits(loaded))


def test_torchvisions_models_are_fetched_only_when_asked(resnet, monkeypatch):
    models, asked = pytest.importorskip("torchvision").models, []

    def fetch(weights, **options):
        asked.append(weights)
        return models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", fetch)
    load_classifier("torchvision:resnet18", weights=resnet[1], num_classes=7)
    with pytest.raises(ValueError, match=r"weights must be a file of weights, or None with download=True, .* got None"):
        load_classifier("torchvision:resnet18")
    with pytest.raises(
        ValueError, match=r"weights must be a file of weights, or None .* got .*r\.pt with download=True"
    ):
        load_classifier("torchvision:resnet18", weights=resnet[1], download=True)
    assert not asked
    assert isinstance(load_classifier("torchvision:resnet18", download=True), Normalized)
    assert asked == [models.ResNet18_Weights.DEFAULT]


def test_published_names_of_densenets_load(tmp_path):
    models = pytest.importorskip("torchvision").models
    small = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 8}
    with seeded(0):
        state = models.DenseNet(**small).state_dict()
    published = {key.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): v for key, v in state.items()}
    assert published.keys() != state.keys()
    torch.save(published, tmp_path / "d.pt")
    model = models.DenseNet(**small)
    loaded = _with_weights(model, tmp_path / "d.pt").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("call", "pattern"),
    [
        (lambda path: load_classifier("torchvision:vgg", weights=path), "one of torchvision.models.list_models.*got"),
        (
            lambda path: load_classifier("torchvision:resnet34", weights=path),
            r"weights must be .* fit ResNet, got .*Missing",
        ),
        (
            lambda path: load_classifier("torchvision:resnet18", weights="no.pt"),
            r"weights must be a readable .* got no\.pt",
        ),
        (
            lambda path: load_classifier(path, "resnet18", weights=path),
            r"weights must be left out for .*\.pt, got .*\.pt",
        ),
    ],
)
def test_wrong_input_for_packages_is_named(call, pattern, resnet):
    with pytest.raises(ValueError, match=f"load_classifier: .*{pattern}"):
        call(resnet[1])


def test_files_that_hold_code_are_refused_for_packages(tmp_path):
    pytest.importorskip("torchvision")
    torch.save(Malicious(tmp_path / "touched"), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="weights must be a checkpoint of tensors alone"):
        load_classifier("torchvision:resnet18", weights=tmp_path / "c.pt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(("package", "extra"), [("torchvision", "vision"), ("timm", "zoo")])
def test_a_missing_package_is_named_with_its_extra(package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'atop-fast\[{extra}\]'"):
        load_classifier(f"{package}:some", weights="c.pt")


def test_timms_models_normalize_inside(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    torch.save(model.state_dict(), tmp_path / "v.pt")
    loaded = load_classifier("timm:vit_tiny_patch16_224", weights=tmp_path / "v.pt")
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(2 * x - 1), rtol=1e-4, atol=1e-5)
    for name in ("hf-hub:timm/vit", "vit_tiny_patch16_224.none"):
        with pytest.raises(ValueError, match=r"one of timm\.list_models\(\), got 'timm:"):
            load_classifier(f"timm:{name}", weights=tmp_path / "v.pt")


@pytest.mark.parametrize(
    ("mean", "std", "pattern"),
    [
        ([], [], "mean must be one number"),
        ([0.5], [0.5, 1], "std must be 1 numbers"),
        ([0.5], [0], "std must be 1 num"),
    ],
)
def test_normalized_names_wrong_numbers(mean, std, pattern):
    with pytest.raises(ValueError, match=f"Normalized: {pattern}"):
        Normalized(nn.Identity(), mean, std)


def small():
    with seeded(0):
        return randomized(build_classifier("small_resnet")).eval()


def averaged(model):
    return torch.optim.swa_utils.AveragedModel(model).state_dict()


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "compiled": lambda m: prefixed("_orig_mod.", m.state_dict()),
    "compiled inside": lambda m: {k.replace("conv1", "conv1._orig_mod"): v for k, v in m.state_dict().items()},
    "parallel": lambda m: torch.nn.DataParallel(m).state_dict(),
    "compiled and parallel": lambda m: prefixed("module._orig_mod.", m.state_dict()),
    "averaged": averaged,
    "averaged parallel": lambda m: averaged(torch.nn.DataParallel(m)),
    "Lightning": lambda m: {
        "epoch": 3,
        "state_dict": prefixed("model.", m.state_dict()) | {"loss.weight": torch.ones(10), "mean": torch.ones(3)},
    },
    "an attribute": lambda m: {"state_dict": prefixed("net.backbone.", m.state_dict())},
    "model": lambda m: {"model": m.state_dict(), "optimizer": {"lr": 0.1}},
    "net": lambda m: {"net": m.state_dict(), "acc": 93.2},
}


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_wrappers_add_is_removed(wrap, tmp_path):
    model = small()
    torch.save(WRAPPED[wrap](model), tmp_path / "c.pt")
    assert torch.equal(logits(load_classifier(tmp_path / "c.pt", "small_resnet")), logits(model))


def test_a_key_picks_one_of_several(tmp_path):
    model, other = small(), small()
    list(other.parameters())[-1].data[0] += 1
    held = {"online": model.state_dict(), "target": other.state_dict(), "step": 3}
    torch.save(held, tmp_path / "two.pt")
    torch.save(prefixed("student.", held["online"]) | prefixed("teacher.", held["target"]), tmp_path / "flat.pt")
    for name, keys in (("two.pt", ("online", "target")), ("flat.pt", ("student", "teacher"))):
        for key, wanted in zip(keys, (model, other), strict=True):
            loaded = load_classifier(tmp_path / name, "small_resnet", key=key)
            assert torch.equal(logits(loaded), logits(wanted))
        with pytest.raises(ValueError, match=f"key='?{keys[0]}"):
            load_classifier(tmp_path / name, "small_resnet")
        with pytest.raises(ValueError, match="must be a checkpoint with a dictionary or tensors 'none'"):
            load_classifier(tmp_path / name, "small_resnet", key="none")
    with pytest.raises(ValueError, match="load_classifier: key must be left out for Standard, got 'online'"):
        load_classifier("Standard", key="online")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<!DOCTYPE html><html><body>Sign in</body></html>", r"is text \(HTML\)"),
        ("\n<html lang='en'>", r"is text \(HTML\)"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 45\n", "is a pointer of Git LFS"),
        ('{"error": "not found \u00e9"}', "is text, beginning with"),
        ("", "is empty"),
    ],
)
def test_what_stands_in_the_place_of_a_checkpoint_is_named(suffix, content, words, tmp_path):
    path = tmp_path / f"h.{suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"h\.{suffix} \({words}"):
        load_classifier(path, *(["small_resnet"] if suffix == "pt" else []))


def test_no_message_advises_to_run_code(tmp_path):
    path = tmp_path / "c.pt"
    torch.save({"a": Path("x")}, path)
    with pytest.raises(ValueError, match=r"c\.pt \(it holds pathlib\S*\)") as error:
        load_classifier(path, "small_resnet")
    assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match="a checkpoint of this run") as error:
        load_checkpoint("fit", path, {})
    assert "weights_only" not in str(error.value)


def test_another_threat_model_than_that_of_the_training_is_said():
    defense = Defense(RT2(4), None, build_classifier("small_cnn", channels=1))
    assert other_threat(defense, "Linf", 8 / 255) == ""
    defense.metadata = {"norm": "Linf", "eps": 0.25}
    assert other_threat(defense, "Linf", 0.25) == other_threat(defense.classifier, "L2", 1.0) == ""
    assert "--norm=Linf --eps=0.25" in other_threat(defense, "Linf", 8 / 255)
    assert "trained for Linf, eps 0.25, and is attacked in L2, eps 0.25" in other_threat(defense, "L2", 0.25)
