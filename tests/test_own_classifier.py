"""Your own classifier: FILE.py:Class, archives, the command check, and the programs that its file carries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from test_cli import fail
from torch import nn

from atop_fast import Defense, load_classifier, load_defense, load_model, load_recipe, save_defense, save_model
from atop_fast.classifiers import Normalized, Resized, programs
from atop_fast.classifiers.normalized import STATISTICS
from atop_fast.cli import main
from atop_fast.randomness import seeded
from atop_fast.transforms import RT1

# It names the brightest channel of normalized images; others are too bright for it to see a difference.
SOURCE = """
import torch
from torch import nn


class MyNet(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.features = nn.Conv2d(3, width, 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.relu(self.features(x)).mean(dim=(2, 3)))


def not_a_network():
    return "text"
"""
NAMES = ("red", "green", "blue")
DATA = ["--data=images", "--data.holdout=60"]
NET = ["mynet.py:MyNet", "--weights=mynet.pt"]
CHECK = ["check", *NET, "--normalize=half", "--classes=red,green,blue", *DATA]


def weights(width=4):
    """Output k is by how much channel k falls short of 0.3, times -5."""
    features, head, bias = torch.zeros(width, 3, 1, 1), torch.zeros(3, width), torch.full((width,), 0.3)
    features[:3, :, 0, 0], head[:, :3] = -torch.eye(3), -5 * torch.eye(3)
    return {"features.weight": features, "features.bias": bias, "head.weight": head, "head.bias": torch.zeros(3)}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a class, its weights, and a folder of images whose brightest channel is their class."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    # Consent of one test is none of the next.
    monkeypatch.setattr(programs, "CONSENTED", set())
    Path("mynet.py").write_text(SOURCE)
    torch.save(weights(), "mynet.pt")
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(NAMES):
        os.makedirs(f"images/{name}")
        for i in range(40):
            color = torch.randint(90, 150, (3,), generator=generator)
            color[label] = 200
            image.new("RGB", (8, 8), tuple(color.tolist())).save(f"images/{name}/{i}.png")
    return tmp_path


def stopped(capsys, *args):
    """The output of a command that must end with exit code 1."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().out.split())


def another_process(monkeypatch):
    """As in a new process, in which no program has consent."""
    monkeypatch.setattr(programs, "CONSENTED", set())


def expected(x):
    with torch.no_grad():
        return -5 * torch.relu(0.3 - (2 * x - 1)).mean(dim=(2, 3))


def test_check_writes_a_file_that_other_commands_take(own, capsys, monkeypatch):
    main(CHECK)
    out = capsys.readouterr().out
    assert "120 images: blue green red; 60 train, 60 held out" in out
    assert "Classifier: MyNet of mynet.py:MyNet, 31 parameters, images normalized by half" in out
    assert "Accuracy on 60 held-out images: 1.000 [0.940, 1.000]; always naming the most frequent class" in out
    lines = len(SOURCE.splitlines())
    assert (
        f"Wrote classifier.safetensors (0.0 MB); it carries {lines} lines of Python, mynet.py:MyNet, which --trust"
        in out
    )
    os.remove("mynet.py")
    os.remove("mynet.pt")
    short = [*DATA, "--steps=1", "--images=6", "--diagnostics=false"]
    another_process(monkeypatch)
    error = fail(capsys, "evaluate", "classifier.safetensors", *short)
    assert "trust must be given (--trust on the command line) to run the program in classifier.safetensors" in error
    assert not Path("runs").exists()
    with pytest.warns(UserWarning, match="labels are put in the order of the classifier's classes"):
        main(["evaluate", "classifier.safetensors", "--trust", *short])
    x = torch.rand(5, 3, 8, 8)
    another_process(monkeypatch)
    with pytest.raises(ValueError, match="load_model: trust must be given"):
        load_model("classifier.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(load_model("classifier.safetensors", trust=True)(x), expected(x))
    # The source is shown to those who have not consented.
    another_process(monkeypatch)
    with pytest.raises(SystemExit):
        main(["check", "classifier.safetensors", *DATA])
    assert SOURCE in capsys.readouterr().out


@pytest.mark.slow
def test_check_replaces_only_its_own_file_of_the_same_classifier(own, capsys):
    main(CHECK)
    main(CHECK)
    kept = {name: Path(name).read_bytes() for name in ("classifier.safetensors", "mynet.pt", "mynet.py")}
    # Another training of the class.
    torch.save({name: 2 * value for name, value in weights().items()}, "other.pt")
    other = [option if option != "--weights=mynet.pt" else "--weights=other.pt" for option in CHECK]
    assert "check: out must be a new file, or one that check wrote for" in fail(capsys, *other)
    # Names of the command's own input are no names for its output.
    for out in ("mynet.pt", "mynet.py", "classifier.safetensors", "images"):
        assert f"got {out}, which exists" in fail(capsys, *other, f"--out={out}")
    assert "check: out must be a file in a folder that exists" in fail(capsys, *other, "--out=none/new.safetensors")
    main([*other, "--out=new.safetensors"])
    # Metadata of the user's are lost nowhere.
    model = load_classifier("mynet.py:MyNet", weights="mynet.pt", normalize="half")
    save_model("noted.safetensors", model, metadata={"license": "mine"})
    assert "got noted.safetensors, which exists" in fail(capsys, *CHECK, "--out=noted.safetensors")
    assert {name: Path(name).read_bytes() for name in kept} == kept
    assert torch.equal(load_model("new.safetensors").state_dict()["model.head.weight"], 2 * weights()["head.weight"])


def test_a_source_cannot_hide_from_those_who_read_it(own, capsys, monkeypatch):
    """Sequences that move the cursor or reverse the order of letters are shown as escapes."""
    Path("mynet.py").write_text(SOURCE + "import os  # \x1b[1A\x1b[2K \u202e\n")
    save_model("a.safetensors", load_classifier("mynet.py:MyNet", weights="mynet.pt"))
    another_process(monkeypatch)
    assert "trust must be given" in fail(capsys, "doctor", "--classifier=a.safetensors", *DATA)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["check", "a.safetensors", *DATA])
    assert SOURCE + "import os  # \\x1b[1A\\x1b[2K \\u202e\n" in capsys.readouterr().out


def test_consent_is_for_one_text(own, monkeypatch):
    model = load_classifier("mynet.py:MyNet", weights="mynet.pt", normalize="half")
    save_model("a.safetensors", model)
    save_defense("d.safetensors", Defense(RT1(4), None, Resized(model, 8)))
    Path("mynet.py").write_text(SOURCE.replace("relu", "sigmoid"))
    save_model("b.safetensors", load_classifier("mynet.py:MyNet", weights="mynet.pt"))
    another_process(monkeypatch)
    with pytest.raises(ValueError, match="load_defense: trust must be given"):
        load_defense("d.safetensors")
    load_defense("d.safetensors", trust=True)
    # The same program in another file, and another program of the same name.
    load_model("a.safetensors")
    with pytest.raises(ValueError, match="trust must be given"):
        load_model("b.safetensors")


@pytest.mark.parametrize(
    "kind", ["script", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("frozen", "export"))]
)
@pytest.mark.filterwarnings("ignore")
def test_archives(own, kind, capsys, monkeypatch):
    network = load_classifier("mynet.py:MyNet", weights="mynet.pt")
    if kind == "export":
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(network, (torch.rand(4, 3, 8, 8),), dynamic_shapes=dynamic), "net.pt2")
    else:
        script = torch.jit.trace(network, torch.rand(2, 3, 8, 8))
        (torch.jit.freeze(script) if kind == "frozen" else script).save("net.pt2")
    check = ["check", "net.pt2", "--normalize=half", "--classes=red,green,blue", *DATA]
    assert "trust must be given" in fail(capsys, *check)
    main([*check, "--trust"])
    out = capsys.readouterr().out
    assert "Accuracy on 60 held-out images: 1.000" in out
    assert "it carries an archive of Torch" in out or "it carries an archive of torch.export" in out
    os.remove("net.pt2")
    another_process(monkeypatch)
    short = [*DATA, "--steps=2", "--images=4", "--diagnostics=false"]
    assert "trust must be given" in fail(capsys, "evaluate", "classifier.safetensors", *short)
    main(["evaluate", "classifier.safetensors", "--trust", *short])
    another_process(monkeypatch)
    model = load_model("classifier.safetensors", trust=True)
    x = torch.rand(3, 3, 8, 8, requires_grad=True)
    torch.testing.assert_close(model(x).detach(), expected(x))
    assert torch.autograd.grad(model(x).sum(), x)[0].abs().sum() > 0
    # The bytes that were consented to are the bytes that run.
    state = {"archive": torch.frombuffer(bytearray(model.model.data), dtype=torch.uint8).clone()}
    state["archive"][40] += 1
    with pytest.raises(ValueError, match="nobody consented"):
        programs.restore_archive(model.model.kind, state)


