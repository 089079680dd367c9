"""Parts of benchmarks/gpu.py that time whole attacks: replayed steps, EOT, AutoAttack and DeepFillV2."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EPS = 8 / 255
Write = Callable[[argparse.Namespace, dict[str, Any]], None]


@contextlib.contextmanager
def graphs(allowed: bool) -> Iterator[None]:
    """Whether steps may be replayed, in the block."""
    before = os.environ.get("ATOP_FAST_GRAPHS")
    os.environ["ATOP_FAST_GRAPHS"] = "1" if allowed and before != "0" else "0"
    try:
        yield
    finally:
        os.environ.pop("ATOP_FAST_GRAPHS")
        if before is not None:
            os.environ["ATOP_FAST_GRAPHS"] = before


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def replays(options: argparse.Namespace, write: Write) -> dict[str, Any]:
    """Milliseconds of a step of each attack, eager and replayed, by the difference of a long and a short attack."""
    import torch

    from atop_fast import attacks, build_classifier

    device, name, batch, (few, many) = options.device, "resnet18", 128, (20, 60)
    if options.tiny:
        name, batch, (few, many) = "small_cnn", 8, (8, 48)
    model = build_classifier(name, channels=3).to(device).eval().requires_grad_(False)
    x, ids = torch.rand(batch, 3, 32, 32, device=device), torch.arange(batch, device=device)
    # In float32 without TF32, the GPU takes so long that the host does not matter.
    precision = "float32" if device == "cpu" else "bfloat16"
    rows = []
    for kind in ("PGD", "APGD", "FAB", "Square", "StAdv", "PMA"):
        # FAB has steps for each of its targets, PMA for both of its runs, and Square 8 queries to a step.
        extra = {"FAB": {"target_classes": 1, "eps": 10.0}, "Square": {"early_stop": False}}.get(kind, {})
        count = "n_queries" if kind == "Square" else "steps"

        def attack(
            steps: int, kind: str = kind, extra: dict[str, Any] = extra, count: str = count
        ) -> Callable[[], Any]:
            number = {"Square": 8 * steps, "PMA": steps // 2}.get(kind, steps)
            made = getattr(attacks, kind)(model, **{count: number}, **extra, precision=precision)
            y = model(x).argmax(dim=1)
            return lambda: made(x, y, ids)

        row: dict[str, Any] = {"attack": kind, "batch": batch, "precision": precision}
        for title, allowed in (("eager_ms", False), ("replayed_ms", True)):
            if device == "cpu" and allowed:
                continue
            with graphs(allowed), torch.no_grad():
                seconds_of(attack(few), device)
                times = {steps: min(seconds_of(attack(steps), device) for _ in range(2)) for steps in (few, many)}
            row[title] = round(1e3 * (times[many] - times[few]) / (many - few), 4)
        rows.append(row)
        found = [f"{row['attack']} {row['eager_ms']} {row.get('replayed_ms', '')}".strip() for row in rows]
        heading = f"ms of a step, {batch} images, {precision}, eager and replayed: "
        write(options, {"steps": rows, "summary": [heading + "; ".join(found)]})
    return {}


def eot(options: argparse.Namespace, write: Write) -> dict[str, Any]:
    """PGD-200 x EOT-20 on the native defense: eager by a tenth of its steps, replayed in full."""
    import torch

    from atop_fast import PGD, load_defense

    device, count, steps, draws = options.device, 512, 200, 20
    if options.tiny:
        count, steps, draws = 8, 20, 2
    file = options.out / "train" / "defense.safetensors"
    defense = (load_defense(file) if file.exists() else native()).to(device).eval()
    x, y = torch.rand(count, 3, 32, 32, device=device), torch.zeros(count, dtype=torch.int64, device=device)
    rows = []
    for precision, allowed, part in (("bfloat16", True, 1), ("bfloat16", False, 10), ("float32", True, 10)):
        if device == "cpu" and precision != "float32":
            continue
        attack = PGD(defense, EPS, steps=steps // part, eot_iter=draws, precision=precision)
        with graphs(allowed):
            seconds = seconds_of(lambda attack=attack: attack(x, y), device)
        row = {"precision": precision, "replayed": allowed, "steps": steps // part, "seconds": round(seconds, 2)}
        rows.append({**row, "images": count, "draws": draws, "seconds of all steps": round(part * seconds, 1)})
        lines = [f"PGD-{steps} x EOT-{draws}, {count} images: {row}" for row in rows]
        write(options, {"trained": file.exists(), "eot": rows, "summary": lines})
    return {}


def native() -> Any:
    """The native preset's defense with its initial weights."""
    from atop_fast import Defense, build_classifier, build_purifier
    from atop_fast.recipes.schema import load_recipe

    recipe = load_recipe("cifar10-native-rt2")
    purifier = build_purifier(recipe.purifier.name, **recipe.purifier.options)
    return Defense(recipe.transform.build(), purifier, build_classifier(recipe.classifier.name))


