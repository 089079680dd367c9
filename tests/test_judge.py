"""The table of defenses: its rows repeat, count as AutoAttack does, and say which defense is an illusion."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
from test_cli import DATA, fail, files  # noqa: F401
from torch import nn

from atop_fast import (
    PGD,
    RT1,
    RT2,
    AutoAttack,
    Defense,
    build_classifier,
    evaluate,
    judge,
    load_model,
    save_defense,
    save_model,
)
from atop_fast.classifiers import Normalized, Resized
from atop_fast.cli import main
from atop_fast.defenses import DEFENSES, GaussianNoise, SelfEnsemble, WinnersTakeAll
from atop_fast.defenses.judge import RULES, Effort, described, strongest
from atop_fast.defenses.own import find
from atop_fast.defenses.table import COLUMNS, confusion, to_csv, truth
from atop_fast.evaluation.runs import Run, read_candidates
from atop_fast.randomness import Tag, derive_seed, random_uniform, seeded

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from _judged import section

SMALL = Effort(eps=0.15, steps=3, n_queries=10, draws=4, batch_size=4)


# The images of test_cli have two classes, too few for the loss dlr.
pytestmark = pytest.mark.filterwarnings("ignore:APGD. loss is 'margin':UserWarning")
# The doctor takes most of the time of the rule sound.


@pytest.fixture(scope="module")
def classifier():
    with seeded(0):
        return build_classifier("small_cnn", channels=1, classes=3, width=4).eval()


@pytest.fixture(scope="module")
def noise(classifier):
    """Ten images and the classes that the classifier sees in them."""
    x = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return x, classifier(x).argmax(dim=1)


def numbers(row):
    """A row without its times."""
    return {key: value for key, value in row.items() if key != "seconds"}


def run(name, classifier, noise, out, batch_size=4, **options):
    options |= {"effort": replace(SMALL, batch_size=batch_size), "progress": False}
    return judge(DEFENSES[name](classifier, noise[0].shape[1:]).eval(), *noise, out=out, name=name, **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "random-jpeg", "pruning"])
def test_a_row_that_was_stopped_twice_has_the_bits_of_another(name, classifier, noise, tmp_path, monkeypatch):
    whole = run(name, classifier, noise, tmp_path / "whole", rules=RULES)
    assert whole["complete"]
    assert run(name, classifier, noise, tmp_path / "cut", rules=RULES, budget=0) == {
        **{key: whole[key] for key in ("defense", "model", "images")}, "seconds": {}, "complete": False
    }  # fmt: skip
    add = Run.add
    for units in (2, 3):

        def stopping(self, unit, left=[units]):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            add(self, unit)

        monkeypatch.setattr(Run, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(name, classifier, noise, tmp_path / "cut", rules=RULES, batch_size=units)
        monkeypatch.setattr(Run, "add", add)
    assert numbers(run(name, classifier, noise, tmp_path / "cut", rules=RULES, budget="1h")) == numbers(whole)
    # A finished row needs no time.
    assert numbers(run(name, classifier, noise, tmp_path / "cut", rules=RULES, budget=0)) == numbers(whole)


def test_single_draws_count_as_autoattack_does(classifier, noise, tmp_path):
    model = DEFENSES["random-jpeg"](classifier, noise[0].shape[1:]).eval()
    row = judge(model, *noise, out=tmp_path, rules=RULES[:2], effort=SMALL, progress=False)
    for rule, last in (("standard", "square"), ("rand", "apgd-dlr")):
        attack = AutoAttack(model, "Linf", 0.15, version=rule, steps=3, n_queries=10)
        attack.run_standard_evaluation(*noise)
        assert row[rule] == pytest.approx(attack.accuracy[last])
        assert row[f"{rule}_ci"][0] <= row[rule] <= row[f"{rule}_ci"][1]
    assert "sound" not in row
    for rules in ([], "sound"):
        with pytest.raises(ValueError, match="judge: rules must be a list of some of 'standard', 'rand', 'sound'"):
            run("none", classifier, noise, tmp_path, rules=rules)
    with pytest.raises(ValueError, match="judge: rules must be one of 'standard', 'rand', 'sound', got 'loud'"):
        run("none", classifier, noise, tmp_path, rules=["loud"])


def test_a_model_in_training_mode_is_judged_in_evaluation_mode(noise, tmp_path):
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = nn.Sequential(*layers).train()
    given = {name: value.clone() for name, value in model.state_dict().items()}
    row = judge(model, noise[0], noise[1] % 4, out=tmp_path / "a", rules=["rand"], effort=SMALL, progress=False)
    assert model.training
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items())
    options = {"rules": ["rand"], "effort": SMALL, "progress": False}
    assert numbers(judge(model.eval(), noise[0], noise[1] % 4, out=tmp_path / "b", **options)) == numbers(row)
    repeats = json.loads((tmp_path / "a/rand/run.json").read_text())["attack"]
    assert "eot_iter=1," in repeats


def test_what_is_in_front_of_a_defense_inside_the_classifier_counts(classifier):
    model = Defense(RT2(4, sigma=0.1), None, SelfEnsemble(classifier))
    assert list(strongest(model, SMALL, random=True)) == ["exact", "bpda", "blind", "square"]
    assert described(model) == f"{model.transform!r}, SelfEnsemble(sigma_first=0.2, sigma=0.1)"
    model = DEFENSES["self-ensemble"](classifier, (3, 8, 8))
    assert list(strongest(model, SMALL, random=True)) == ["exact", "blind", "square"]
    assert described(model) == "SelfEnsemble(sigma_first=0.1, sigma=0.05)"


@pytest.mark.slow
def test_the_sound_verdict_is_that_of_evaluate(classifier, noise, tmp_path):
    x, y = noise
    for name, attacks in (
        ("random-jpeg", ["exact", "bpda", "blind", "square"]),
        ("winners", ["exact", "blind", "square"]),
    ):
        model = DEFENSES[name](classifier, x.shape[1:]).eval()
        row = run(name, classifier, noise, tmp_path / name, rules=["sound"])
        given = strongest(model, SMALL, random=name == "random-jpeg")
        assert list(given) == [key for key in row if key in given] == attacks
        report = evaluate(model, x, y, norm="Linf", eps=0.15, attacks=given, draws=4, progress=False, diagnostics=())
        assert row["sound"] == pytest.approx(report.robust.mean, abs=0.1)
        assert row["draws"] == (4 if name == "random-jpeg" else 1)
        found = read_candidates(tmp_path / name / "sound", "blind", range(10))
        seed, options = derive_seed(0, "attack"), {"steps": 3, "momentum": 0.9, "schedule": "cosine"}
        plain = PGD(classifier, eps=0.15, seed=seed, **options)(x, y, torch.arange(10))
        assert torch.allclose(torch.stack([found[i] for i in range(10)]), plain, atol=1e-6)


class Seen(nn.Module):
    """A classifier that remembers the shape of its images, and needs no other layer than an activation."""

    def forward(self, x):
        self.shape = tuple(x.shape[1:])
        return torch.relu(F.conv2d(x, torch.ones(3, x.shape[1], 1, 1))).mean(dim=(2, 3))


@pytest.mark.parametrize("name", DEFENSES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 64)])
def test_the_classifier_sees_images_of_their_own_shape(name, shape):
    x, classifier = torch.rand(2, *shape), Seen()
    assert DEFENSES[name](classifier, shape).eval()(x).shape[1:] == (3,)
    assert classifier.shape == shape


class Drawn(Seen):
    """A classifier with keyed noise on its logits."""

    keyed = True

    def forward(self, x, seed, sample_ids, draw):
        return super().forward(x) + 0.1 * random_uniform((3,), seed, sample_ids, draw, Tag.NOISE)


def test_the_attack_on_a_classifier_that_draws_has_its_key():
    x, y, ids = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    attack = strongest(Defense(RT2(4, sigma=0.1), None, Drawn()).eval(), SMALL, random=True)["blind"]
    adversarial = attack(x, y, ids)
    assert torch.equal(adversarial[:2], attack(x[:2], y[:2], ids[:2]))
    assert not torch.equal(adversarial, x)


def test_resize_pad_needs_squares():
    assert repr(DEFENSES["resize-pad"](Seen(), (3, 32, 32)).transform) == "RandomResizePad(min_size=26, max_size=32)"
    with pytest.raises(ValueError, match="judge: images must be square for resize-pad, got 24x32 pixels"):
        DEFENSES["resize-pad"](Seen(), (3, 24, 32))


def test_what_is_an_illusion():
    row = {"defense": "a", "standard": 0.1, "rand": 0.2, "sound": 0.0, "findings": {}}
    assert truth(row, 0.0) == "illusion"
    assert truth(row, 0.11) == "no claim"
    assert truth({**row, "sound": 0.1}, 0.0) == "sound"
    # 0.7 - 0.6 < 0.1 and 0.2 + 0.1 > 0.3 in float64.
    for alone, high in ((0.6, 0.7), (0.2, 0.3)):
        assert truth({**row, "sound": high}, alone) == "sound"
        assert truth({**row, "standard": high}, alone) == "illusion"
        assert truth({**row, "standard": high - 1e-4, "sound": high - 1e-4}, alone) == "no claim"
    assert truth({**row, "defense": "none"}, 0.0) == "sound"
    assert truth({"defense": "a", "sound": 0.0}, 0.0) is None
    assert truth({"defense": "a", "rand": 0.3}, 0.0) is None
    alone = {**row, "defense": "none", "findings": {"black_box": "warn"}}
    flagged = {**row, "defense": "b", "findings": {"black_box": "fail", "ball": "fail"}}
    # The last is no check of the doctor.
    other = {**row, "defense": "c", "findings": {"ball": "fail"}}
    rows = [alone, row, flagged, other]
    assert confusion(rows)["illusion"] == {"flagged": ["b"], "not flagged": ["a", "c"]}
    assert confusion(rows)["sound"] == {"flagged": [], "not flagged": ["none"]}
    # Without the classifier alone, nothing is known.
    assert confusion(rows[1:])["illusion"] == {"flagged": [], "not flagged": []}


class Turned(nn.Module):
    """A purifier that hands attacks the opposite of the gradient."""

    def forward(self, corrupted):
        images = corrupted[:, :-2]
        return 2 * images.detach() - images


class Binarize(nn.Module):
    """A purifier that takes images close to black and white: robust on digits."""

    def forward(self, corrupted):
        return torch.tanh(4 * corrupted[:, :-2])


@pytest.mark.slow
def test_the_doctor_flags_the_illusion_and_not_the_sound_one(tmp_path):
    """Sign-turned gradients, which single draws of `rand` take for robustness, and a defense that works."""
    data, classifier, rows = models.mnist().take(slice(0, 48)), models.standard_mnist(), []
    effort = Effort(eps=0.15, steps=10, n_queries=50, draws=4, batch_size=48)
    for name, model in {
        "none": classifier,
        "illusion": Defense(RT2(4, 0.0, 0.02), Turned(), classifier).eval(),
        "works": Defense(RT1(2, 0.05), Binarize(), classifier).eval(),
    }.items():
        options = {"rules": RULES[1:], "effort": effort, "progress": False}
        rows.append(judge(model, data.images, data.labels, out=tmp_path / name, name=name, **options))
    assert confusion(rows) == {
        "illusion": {"flagged": ["illusion"], "not flagged": []},
        "sound": {"flagged": [], "not flagged": ["none", "works"]},
        "no claim": {"flagged": [], "not flagged": []},
    }
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert tuple(table[0]) == COLUMNS
    assert [row["truth"] for row in table] == ["sound", "illusion", "sound"]
    assert float(table[1]["rand_high"]) == rows[1]["rand_ci"][1]
    assert "gradient_modes" in table[1]["failed"]
    assert [row["standard"] for row in table] == [""] * 3


@pytest.mark.slow
def test_command(files, capsys):  # noqa: F811
    small = ["--classifier=classifier.safetensors", *DATA, "--images=3", "--steps=1", "--n_queries=2", "--draws=2"]
    main(["judge", "none,jpeg", *small, "--budget=0", "--out=t"])
    assert "Not finished in the budget, and without a number: none (standard)" in capsys.readouterr().out
    main(["judge", "jpeg", *small, "--out=t", "--rules=[sound]"])
    main(["judge", "none,jpeg", *small, "--out=t", "--rules=[standard, rand]"])
    assert "Not finished" not in capsys.readouterr().out
    document = json.loads((files / "t/judge.json").read_text())
    assert [row["defense"] for row in document["rows"]] == ["none", "jpeg"]
    assert [set(row["seconds"]) for row in document["rows"]] == [set(RULES[:2]), set(RULES)]
    assert {*RULES, "exact", "bpda", "blind", "square"} <= document["rows"][1].keys()
    assert document["classifier"] == "classifier.safetensors"
    assert document["confusion"] == confusion(document["rows"])
    assert (files / "t/judge.csv").read_text() == to_csv(document["rows"])
    assert (files / "t/judge.png").read_bytes()[:4] == b"\x89PNG"
    # The page's part of this table: equally many cells in every line.
    text = section("judge-standard--cpu", document)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[1:3]] == ["| none", "| jpeg"]
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert f"{document['rows'][1]['sound']:.2f} [" in lines[2]
    main(["judge", "jpeg", *small, "--out=again", "--rules=[standard]"])
    (again,) = json.loads((files / "again/judge.json").read_text())["rows"]
    assert numbers(again).items() <= numbers(document["rows"][1]).items()
    for args, expected in (
        (["jpeg", "--images=2", "--out=t"], "another data, images"),
        (["jpge"], "defense must be all, one of 'none'"),
        (["all", "--rules=[loud]"], "rules must be one of"),
        (["all", "--rules=[]"], "rules must be a list of some of"),
        (["jpeg,none,jpeg"], "defense must be defenses with different names"),
    ):
        capsys.readouterr()
        assert expected in fail(capsys, "judge", args[0], *small, *args[1:])


def test_your_own_defense_by_one_command(files, capsys):  # noqa: F811
    """The file of the page, under 60 lines, and its command."""
    text = (Path(__file__).parent.parent / "docs" / "judged.md").read_text(encoding="utf-8")
    _, code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 60
    (command,) = re.findall(r"^    atop-fast judge (none,blocks.*)$", text, re.MULTILINE)
    (files / "blocks.py").write_text(code)
    small = [*DATA[1:], "--images=3", "--steps=1", "--n_queries=2", "--draws=2", "--rules=[rand]"]
    main(["judge", *command.split(), *small, "--out=t"])
    rows = json.loads((files / "t/judge.json").read_text())["rows"]
    assert [(row["defense"], row["model"]) for row in rows[1:]] == [("Blocks", "Blocks(size=2, sigma=0.1)")]
    assert "rand" in rows[1]
    (files / "more.py").write_text(
        "from atop_fast import RT1, Defense\n\n\ndef masked(model):\n    return Defense(RT1(2), None, model)\n\n\n"
        "def wrong(model):\n    return 3\n\n\ndef bare():\n    return 3\n\n\nnothing = 5\nnone = masked\n\n\n"
        "def odd(model):\n    return Defense(RT1(5), None, model)\n\n\n"
        "class Needs(RT1):\n    def __init__(self, more):\n        super().__init__(2)\n"
    )
    given = ["--classifier=classifier.safetensors", "--data.source=images", *small, "--out=t"]
    # Before the rows in front of it.
    capsys.readouterr()
    assert "divisible by patch=5" in fail(capsys, "judge", "none,more.py:odd", *given[:-1], "--out=u")
    assert not (files / "u").exists()
    main(["judge", "more.py:masked", *given])
    assert "masked" in (files / "t/judge.csv").read_text()
    # Another rule of another defense is no part of this row.
    (files / "changed.py").write_text((files / "more.py").read_text().replace("RT1(2)", "RT1(4)"))
    before = (files / "t/judge.json").read_text()
    capsys.readouterr()
    error = fail(capsys, "judge", "changed.py:masked", *given, "--rules=[standard]")
    assert "t/masked, which belongs to a run with another defense" in error
    assert (files / "t/judge.json").read_text() == before
    for name, expected in (
        ("more.py:wrong", "a function that returns a module, got more.py:wrong -> 3"),
        ("more.py:bare", "that returns a module, got more.py:bare, which fails: bare() takes 0 positional arguments"),
        ("more.py:Needs", "a subclass of RandomTransform that is built without arguments, got more.py:Needs, which"),
        ("more.py:none", "named otherwise than the table's own 'none', got more.py:none"),
        ("a/jpeg.safetensors", "named otherwise than the table's own 'jpeg', got a/jpeg.safetensors"),
        ("more.py:nothing", "a function from the classifier to a module in more.py, got nothing, which is 5"),
        ("none.py:x", "the path of a Python file before the colon, got none.py:x"),
    ):
        capsys.readouterr()
        assert expected in fail(capsys, "judge", name, *given)


def test_a_function_that_changes_its_classifier_changes_no_other_row(classifier, noise, tmp_path):
    code = "def coarse(model):\n    model.register_forward_pre_hook(lambda m, x: (x[0].round(),))\n    return model\n"
    (tmp_path / "own.py").write_text(code)
    x, expected = noise[0], classifier(noise[0])
    defended = find(f"{tmp_path / 'own.py'}:coarse")[1](classifier, x.shape[1:])
    torch.testing.assert_close(classifier(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(defended(x), classifier(x.round()), rtol=0, atol=0)


def test_a_saved_defense_has_the_options_of_the_given_classifier(classifier, tmp_path):
    for name, module, other in (
        ("size", Resized(classifier, 16), Resized(classifier, 32)),
        ("ratio", WinnersTakeAll(classifier, 0.1), WinnersTakeAll(classifier, 0.9)),
    ):
        path = tmp_path / f"{name}.safetensors"
        save_defense(path, Defense(GaussianNoise(0), None, module.eval()))
        find(str(path))[1](module, (1, 8, 8))
        with pytest.raises(ValueError, match="judge: defense must be a defense of the given classifier"):
            find(str(path))[1](other.eval(), (1, 8, 8))


@pytest.mark.slow
def test_a_saved_defense_of_the_same_classifier(files, capsys):  # noqa: F811
    classifier = load_model("classifier.safetensors", "classifier")
    save_defense("mine.safetensors", Defense(RT1(2), load_model("purifier.safetensors", "purifier"), classifier))
    given = ["--classifier=classifier.safetensors", *DATA, "--images=2", "--steps=1", "--n_queries=2", "--rules=[rand]"]
    main(["judge", "mine.safetensors", *given])
    (row,) = json.loads((files / "runs/judge/judge.json").read_text())["rows"]
    assert (row["defense"], row["model"]) == ("mine", f"{RT1(2)!r}, GatedUNet")
    # Under the seed of every test it would be the given one.
    with seeded(1):
        other = build_classifier("small_cnn", channels=1, classes=2)
    save_defense("other.safetensors", Defense(RT1(2), None, other))
    capsys.readouterr()
    assert "whose classifier has other weights" in fail(capsys, "judge", "other.safetensors", *given)
    # The same weights behind two normalizations are two classifiers.
    for name, deviation in (("half", 0.5), ("other", 0.25)):
        normalized = Normalized(classifier, [0.5], [deviation]).eval()
        save_defense(f"{name}.safetensors", Defense(RT1(2), None, normalized))
        save_model(f"classifier-{name}.safetensors", normalized)
    given[0] = "--classifier=classifier-half.safetensors"
    assert "another normalization" in fail(capsys, "judge", "other.safetensors", *given, "--out=n")
    main(["judge", "half.safetensors", *given, "--out=n"])


def test_the_first_example_of_the_page(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "judged.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # In small.
    monkeypatch.setitem(judge.__kwdefaults__, "effort", SMALL)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    accuracy, *ends = map(float, re.findall(r"[\d.]+", capsys.readouterr().out))
    assert ends[0] <= accuracy <= ends[1]


def test_command_of_several_processes_is_refused(files, capsys, monkeypatch):  # noqa: F811
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    error = fail(capsys, "judge", "none", "--classifier=classifier.safetensors", *DATA)
    assert "judge: processes must be one" in error
    assert not (files / "runs").exists()
