"""atop-fast train: presets, recipes, and the run from images to a report, killed, resumed and shared."""

from __future__ import annotations

import importlib.resources
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from toolkit import PATIENCE, SPAWN, end_itself, ranks

from atop_fast import build_classifier, build_purifier, load_defense, load_model, save_model
from atop_fast.cli import main
from atop_fast.evaluation import PROTOCOLS, pictures
from atop_fast.evaluation.protocols import Entry
from atop_fast.purifiers import DISCRIMINATORS
from atop_fast.randomness import derive_seed, seeded
from atop_fast.recipes.networks import Resized
from atop_fast.recipes.run import run_recipe
from atop_fast.recipes.schema import Recipe, load_recipe, preset_names
from atop_fast.recipes.verdicts import ABLATION
from atop_fast.training import train_classifier
from atop_fast.training.metrics import read_metrics

PUBLISHED = [
    *("cifar10-rt1", "cifar10-rt2", "cifar10-rt3", "cifar100-rt2"),
    *("imagenette-rt1", "imagenette-rt2", "imagenette-rt3"),
]
NATIVE = ["cifar10-native-rt1", "cifar10-native-rt2", "cifar10-native-rt2-at", "cifar10-native-rt3"]
TINY = {
    "base": "cifar10-native-rt2",
    "data": {"source": "images", "holdout": 8},
    "classifier": {"name": "small_cnn", "training": {"epochs": 2, "batch_size": 8, "lr": 0.05, "evaluate_every": 0}},
    "purifier": {"options": {"width": 4}},
    "discriminator": {"options": {"width": 4, "depth": 2}},
    "pretrain": {"epochs": 2, "batch_size": 8, "gan_weight": 0.005},
    "finetune": {"epochs": 2, "batch_size": 8, "eps": 0.2, "evaluate_every": 2, "gan_weight": 0.005},
    "evaluation": {
        "protocol": "quick",
        "eps": 0.2,
        "steps": 8,
        "draws": 2,
        "selection_draws": 2,
        "diagnostics": False,
    },
}
FILES = [
    *("classifier.safetensors", "defense.safetensors", "discriminator.safetensors", "evaluate_classifier"),
    *("evaluate_finetuned", "evaluate_pretrained", "evaluate_rt_only", "finetuned.safetensors", "gallery.png"),
    *("metrics.jsonl", "pretrained.safetensors", "recipe.yaml", "repeat.sh", "report.html"),
    *("report.json", "run.json"),
]
SYSTEMS = ["classifier", "rt_only", "pretrained", "finetuned"]


@pytest.fixture
def files(tmp_path):
    """A folder with images/, noisy ones of 16x16 pixels and two brightnesses, and tiny.yaml, a recipe for them."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    noise = torch.randint(-40, 40, (2, 12, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    for label in range(2):
        folder = tmp_path / f"images/class{label}"
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = (noise[label, i] + 100 + 50 * label).to(torch.uint8)
            image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    return tmp_path


@pytest.fixture
def tiny(files, monkeypatch):
    """The same as working directory."""
    monkeypatch.chdir(files)


def samples(system):
    """(clean, robust, label) of the images that the run evaluated."""
    report = json.loads(Path(f"run/evaluate_{system}/report.json").read_text())
    return [(sample["clean"], sample["robust"], sample["label"]) for sample in report["samples"]]


def fail(capsys, *args):
    """The last line on standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().rpartition("\n")[2]


def brief(recipe):
    """The recipe with one epoch of pretraining and fine-tuning, and one image to judge."""
    return replace(
        recipe,
        pretrain=replace(recipe.pretrain, epochs=1),
        finetune=replace(recipe.finetune, epochs=1),
        evaluation=replace(recipe.evaluation, images=1),
    )