@pytest.mark.filterwarnings("ignore")
def test_an_export_for_one_batch_size_is_refused(own, capsys):
    network = load_classifier("mynet.py:MyNet", weights="mynet.pt")
    torch.export.save(torch.export.export(network, (torch.rand(4, 3, 8, 8),)), "net.pt2")
    assert "check: data must be images that the networks take" in fail(capsys, "check", "net.pt2", "--trust", *DATA)


def test_a_wrong_normalization_is_no_classifier(own, capsys):
    out = stopped(capsys, *[option for option in CHECK if not option.startswith("--normalize")])
    assert "it normalizes twice, or not at all" in out
    assert "Nothing was written" in out
    assert not Path("classifier.safetensors").exists()


def test_classes_in_another_order_are_no_fault_of_the_normalization(own, capsys):
    out = stopped(capsys, *[option for option in CHECK if not option.startswith("--classes")])
    assert "1.00 if outputs stand for other labels (0 for 2, 2 for 0): labels and classifier number" in out
    assert "normalizes" not in out
    assert "Nothing was written" in out
    Path("names.txt").write_text("red\ngreen\nblue\n")
    main([*CHECK[:-3], "--classes=names.txt", *DATA])
    main(["check", "classifier.safetensors", *DATA])
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["mynet.py", "--weights=mynet.pt"], "classifier must be FILE.py:Class, such as mynet.py:MyNet, got mynet.py"),
        (["mynet.py:MyNet"], "weights must be the file of the state dict of mynet.py:MyNet"),
        (["mynet.py:Other", "--weights=mynet.pt"], "it defines MyNet, not_a_network"),
        (["mynet.py:not_a_network", "--weights=mynet.pt"], "it builds a str"),
        (["none.py:MyNet", "--weights=mynet.pt"], "a readable FILE.py:Class, got none.py:MyNet"),
        (["broken.py:MyNet", "--weights=mynet.pt"], "broken.py, line 1"),
        (["neighbor.py:MyNet", "--weights=mynet.pt"], "of installed packages alone"),
        ([*NET, "--architecture=resnet18"], "architecture must be left out for mynet.py:MyNet"),
        ([*NET, "--options={width: 9}"], "size mismatch for features.weight"),
        ([*NET, "--options={depth: 9}"], "unexpected keyword argument 'depth'"),
        ([*NET, "--normalize=imagnet"], "normalize must be MEAN/STD"),
        ([*NET, "--normalize=0.5/0"], "std must be"),
        ([*NET, "--classes=red,green"], "got 'blue' among blue green red"),
        ([*NET, "--classes=red,green,blue,gray"], "the names of the classifier's 3 classes, in its order, got 4"),
        (["mynet.pt"], "or the classifier FILE.py:Class with this file as `weights`"),
    ],
)
def test_what_is_wrong_is_named(own, capsys, args, said):
    Path("broken.py").write_text("class MyNet(nn.Module)\n")
    Path("neighbor.py").write_text("import helper_beside_it\n" + SOURCE)
    Path("helper_beside_it.py").write_text("")
    assert said in fail(capsys, "check", *args, *DATA)
    assert not Path("classifier.safetensors").exists()