def autoattack(options: argparse.Namespace, write: Write) -> dict[str, Any]:
    """AutoAttack, and its original, on the tests' adversarially trained small ResNet, on CIFAR-10's test images."""
    import torch

    from atop_fast import AutoAttack, image_folder, load_model
    from atop_fast.bench.attacks import pyautoattack

    device, count, some = options.device, 10_000, 512
    settings: dict[str, Any] = {}
    if options.tiny:
        count, some, settings = 8, 8, {"steps": 2, "n_queries": 8}
    data = json.loads((options.out / "parts" / "setup.json").read_text())["numbers"]["data"]
    if data == "None":
        raise RuntimeError("benchmarks/gpu.py: autoattack needs --data, or a --kit with images")
    folder = Path(data) / "test"
    images = image_folder(folder if folder.exists() else data)
    model = load_model(ROOT / "tests" / "data" / "robust_cifar.safetensors", "classifier").to(device).eval()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    x, y = images.images[order].to(device), images.labels[order].to(device)
    found: dict[str, Any] = {"images": len(x)}
    lines: list[str] = []
    for version in ("fast", "standard"):
        attack = AutoAttack(model, "Linf", EPS, version=version, **settings)
        seconds = seconds_of(lambda attack=attack: attack(x, y), device)
        found[version] = {"seconds": round(seconds, 1), "accuracy": attack.accuracy}
        lines.append(f"AutoAttack {version}, {len(x)} images: {seconds:.1f} s, {attack.accuracy}")
        write(options, {"autoattack": found, "summary": lines})
    # Last, as the original may not end in time.
    subset = {"ours": lambda: AutoAttack(model, "Linf", EPS, **settings)(x[:some], y[:some])}
    if importlib.util.find_spec("pyautoattack") is not None and not options.tiny:
        subset["pyautoattack"] = lambda: pyautoattack(model, x[:some], y[:some], "Linf", EPS)
    for name, work in subset.items():
        found[f"{name}, {some} images"] = round(seconds_of(work, device), 1)
        both = ", ".join(f"{key}: {value} s" for key, value in found.items() if str(some) in key)
        write(options, {"autoattack": found, "summary": [*lines, f"AutoAttack standard by {both}"]})
    return {}


def deepfill(options: argparse.Namespace, write: Write) -> dict[str, Any]:
    """DeepFillV2 at 256x256: FGSM through the defense, and PGD-10 on its classifier with the defense's answer."""
    import torch

    from atop_fast import FGSM, PGD, RT2, Defense, build_classifier, build_purifier
    from atop_fast.bench.models import smooth_images

    device, count, size, chunk = options.device, 10_000, 256, 1_000
    classifier, purifier = build_classifier("resnet18_256"), build_purifier("deepfill_v2")
    if options.tiny:
        count, size, chunk = 8, 64, 8
        classifier, purifier = build_classifier("small_cnn", channels=3), build_purifier("deepfill_v2", cnum=8)
    model = Defense(RT2(32, sigma=0.25), purifier, classifier).to(device).eval().requires_grad_(False)
    x = smooth_images(chunk, size).to(device)
    y, ids = torch.zeros(chunk, dtype=torch.int64, device=device), torch.arange(chunk, device=device)
    precision = "float32" if device == "cpu" else "bfloat16"
    attacks = {
        "FGSM through the defense": FGSM(model, EPS, precision=precision),
        "PGD-10 on the classifier": PGD(model, EPS, steps=10, gradient="blind", precision=precision),
    }
    rows = {}
    for name, attack in attacks.items():

        def work(attack: Any = attack) -> None:
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                for part in attack(x, y, ids).split(max(8, chunk // 10)):
                    model(part, 0, None, 0)

        work()
        seconds = sum(seconds_of(work, device) for _ in range(count // chunk))
        rows[f"{name}, {count} images"] = round(seconds, 2)
        write(options, {"deepfill": rows, "summary": [f"DeepFillV2, {key}: {s} s" for key, s in rows.items()]})
    return {}


PARTS = {"replays": replays, "eot": eot, "autoattack": autoattack, "deepfill": deepfill}