def test_presets_are_the_documented_ones():
    assert preset_names() == sorted([*PUBLISHED, *NATIVE, "demo"])
    for name in preset_names():
        text = importlib.resources.files("atop_fast.recipes").joinpath(f"presets/{name}.yaml").read_text("utf-8")
        assert text.startswith("# ")
        assert "ICLR 2024" in text
        flat = " ".join(text.replace("# ", " ").split()).lower()
        phrases = ("public code's slips", "otherwise than in the public code", "departures from the public code")
        assert any(phrase in flat for phrase in phrases)


@pytest.mark.parametrize("name", sorted([*PUBLISHED, *NATIVE]))
def test_every_preset_builds_its_networks(name):
    recipe = load_recipe(name)
    with torch.device("meta"):
        build_classifier(recipe.classifier.name, **recipe.classifier.options)
        purifier = build_purifier(recipe.purifier.name, **recipe.purifier.options)
        DISCRIMINATORS[recipe.discriminator.name](**recipe.discriminator.options)
    transform = recipe.transform.build()
    side = recipe.transform.size or recipe.data.size or 32
    corrupted = transform(torch.rand(1, 3, *2 * (recipe.data.size or 32,)))
    assert corrupted.shape == (4 if name.endswith("rt3") else 1, 5, side, side)
    if name in NATIVE:
        assert 8e5 < sum(p.numel() for p in purifier.parameters()) < 1e6
        assert recipe.pretrain.gan_weight == recipe.finetune.gan_weight == 0
    assert PROTOCOLS[recipe.evaluation.protocol].eps == recipe.finetune.eps == 8 / 255


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    recipe = load_recipe(name)
    t, p, f = recipe.transform, recipe.pretrain, recipe.finetune
    assert (t.name, t.patch, t.mask_ratio, t.sigma) == (name[-3:], 32, 0.25, 0.25)
    assert 256 in (t.size, recipe.data.size)
    assert (p.lr, p.batch_size, f.lr, f.batch_size) == (1e-4, 8, 1e-4, 8)
    assert f.ce_weight == (0.05 if name.startswith("cifar") else 0.1)
    assert (f.ce_from_epoch, f.attack, f.attacked, f.target) == (3, "fgsm", "classifier", "adversarial")
    assert (recipe.purifier.name, recipe.purifier.options) == ("deepfill_v2", {})


