"""report.html: the sentences for a decision, made from a report's records, and the page that shows them."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..defense import Defense
from ..doctor import CHECKS, conclude
from ..env import cpu_model
from .pictures import Rows, class_name, picture
from .verdict import paired_interval, wilson_interval

# The claims that each protocol supports.
WORTH = {
    "quick": "The protocol quick is a first look; a claim needs pgd-eot or autoattack-rand.",
    "eot-fast": "The protocol eot-fast is for daily work; a claim needs pgd-eot or autoattack-rand.",
    "fast": "The protocol fast is for daily work on deterministic models; a claim needs paper.",
    "bpda-eot": "The protocol bpda-eot replaces the purifier's gradient, and is known to overstate robustness.",
    "custom": "The attacks are the caller's own, so that their strength is not known.",
}


# Parts of the page; those without a value are omitted.
SECTIONS = (
    *("cards", "limits", "facts", "tables", "bounds", "details", "verdicts", "measures", "pictures", "picture_caption"),
    *("per_class", "curve", "tries", "trace", "notes", "curves", "samples", "recipe", "repeat"),
)


def render(title: str, data: Mapping[str, Any], **values: Any) -> str:
    """The page of the SECTIONS in `values`; everything is escaped."""
    # jinja2 is imported here so that `import atop_fast` stays quick.
    import jinja2

    template = importlib.resources.files("atop_fast.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    options: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **options)
    values = {**dict.fromkeys(SECTIONS), **values}
    text: str = environment.from_string(template).render(title=title, data=data, **values)
    # Names of files may have bytes that are no UTF-8.
    return text.encode("utf-8", errors="replace").decode("utf-8")


def base64_png(data: bytes | None) -> str | None:
    """A PNG for an address in the page itself."""
    return None if data is None else base64.b64encode(data).decode()


def gallery_table(rows: Rows, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of pictures for the page, below one of the true classes; none without pictures.

    Args:
        rows: of the gallery.
        names: the true class of each image; a caption that equals it is right.
    """
    true = [{"png": None, "caption": name, "right": True} for name in names]
    table: list[dict[str, Any]] = [{"title": "true class", "answers": False, "cells": true}] if rows else []
    for title, images, captions in rows:
        # Perturbations around 0 become gray where nothing changes.
        signed = bool((images < 0).any())
        shown = 0.5 + images / (2 * images.abs().amax()) if signed else images
        cells = [
            {"png": base64_png(picture(image)), "caption": caption, "right": caption == name}
            for image, caption, name in zip(shown, captions, names, strict=True)
        ]
        table.append({"title": title, "answers": True, "cells": cells})
    return table


def evaluation_answer(report: Mapping[str, Any]) -> list[str]:
    """The sentences that a report begins with; the first has the robust accuracy and what the attacks cost."""
    robust, clean = report["robust"], report["clean"]
    pairs = [(s["clean"], s["robust"]) for s in report["samples"] if s["attacked"]]
    where = f"protocol {report['protocol']}, {report['norm']}, eps {report['eps']:.4g}"
    if not pairs:
        return [f"The budget ended before any image was attacked ({where}): no answer.", _chance(report)]
    values: Tensor = torch.tensor(pairs, dtype=torch.float64)
    difference = values[:, 1] - values[:, 0]
    low, high = paired_interval(difference)
    bound = "" if report["complete"] else "at most "
    lines = [
        f"Under attack ({where}), accuracy is {bound}{_interval(robust)}; without an attack {_interval(clean)}. The "
        f"attacks change it by {float(difference.mean()):+.3f} [{low:+.3f}, {high:+.3f}] on the same {len(pairs):,} "
        "images.",
        _chance(report),
    ]
    if robust["mean_ci"][0] <= report["chance"]:
        lines.append("The robust accuracy is not above that beyond doubt.")
    if not report["complete"]:
        lines.append("The budget ended before every attack reached every image: that accuracy is an upper bound.")
    return lines


def _chance(report: Mapping[str, Any]) -> str:
    return f"Always naming the most frequent class of these images would score {report['chance']:.3f}."


def _interval(verdict: Mapping[str, Any]) -> str:
    return f"{verdict['mean']:.3f} [{verdict['mean_ci'][0]:.3f}, {verdict['mean_ci'][1]:.3f}]"


