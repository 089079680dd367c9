"""report.html: what a reader finds on its first screen, that it is strict HTML, and how a browser shows it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from pages import browser, chromium, faults, measured, printed_pages
from small_task import places, trained_classifier
from test_security import HOSTILE, verdict
from test_train import files, tiny  # noqa: F401
from torch import nn

from atop_fast import PGD, RT2, Defense, build_purifier, evaluate
from atop_fast.cli import main
from atop_fast.data import Dataset
from atop_fast.evaluation.page import doctor_says, evaluation_answer, limits, per_class
from atop_fast.evaluation.pictures import gallery_rows
from atop_fast.evaluation.report import write_report
from atop_fast.evaluation.verdict import paired_interval, wilson_interval
from atop_fast.randomness import seeded

needs_browser = pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
CLASSES = ("top left", "top right", "bottom <b>left</b>", "bottom & right")
OPTIONS = {"protocol": "quick", "eps": 0.1, "diagnostics": (), "progress": False}


def data():
    images, labels = places(12, seed=5)
    return Dataset(images, labels, CLASSES, tuple(f"place {int(c)}/{i:02}.png" for i, c in enumerate(labels)))


@pytest.fixture(scope="session")
def evaluations(tmp_path_factory):
    """A folder with the evaluations of a defense and of its classifier alone, and their reports."""
    folder, classifier = tmp_path_factory.mktemp("pages"), trained_classifier()
    with seeded(0):
        purifier = build_purifier("unet", channels=1, width=4).eval()
    defense = Defense(RT2(4, 0.25, 0.1), purifier, classifier).eval()
    about = {"files": "defense.safetensors sha256:0123", "repeat": "#!/bin/sh\natop-fast evaluate 'a & b'\n"}
    few = {"draws": 3, "selection_draws": 2, "curve": (0.0, 0.1), "about": about}
    attacks = {"attacks": lambda model: {"pgd": PGD(model, 0.1, steps=3)}}
    reports = {
        "defense": evaluate(defense, data(), out=folder / "defense", **OPTIONS, **attacks, **few),
        "plain": evaluate(classifier, data(), out=folder / "plain", **OPTIONS),
    }
    return folder, reports


def page(evaluations, name):
    return (evaluations[0] / name / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["defense", "plain"])
def test_pages_of_evaluations_are_strict(evaluations, name):
    assert faults(page(evaluations, name)) == []


def test_pages_of_runs_are_strict(tmp_path):
    for hostile in HOSTILE:
        records = {
            "seed": 0,
            "versions": {hostile: hostile},
            "threat_model": {"norm": hostile, "eps": 0.1},
            "systems": {hostile: {"clean": verdict(), hostile: None}},
            "answer": [hostile],
            "doctor": {"status": "warn", "sentence": hostile},
        }
        sections = {"cards": [(hostile,) * 3], "limits": [hostile], "facts": {hostile: hostile}, "recipe": hostile}
        rows = [(hostile, torch.rand(2, 1, 4, 4), [hostile, hostile]), ("minus", -torch.rand(2, 3, 4, 4), ["", ""])]
        pictures = {"rows": rows, "names": [hostile, "b"], "picture_caption": hostile}
        write_report(tmp_path, hostile, records, [hostile], repeat=hostile, **sections, **pictures)
        assert faults((tmp_path / "report.html").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "body",
    [
        *("<p>a & b</p>", "<p><table></table></p>", "<p>", "</p>", "<img src='data:image/png;base64,aa=='>"),
        *("<img alt='x' src='x.png'>", "<script></script>", "<p onclick='x'></p>", "<table>x</table>", "<td></td>"),
        *(
            "<p id='a'></p><p id='a'></p>",
            "<a href='http://x'></a>",
            "<p style='background: url(x)'></p>",
            "<p>&nix;</p>",
        ),
        "<style>@import 'x';</style>",
    ],
)
def test_faults_are_found(body):
    assert faults(f"<!doctype html>\n<html><body>{body}</body></html>")
    assert not faults("<!doctype html>\n<html><body><p>a &amp; b</p></body></html>")
    assert faults("<html><body></body></html>") == ["no doctype at the start"]


def test_the_first_screen_answers(evaluations):
    text, report = page(evaluations, "defense"), evaluations[1]["defense"].to_dict()
    first = text[: text.index("<table")]
    answer = evaluation_answer(report)
    for part in (*answer, *limits(report), doctor_says(report["diagnostics"])[1], f"{report['chance']:.3f}"):
        assert part.replace("&", "&amp;").replace("'", "&#39;") in first
    for name in ("What this is not", "defense.safetensors sha256:0123", "12 images of shape (1, 16, 16)", "RT2("):
        assert name in first
    assert re.search(r"<dt>date</dt><dd>\d{4}-\d\d-\d\d \d\d:\d\d UTC</dd>", first)
    assert "<dt>machine</dt>" in first
    assert json.loads((evaluations[0] / "defense/report.json").read_text())["answer"] == answer
    pairs = torch.tensor([(s["clean"], s["robust"]) for s in report["samples"]])
    low, high = paired_interval((pairs[:, 1] - pairs[:, 0]).double())
    assert f"[{low:+.3f}, {high:+.3f}] on the same 12 images" in answer[0]
    assert f"accuracy is {report['robust']['mean']:.3f} [" in answer[0]


def test_an_answer_without_attacked_images():
    samples = [{"clean": 1.0, "robust": 1.0, "attacked": False}]
    report = {"robust": None, "clean": None, "samples": samples, "protocol": "quick", "norm": "L2", "eps": 0.5}
    assert evaluation_answer({**report, "chance": 0.5})[0].endswith("no answer.")


def test_deterministic_models_have_one_number(evaluations):
    assert "majority vote" in page(evaluations, "defense")
    plain = page(evaluations, "plain")
    assert "majority vote" not in plain
    assert "<tr><th>images</th><th>accuracy</th></tr>" in plain
    assert "tries leave" not in plain


def test_the_doctor_is_quoted():
    assert doctor_says([])[0] == "warn"
    assert "has not examined" in doctor_says([{"name": "budget", "status": "warn"}])[1]
    assert doctor_says([{"name": "ball", "status": "fail"}])[0] == "fail"
    assert doctor_says([{"name": "logits", "status": "pass"}])[0] == "pass"
    assert "finite" in doctor_says([{"name": "finite", "status": "fail"}])[1]


def test_classes_and_files_are_named(evaluations):
    text, report = page(evaluations, "plain"), evaluations[1]["plain"]
    assert report.classes == list(CLASSES)
    for sample in report.samples:
        assert sample["file"] == f"place {sample['label']}/{sample['id']:02}.png"
        assert f'<td class="text">{sample["file"]}</td>' in text
        assert (sample["clean_class"] == sample["label"]) == (sample["clean"] == 1)
        assert (sample["robust_class"] == sample["label"]) == (sample["robust"] == 1)
    assert "<td>bottom &lt;b&gt;left&lt;/b&gt;</td>" in text
    # Pictures: the answers to the clean images are those of the verdict.
    row = re.search(r"<tr><th>clean</th>(.*?)</tr>", text)[1]
    shown = re.findall(r'<span class="(\w+)">', row)
    assert shown == ["pass" if s["clean"] == 1 else "fail" for s in report.samples[:8]]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("defense", ["clean", "adversarial", "perturbation, scaled", "corrupted", "purified"]),
        ("plain", ["clean", "adversarial", "perturbation, scaled"]),
    ],
)
def test_the_gallery(evaluations, name, rows):
    part = page(evaluations, name).split('<table class="gallery">')[1].split("</table>")[0]
    assert re.findall(r"<tr><th>(.*?)</th>", part) == ["true class", *rows]
    assert re.findall(r"<span>(.*?)</span>", part)[:2] == ["top left", "top right"]
    assert part.count("<img ") == 8 * len(rows)


def test_pictures_lie_within_0_and_1():
    """Values below 0 would be shown as a perturbation."""

    class Beyond(nn.Module):
        def forward(self, corrupted):
            return 1.1 * torch.tanh(10 * corrupted[:, :-2])

    images, _ = places(4, seed=5)
    defense = Defense(RT2(4, 0.25, 0.1), Beyond(), trained_classifier()).eval()
    rows = gallery_rows(defense, images, images, torch.arange(4), 0, None)
    assert [title for title, *_ in rows][-1] == "purified"
    assert all(shown.min() >= 0 and shown.max() <= 1 for _, shown, _ in rows)


def test_accuracy_of_classes_is_that_of_their_images(evaluations):
    samples = evaluations[1]["defense"].samples
    rows = per_class({"defense": samples}, CLASSES)
    assert [row["class"] for row in rows] == list(CLASSES)
    for label, row in enumerate(rows):
        own = [s for s in samples if s["label"] == label]
        found = row["systems"]["defense"]
        assert row["images"] == len(own) == 3
        assert found["robust"]["mean"] == pytest.approx(sum(s["robust"] for s in own) / 3)
        assert found["clean"]["mean_ci"] == wilson_interval(found["clean"]["mean"], 3)
    cut = per_class({"a": [{**s, "attacked": s["id"] == 0} for s in samples]}, None)
    assert [row["systems"]["a"]["robust"] is None for row in cut] == [False, True, True, True]
    assert [row["class"] for row in cut] == ["0", "1", "2", "3"]


def test_a_script_repeats_the_evaluation(evaluations):
    script = (evaluations[0] / "defense/repeat.sh").read_text()
    assert script == "#!/bin/sh\natop-fast evaluate 'a & b'\n"
    assert "atop-fast evaluate &#39;a &amp; b&#39;" in page(evaluations, "defense")
    assert "How to repeat it" not in page(evaluations, "plain")


def wide(folder):
    """A page with many systems, attacks and images, and names without a space."""
    name = "finetuned_against_classifier_alone"
    columns = ("clean", "robust", "eight_bit", "apgd_ce", "apgd_t_with_target_classes", "fab_t", "square")
    records = {
        "seed": 0,
        "versions": {"torch": "2"},
        "threat_model": {"norm": "Linf", "eps": 0.1},
        "chance": 0.1,
        "systems": {f"{name}{i}": {column: verdict() for column in columns} for i in range(5)},
        "answer": ["x" * 300],
    }
    rows = [("a" * 40, torch.rand(8, 3, 64, 64), ["Chesapeake_Bay_retriever"] * 8)] * 6
    options = {"rows": rows, "names": ["a"] * 8, "repeat": "x" * 500, "facts": {"model": "/path" * 60}}
    write_report(folder, "wide", records, ["y" * 300], **options)


@pytest.mark.slow
@needs_browser
def test_a_browser_shows_the_pages(evaluations, tmp_path, tiny, capsys):  # noqa: F811
    """No message on the console, no scroll bar at 1,000 pixels, no broken image, and one sheet of paper."""
    main(["train", "tiny.yaml", "--out=run"])
    (tmp_path / "wide").mkdir()
    wide(tmp_path / "wide")
    paths = {name: evaluations[0] / name / "report.html" for name in ("defense", "plain")}
    paths |= {"train": Path("run/report.html").absolute(), "wide": tmp_path / "wide/report.html"}
    assert faults(paths["train"].read_text(encoding="utf-8")) == []
    for name, path in paths.items():
        shown, messages = chromium(path, "--dump-dom")
        assert "</html>" in shown
        assert messages == [], name
        found = measured(path)
        assert found["width"] <= found["room"], (name, found)
        assert found["inner"] == [], name
        assert found["images"] > 0, name
        assert found["broken"] == 0, name
        assert name == "wide" or printed_pages(path) == 1, name


@pytest.mark.slow
@needs_browser
def test_a_browser_finds_what_is_wrong(evaluations, tmp_path):
    """The checks of the test above can fail."""
    bad = tmp_path / "bad.html"
    text = page(evaluations, "plain")
    bad.write_text(text.replace("</body>", '<img alt="x" src="http://localhost/x.png"></body>'))
    assert len(chromium(bad, "--dump-dom")[1]) == 1
    assert measured(bad)["broken"] == 1
    bad.write_text(text.replace("</body>", '<p style="width: 1200px">x</p></body>'))
    assert (found := measured(bad))["width"] > found["room"]
    bad.write_text(
        text.replace("</body>", '<pre style="white-space: pre; overflow-x: auto">' + "x" * 999 + "</pre></body>")
    )
    assert len(measured(bad)["inner"]) == 1
    bad.write_text(text.replace("</body>", '<p style="height: 400mm">x</p></body>'))
    assert printed_pages(bad) > 1