def test_a_run_from_images_to_a_report_and_on(tiny, capsys):
    main(["train", "tiny.yaml", "--out=run", "--finetune.epochs=1", "--purifier.options.width=8"])
    out = capsys.readouterr().out
    assert "pretrained" in out
    assert sorted(path.name for path in Path("run").iterdir()) == FILES
    text = Path("run/report.json").read_text()
    report = json.loads(text)
    assert list(report["systems"]) == SYSTEMS
    for name, verdicts in report["systems"].items():
        assert list(verdicts) == ["clean", "robust", "eight_bit", "fgsm", "pgd_eot"]
        draws = 1 if name == "classifier" else 2
        assert all((v["images"], v["draws"]) == (8, draws) for v in verdicts.values())
    assert report["threat_model"] == {"norm": "Linf", "eps": 0.2}
    assert report["chance"] == max(Counter(label for *_, label in samples("finetuned")).values()) / 8
    own, other = (torch.tensor([row[1] for row in samples(name)]) for name in ("finetuned", "classifier"))
    assert report["gains"]["classifier"]["robust"]["difference"] == pytest.approx(float((own - other).mean()))
    assert report["answer"][0].startswith("The defense ")
    assert report["answer"][0] in out.splitlines()
    page = Path("run/report.html").read_text()
    assert page.index("The defense ") < page.index("<table>")
    first = page[: page.index("<table>")]
    gain = report["gains"]["classifier"]["robust"]
    assert f"<b>{gain['difference']:+.3f}</b>" in first
    assert "diagnostics were off" in first
    assert all(name in first for name in ("What this is not", "<dt>recipe</dt>", "held out of images", "<dt>date</dt>"))
    # Clean, adversarial, perturbation, corrupted, and purified before and after fine-tuning; the recipe; the classes.
    assert page.count('src="data:image/png;base64,') == 6 * 8 + 1
    assert "width: 8" in page[page.index("Every option, as in recipe.yaml") :]
    assert "finetuned: all attacks" in page
    assert Path("run/gallery.png").read_bytes().startswith(b"\x89PNG")
    assert report["recipe"]["purifier"]["options"] == {"width": 8}
    assert report["recipe"]["finetune"]["epochs"] == 1
    assert "finetuned" in Path("run/report.html").read_text()
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["training"] for line in lines] == ["classifier"] * 2 + ["pretrain"] * 2 + ["finetune"]
    defense = load_defense("run/defense.safetensors")
    assert repr(defense.transform) == repr(load_recipe("tiny.yaml").transform.build())
    assert defense.metadata["classes"] == ["class0", "class1"]
    assert defense.metadata["recipe"]["finetune"]["epochs"] == 1
    for part, name, kind in (("purifier", "finetuned", "purifier"), ("classifier", "classifier", "classifier")):
        own = load_model(f"run/{name}.safetensors", kind).state_dict()
        assert all(torch.equal(own[key], value) for key, value in getattr(defense, part).state_dict().items())
    weights = [load_model(f"run/{name}.safetensors", "purifier").state_dict() for name in ("pretrained", "finetuned")]
    assert not torch.equal(*(state["to_image.weight"] for state in weights))
    # Once more: every stage is finished, and the report is the same.
    before = {path: path.stat().st_mtime_ns for path in Path("run").glob("*.safetensors")}
    main(["train", "tiny.yaml", "--out=run", "--finetune.epochs=1", "--purifier.options.width=8"])
    assert before == {path: path.stat().st_mtime_ns for path in Path("run").glob("*.safetensors")}
    assert Path("run/report.json").read_text() == text
    # Another recipe, other images, and folders with something else in them are left as they are.
    error = fail(capsys, "train", "tiny.yaml", "--out=run")
    assert "run_recipe: out must be a new folder or one of this run" in error
    assert "another finetune, purifier" in error
    assert "holds 'class0' and no run.json" in fail(capsys, "train", "tiny.yaml", "--out=images")
    assert Path("run/report.json").read_text() == text


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_in_stages_ends_with_the_report_of_one(tiny, capsys):
    """--until ends it after a stage; a later one goes on; the ablation is a fine-tuning that differs in the attack."""
    args = ["train", "tiny.yaml", "--ablation=true", "--notes=Small <b>images</b>.", "--evaluation.images=2"]
    main([*args, "--out=whole"])
    capsys.readouterr()
    expected = {"classifier.safetensors", "run.json", "metrics.jsonl"}
    for stage, files in (
        ("classifier", set()),
        ("pretrain", {"pretrained.safetensors", "discriminator.safetensors"}),
        ("finetune", {"finetuned.safetensors", "defense.safetensors", f"{ABLATION}.safetensors"}),
    ):
        main([*args, "--out=parts", f"--until={stage}"])
        expected |= files | ({"metrics-ablation.jsonl"} if stage == "finetune" else set())
        assert {path.name for path in Path("parts").iterdir()} == expected
        out = capsys.readouterr().out
        assert all(file in out for file in files)
        assert "Accuracy of the classifier on 2 held-out images: " in out
        assert ("Going on with the run in parts" in out) is (stage != "classifier")
    main([*args, "--out=parts"])
    text = Path("whole/report.json").read_text()
    assert Path("parts/report.json").read_text() == text
    assert list(json.loads(text)["findings"]) == [ABLATION]
    assert "Small &lt;b&gt;images" in Path("whole/report.html").read_text()
    one, other = (load_model(f"whole/{name}.safetensors", "purifier").state_dict() for name in ("finetuned", ABLATION))
    assert not all(torch.equal(value, other[key]) for key, value in one.items())
    # A recipe whose fine-tuning attacks the classifier alone is the ablation.
    main(
        [
            "train",
            "tiny.yaml",
            "--finetune.attacked=classifier",
            "--finetune.attack_draw=own",
            "--out=blind",
            "--until=finetune",
        ]
    )
    blind = load_model("blind/finetuned.safetensors", "purifier").state_dict()
    assert all(torch.equal(value, other[key]) for key, value in blind.items())