def test_missing_weights_are_three_names_and_a_count(own, capsys):
    torch.save({f"other.{i}": torch.zeros(1) for i in range(120)}, "mynet.pt")
    error = fail(capsys, "check", *NET, *DATA)
    assert "and 117 more" in error
    assert len(error) < 700


def test_sizes_come_from_the_file(own, capsys):
    image = pytest.importorskip("PIL.Image")
    main(CHECK)
    for name in NAMES:
        for i, path in enumerate(sorted(Path("images", name).iterdir())):
            with image.open(path) as picture:
                picture.resize((8 + i % 3, 9)).save(path)
    main(["check", "classifier.safetensors", *DATA])
    assert capsys.readouterr().out.count("Accuracy on 60 held-out images: 1.000") == 2
    error = fail(capsys, "evaluate", "classifier.safetensors", *DATA, "--data.size=16")
    assert "data.size must be left out, or as classifier.safetensors states it: images of 3x8x8, got 16" in error
    error = fail(capsys, "doctor", "--classifier=classifier.safetensors", *DATA, "--data.grayscale=true")
    assert "images of 3x8x8" in error
    error = fail(capsys, "train", "cifar10-native-rt2", "--classifier=classifier.safetensors", *DATA, "--data.size=16")
    assert "images of 3x8x8" in error