def doctor_says(findings: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Status and conclusion of the findings of an evaluation; "warn" if the doctor has not examined the model."""
    statuses = {f["name"]: f["status"] for f in findings}
    if any(name in CHECKS for name in statuses):
        return conclude(statuses)
    others = f" {conclude(statuses)[1]}" if statuses and conclude(statuses)[0] != "pass" else ""
    status = "fail" if "fail" in statuses.values() else "warn"
    return status, f"The doctor has not examined this model: diagnostics were off.{others}"


def limits(report: Mapping[str, Any]) -> list[str]:
    """The limits of an evaluation's claim, as sentences."""
    count, draws, eps = len(report["samples"]), report["robust"]["draws"], report["eps"]
    kind = {"Linf": "a change of every pixel by at most", "L2": "changes of an L2 norm of at most"}
    ball = kind.get(report["norm"], f"changes of an {report['norm']} norm of at most")
    lines = [
        "No guarantee: a stronger attack, or one that is adapted to this model, may leave less. "
        + WORTH.get(report["protocol"], ""),
        f"Nothing on other changes than {ball} {eps:.4g} of the pixel range: not on blur, rotation, patches or new "
        "weather.",
        f"Nothing on images of another source: the intervals only cover the random choice of these {count:,} images.",
    ]
    if draws > 1:
        worst = report["robust"]["worst"]
        lines.append(
            f"Not the accuracy against an attacker who may try again: {draws} tries leave {worst:.3f} of the images."
        )
    return [line.strip() for line in lines]


def per_class(
    systems: Mapping[str, Sequence[Mapping[str, Any]]], classes: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Accuracy of each class that occurs: its name, its images, and clean and robust accuracy of each system.

    Args:
        systems: name -> "samples" of its report, all of the same images.
        classes: names of the classes; None shows their numbers.
    """
    first = next(iter(systems.values()))
    rows = []
    for label in sorted({sample["label"] for sample in first}):
        row: dict[str, Any] = {"class": class_name(label, classes), "systems": {}}
        for name, samples in systems.items():
            own = [s for s in samples if s["label"] == label]
            attacked = [s for s in own if s["attacked"]]
            row["images"] = len(own)
            row["systems"][name] = {"clean": _mean(own, "clean"), "robust": _mean(attacked, "robust")}
        rows.append(row)
    return rows


def _mean(samples: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    if not samples:
        return None
    mean = sum(s[key] for s in samples) / len(samples)
    return {"mean": mean, "mean_ci": wilson_interval(mean, len(samples)), "images": len(samples)}


def describe_model(model: object) -> str:
    """Kind and size of a model's parts."""
    if isinstance(model, Defense):
        purifier = "no purifier" if model.purifier is None else f"purifier {_sized(model.purifier)}"
        return f"defense: {purifier}, classifier {_sized(model.classifier)}"
    if isinstance(model, nn.Module):
        return _sized(model)
    return getattr(model, "__qualname__", type(model).__name__)


def _sized(module: nn.Module) -> str:
    return f"{type(module).__name__} ({sum(p.numel() for p in module.parameters()):,} parameters)"


def describe_images(count: int, shape: Sequence[int], classes: Sequence[str] | None, most: int = 10) -> str:
    """Number, shape (C, H, W) and classes of images."""
    names = "" if classes is None else f", classes {' '.join(classes[:most])}{' ...' if len(classes) > most else ''}"
    return f"{count:,} images of shape {tuple(shape)}{names}"


def circumstances(versions: Mapping[str, str]) -> dict[str, str]:
    """The machine, the versions and the date of a page."""
    machine = f"{cpu_model()}, {torch.get_num_threads()} threads, {platform.system()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name()}"
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"machine": machine, "versions": ", ".join(f"{k} {v}" for k, v in versions.items()), "date": now}


def sample_rows(samples: Sequence[Mapping[str, Any]], classes: Sequence[str] | None, most: int = 1000) -> list[Any]:
    """The first samples, with the names of their true and predicted classes."""
    return [
        {**s, **{f"{key}_name": class_name(s[key], classes) for key in ("label", "clean_class", "robust_class")}}
        for s in samples[:most]
    ]