@pytest.mark.slow
def test_a_given_purifier_is_fine_tuned(tiny, capsys):
    """From the files of another run, to the bits of that; under another transform it is refused."""
    main(["train", "tiny.yaml", "--out=one", "--until=finetune"])
    given = [f"--{kind}.path=one/{file}.safetensors" for kind, file in (
        ("classifier", "classifier"), ("purifier", "pretrained"), ("discriminator", "discriminator"))]  # fmt: skip
    main(["train", "tiny.yaml", "--out=two", "--until=finetune", *given])
    for name in ("pretrained", "finetuned", "discriminator"):
        kind = "discriminator" if name == "discriminator" else "purifier"
        one, two = (load_model(f"{out}/{name}.safetensors", kind).state_dict() for out in ("one", "two"))
        assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert [line["training"] for line in read_metrics(Path("two/metrics.jsonl"))] == ["finetune"] * 2
    error = fail(capsys, "train", "tiny.yaml", "--out=three", given[1], "--transform.sigma=0.2")
    assert "purifier.path must be one that was trained under RT2(" in error
    assert not Path("three").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_without_a_gan_term_there_is_no_discriminator_and_classifiers_may_train_adversarially(tiny):
    recipe = brief(load_recipe("tiny.yaml"))
    run_recipe(replace(recipe, pretrain=replace(recipe.pretrain, gan_weight=0.0)), "one", progress=False)
    assert Path("one/discriminator.safetensors").exists()
    without = {
        "pretrain": replace(recipe.pretrain, gan_weight=0.0),
        "finetune": replace(recipe.finetune, gan_weight=0.0),
    }
    run_recipe(replace(recipe, **without), "none", progress=False)
    assert sorted(path.name for path in Path("none").iterdir()) == [f for f in FILES if "discriminator" not in f]
    training = replace(recipe.classifier.training, attack="n-fgsm", eps=0.1)
    adversarial = replace(recipe.classifier, training=training)
    run_recipe(replace(recipe, classifier=adversarial, **without), "at", progress=False)
    losses = [read_metrics(Path(out) / "metrics.jsonl")[0]["loss"] for out in ("none", "at")]
    assert losses[1] > losses[0]


def save_small_classifier(path):
    with seeded(7):
        classifier = build_classifier("small_cnn", channels=3, classes=2, width=8)
    save_model(path, classifier)
    return classifier


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["safetensors", "pt", "key"])
def test_a_given_classifier_is_taken_as_it_is(tiny, kind):
    classifier = save_small_classifier("given.safetensors")
    if kind == "pt":
        torch.save({"state_dict": classifier.state_dict()}, "given.pt")
    elif kind == "key":
        torch.save({"online": build_classifier("small_cnn").state_dict(), "ema": classifier.state_dict()}, "given.key")
    recipe = brief(load_recipe("tiny.yaml"))
    # The contents of a .safetensors file take precedence over the recipe.
    name, options = ("wrn_28_10", {}) if kind == "safetensors" else ("small_cnn", {"width": 8})
    source = replace(recipe.classifier, path=f"given.{kind}", name=name, options=options)
    source = replace(source, key="ema" if kind == "key" else None)
    run_recipe(replace(recipe, classifier=source), "run", progress=False)
    taken = load_model("run/classifier.safetensors", "classifier").state_dict()
    assert all(torch.equal(value, taken[key]) for key, value in classifier.state_dict().items())
    assert "classifier" not in Path("run/metrics.jsonl").read_text().replace("classifiers", "")