SMALL = [
    *("--pretrain.batch_size=8", "--finetune.batch_size=8", "--evaluation.protocol=quick"),
    *("--purifier.options={width: 4}", "--pretrain.epochs=1", "--pretrain.evaluate_every=0", "--finetune.epochs=1"),
    *("--finetune.evaluate_every=0", "--transform.sigma=0.1", "--evaluation.steps=1", "--evaluation.draws=1"),
    *("--evaluation.images=4", "--evaluation.diagnostics=false", "--evaluation.selection_draws=1"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_defense_for_it_and_its_archive(own, capsys, monkeypatch):
    """A class of the command's own is run; one that only a file names is not."""
    train = ["train", "cifar10-native-rt2", *DATA, *SMALL, "--out=run"]
    main([*train, "--classifier", NET[0], "--classifier.weights=mynet.pt", "--classifier.normalize=half"])
    main(["report", "run", "--pack=run.zip"])
    capsys.readouterr()
    assert "--trust --out" in Path("run/repeat.sh").read_text()
    another_process(monkeypatch)
    short = ["--steps=1", "--diagnostics=false"]
    for run in ("run", "run.zip"):
        assert "trust must be given" in fail(capsys, "evaluate", run, *short, "--out=refused")
        assert not Path("refused").exists()
    main(["evaluate", "run.zip", "--trust", *short, "--out=e"])
    another_process(monkeypatch)
    with pytest.raises(ValueError, match=r"to run mynet\.py:MyNet, which run/recipe\.yaml names"):
        load_recipe("run/recipe.yaml")
    assert load_recipe("run/recipe.yaml", trust=True).classifier.path == NET[0]
    capsys.readouterr()
    assert "load_recipe: trust must be given" in fail(capsys, "train", "run/recipe.yaml", "--out=again")
    assert set() == programs.CONSENTED


def test_normalized_takes_the_plain_state_dict():
    with seeded(0):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
        other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    for model in (Normalized(other, *STATISTICS["cifar10"]), Resized(Normalized(other, *STATISTICS["cifar10"]), 8)):
        inner = model if isinstance(model, Normalized) else model.classifier
        own = model.state_dict()
        prefix = "" if inner is model else "classifier."
        model.load_state_dict({prefix + name: value for name, value in network.state_dict().items()})
        assert torch.equal(other[2].weight, network[2].weight)
        model.load_state_dict(own)
    with pytest.raises(RuntimeError, match="Missing key"):
        Normalized(other, [0.5], [0.5]).load_state_dict({"0.weight": network[0].weight})
    # A network with a part that is called as the wrapper's.
    nested = nn.ModuleDict({"model": network})
    Normalized(nested, [0.5], [0.5]).load_state_dict(nested.state_dict())