def test_a_given_classifier_is_fine_tuned_as_by_hand(tiny):
    recipe = brief(load_recipe("tiny.yaml"))
    given = save_small_classifier("given.safetensors")
    training = replace(recipe.classifier.training, attack="n-fgsm", eps=0.1, epochs=1)
    source = replace(recipe.classifier, path="given.safetensors", finetune=True, training=training)
    run_recipe(replace(recipe, classifier=source), "run", until="classifier", progress=False)
    expected = load_model("given.safetensors").requires_grad_(True)
    images, _ = recipe.data.load()
    seed = derive_seed(0, "classifier")
    transform = recipe.transform.build()
    train_classifier(expected, *images.training(), transform=transform, config=training, seed=seed, progress=False)
    found = load_model("run/classifier.safetensors").state_dict()
    assert all(torch.equal(value, found[key]) for key, value in expected.state_dict().items())
    assert not all(torch.equal(value, found[key]) for key, value in given.state_dict().items())


def test_a_package_builds_the_given_classifier_and_the_run_keeps_its_normalization(tiny):
    models = pytest.importorskip("torchvision").models
    with seeded(7):
        network = models.shufflenet_v2_x0_5(num_classes=2).eval()
    torch.save(network.state_dict(), "given.pt")
    recipe = load_recipe("tiny.yaml")
    source = replace(recipe.classifier, path="torchvision:shufflenet_v2_x0_5", weights="given.pt", options={})
    run_recipe(replace(recipe, classifier=source), "run", until="classifier", progress=False)
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(load_model("run/classifier.safetensors")(x), network((x - mean) / std))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_published_recipe_runs_in_small(tiny, monkeypatch):
    """DeepFillV2 with few channels, at 32x32 pixels, to which the defense resizes the images."""
    attacks = {"fgsm": Entry("FGSM"), "pgd_eot": Entry("PGD", {"steps": 2})}
    monkeypatch.setitem(PROTOCOLS, "quick", replace(PROTOCOLS["quick"], attacks=attacks))
    recipe = load_recipe("cifar10-rt2")
    recipe = replace(
        recipe,
        data=replace(recipe.data, source="images", holdout=20),
        transform=replace(recipe.transform, patch=4, size=32),
        classifier=replace(
            recipe.classifier,
            options={"width": 4},
            size=32,
            training=replace(recipe.classifier.training, epochs=1),
        ),
        purifier=replace(recipe.purifier, options={"cnum": 4}),
        discriminator=replace(recipe.discriminator, options={"width": 4}),
        pretrain=replace(recipe.pretrain, epochs=1),
        finetune=replace(recipe.finetune, epochs=1, ce_from_epoch=0),
        evaluation=replace(
            recipe.evaluation, protocol="quick", images=1, draws=1, selection_draws=1, diagnostics=False
        ),
    )
    report = run_recipe(recipe, "run", progress=False)
    assert report["systems"]["finetuned"]["pgd_eot"]["images"] == 1


def test_a_resized_classifier_sees_its_own_size():
    with seeded(0):
        classifier = build_classifier("small_cnn", channels=3)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    large = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear")
    resized = Resized(classifier, 64)
    torch.testing.assert_close(resized(x), classifier(large))
    torch.testing.assert_close(resized(large), classifier(large), rtol=0, atol=0)


def rank(variables: dict[str, str], recipe: Recipe, out: str, last: str | None) -> None:
    """One process of a run, as torchrun would start it, killed as soon as there is a file `last`."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    # As the fixture no_pictures, which another process does not have.
    pictures.as_png = lambda figure: b"picture"
    if last:
        end_itself(signal.SIGKILL, (Path(out) / last).exists, 0)
    run_recipe(recipe, out, progress=False)


def start(files: Path, out: str, size: int = 1, last: str | None = None) -> list:
    recipe = load_recipe(files / "tiny.yaml")
    recipe = replace(recipe, data=replace(recipe.data, source=str(files / "images")))
    arguments = [(variables, recipe, str(files / out), last) for variables in ranks(size)]
    processes = [SPAWN.Process(target=rank, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    return processes


def finish(processes: list) -> None:
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0


@pytest.mark.slow
def test_killed_runs_and_two_processes_end_with_the_report_of_one(files):
    finish(start(files, "whole"))
    expected = (files / "whole/report.json").read_text()
    killed = files / "killed"
    for name in ("discriminator.safetensors", "evaluate_pretrained/log.jsonl"):
        (process,) = start(files, "killed", last=name)
        process.join(PATIENCE)
        assert process.exitcode == -signal.SIGKILL
    assert not (killed / "report.json").exists()
    finish(start(files, "killed"))
    assert (killed / "report.json").read_text() == expected
    assert sorted(path.name for path in killed.iterdir() if path.name[0] != ".") == FILES
    finish(start(files, "two", 2))
    for first, second in zip(*(read_metrics(files / out / "metrics.jsonl") for out in ("whole", "two")), strict=True):
        for key in first.keys() - {"training", "seconds", "images_per_second"}:
            # Gradients are summed in another order, so that one of the 8 held-out images may count otherwise.
            assert second[key] == pytest.approx(first[key], rel=2e-2, abs=0.13 if "held_out" in key else 2e-3)
    assert "held_out_robust" in first
    two, one = json.loads((files / "two/report.json").read_text()), json.loads(expected)
    assert two["recipe"] == one["recipe"]
    for which in ("pretrained", "finetuned"):
        # Gradients are summed in another order, so that single predictions may differ.
        for name, verdict in two["systems"][which].items():
            assert verdict["mean"] == pytest.approx(one["systems"][which][name]["mean"], abs=0.13)
        state, other = (
            load_model(files / f"{out}/{which}.safetensors", "purifier").state_dict() for out in ("whole", "two")
        )
        for key, value in state.items():
            torch.testing.assert_close(other[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ("finetune: {epochz: 2}", "got bad.yaml (Option finetune.epochz is not accepted)"),
        ("pretrain: {epochs: two}", 'got bad.yaml (Parser key "pretrain.epochs"'),
        ("pretrain: {epochs: -1}", "got bad.yaml (PretrainConfig: epochs must be an integer and >= 0, got -1)"),
        ("purifier: {name: vae}", "got bad.yaml (PurifierSource: name must be one of 'deepfill_v2'"),
        ("finetun: {epochs: 2}", "finetun"),
        ("finetune: [", "load_recipe: preset must be a readable recipe, got bad.yaml (while parsing"),
        ("", "got bad.yaml (it holds no keys)"),
        ("base: bad.yaml", "got bad.yaml (its base is itself)"),
        ("base: cifar11", "must be the path of a YAML file, or one of 'cifar10-native-rt1'"),
    ],
)
def test_a_bad_recipe_names_file_and_key(tmp_path, monkeypatch, capsys, change, pattern):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(change)
    assert pattern in fail(capsys, "train", "bad.yaml", "--out=run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["cifar11"], "load_recipe: preset must be the path of a YAML file, or one of 'cifar10-native-rt1'"),
        (["none.yaml"], "load_recipe: preset must be a readable recipe, got none.yaml"),
        (["tiny.yaml", "--finetune.epochs=x"], "finetune.epochs"),
        (["tiny.yaml", "--finetun.epochs=2"], "--finetun.epochs"),
        (["tiny.yaml", "--data.source=none"], "must be a folder with a sub-folder"),
        (["tiny.yaml", "--transform.patch=5"], "divisible by patch=5"),
        (["cifar10-rt2", "--evaluation.norm=L2"], "eps must be given with the norm L2"),
        (["tiny.yaml", "--purifier.options.depth=3"], "purifier must be unet with options of it, got"),
        (["tiny.yaml", "--discriminator.options.channels=1"], "must be images that the networks take"),
        (["tiny.yaml", "--classifier.options.classes=1"], "classifier must be one of the data's 2 classes, got 1"),
        (["tiny.yaml", "--classifier.path=none.pt"], "got none.pt"),
        (["tiny.yaml", "--classifier.finetune=true"], "path must be the classifier that `finetune` starts from"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_options_change_nothing(tiny, capsys, args, pattern):
    assert pattern in fail(capsys, "train", *args, "--out=run")
    assert not Path("run").exists()
