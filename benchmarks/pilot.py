"""Pilots of the native recipe: noise, masks and forms of the purifier, each pre-trained for the same time.

    python benchmarks/pilot.py FOLDER --classifier classifier.safetensors --out runs/pilot [--seconds 150] [--json]

FOLDER has `train` and `test`, a folder of images for each class in both. Purifiers that are in --out are not trained
again, so that a stopped run resumes, and a better classifier can judge them later.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import RT2, Defense, build_purifier, image_folder, load_model, pretrain, save_model
from atop_fast.checkpoints import read_header
from atop_fast.randomness import seeded
from atop_fast.training import PretrainConfig

UNET = {"width": 24, "blocks": 1}
# The decisive ones first.
NOISE = [
    (0.06, 0.25),
    (0.25, 0.25),
    (0.03, 0.25),
    (0.1, 0.25),
    (0.06, 0.125),
    (0.03, 0.125),
    (0.1, 0.125),
    (0.25, 0.125),
]
FORMS: list[dict[str, int]] = [{"width": 40, "blocks": 1, "shuffle": 2}, {"width": 16, "blocks": 2}]
BATCH = 32
DRAWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classifier", type=Path, help="a file of save_model; none trains the purifiers alone")
    parser.add_argument("--out", type=Path, required=True, help="folder of the purifiers")
    parser.add_argument("--seconds", type=float, default=150, help="of one thread, for each purifier")
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    parser.add_argument("--only", type=int, help="train no more than so many")
    parser.add_argument("--json", action="store_true", help="write results/pilot--cpu-avx2.json and docs/pilot.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pilots = [(UNET, *noise) for noise in NOISE] + [(form, 0.06, 0.25) for form in FORMS]
    train = image_folder(args.folder / "train").images
    for options, sigma, ratio in pilots[: args.only]:
        make(args.out / file_name(options, sigma, ratio), options, sigma, ratio, train, args.seconds)
    if args.classifier is None:
        return
    test = image_folder(args.folder / "test").split(args.images, seed=0)[0]
    classifier = load_model(args.classifier, "classifier")
    rows = []
    for options, sigma, ratio in pilots:
        path = args.out / file_name(options, sigma, ratio)
        if path.exists():
            rows.append(judged(path, options, sigma, ratio, test.images, test.labels, classifier))
            print(rows[-1], flush=True)
    print_table(rows)
    if args.json:
        alone = accuracy(classifier, test.images, test.labels)
        document = {
            **metadata("cpu", None),
            "command": f"python benchmarks/pilot.py cifar10-jpeg --seconds {args.seconds:g} --images {args.images}",
            "data": "CIFAR-10 as JPEG of quality 75",
            "classifier": {"architecture": read_header(args.classifier), "accuracy": alone},
            "training": {"batch": BATCH, "draws of the verdict": DRAWS},
            "rows": rows,
        }
        print(write("pilot", "cpu-avx2", RESULTS, document))
        draw(rows, RESULTS.parent.parent / "docs" / "pilot.png")


def file_name(options: dict[str, int], sigma: float, ratio: float) -> str:
    return f"{form_name(options)}-sigma{sigma:g}-mask{ratio:g}.safetensors"


def form_name(options: dict[str, int]) -> str:
    return "-".join(f"{key}{value}" for key, value in options.items())


def config(updates: int) -> PretrainConfig:
    return PretrainConfig(
        epochs=1000, updates=updates, batch_size=BATCH, lr=2e-3, schedule="onecycle", gan_weight=0, betas=(0.5, 0.95),
        average="ema", ema_decay=0.99,
    )  # fmt: skip


def make(path: Path, options: dict[str, int], sigma: float, ratio: float, train: Tensor, seconds: float) -> None:
    """Pre-train a purifier for about `seconds` of this thread's time, and write it with its cost.

    The number of updates is measured once for every architecture, so that its pilots differ in nothing else.
    """
    if path.exists():
        return
    transform = RT2(4, ratio, sigma=sigma)

    def trained(updates: int) -> tuple[nn.Module, float]:
        with seeded(0):
            purifier = build_purifier("unet", **options)
        start = time.thread_time()
        pretrain(purifier, transform, train, config=config(updates), progress=False)
        return purifier, time.thread_time() - start

    planned = path.parent / "updates.json"
    plan = json.loads(planned.read_text()) if planned.exists() else {}
    form = form_name(options)
    if form not in plan:
        # The difference cancels the time that a call spends besides its updates.
        few, more = trained(2)[1], trained(22)[1]
        plan[form] = round(seconds * 20 / (more - few))
        planned.write_text(json.dumps(plan) + "\n")
    purifier, spent = trained(plan[form])
    path.with_suffix(".txt").write_text(f"{spent:.1f} {plan[form]}\n")
    save_model(path, purifier, "purifier", "unet", **options)
    print(path.name, f"{spent:.0f} s, {plan[form]} updates", flush=True)


@torch.no_grad()
def judged(
    path: Path, options: dict[str, int], sigma: float, ratio: float, x: Tensor, y: Tensor, classifier: nn.Module
) -> dict[str, Any]:
    """PSNR in dB of purified images, mean over images and draws, and the share that the classifier gets right."""
    seconds, updates = path.with_suffix(".txt").read_text().split()
    purifier = load_model(path, "purifier")
    defense = Defense(RT2(4, ratio, sigma=sigma), purifier, classifier).eval()
    psnr, right = [], []
    for draw in range(DRAWS):
        for ids in torch.arange(len(x)).split(100):
            purified = defense.purify(x[ids], sample_ids=ids, draw=draw).clamp(0, 1)
            psnr.append(-10 * (purified - x[ids]).square().flatten(1).mean(1).log10())
            right.append(classifier(purified).argmax(1) == y[ids])
    millions = sum(p.numel() for p in purifier.parameters()) / 1e6
    return {
        "purifier": "U-Net, " + ", ".join(f"{key} {value}" for key, value in options.items()),
        "million parameters": round(millions, 2), "sigma": sigma, "mask ratio": ratio,
        "updates": int(updates), "thread seconds": round(float(seconds)),
        "PSNR": round(torch.cat(psnr).mean().item(), 2), "accuracy": round(torch.cat(right).double().mean().item(), 3),
    }  # fmt: skip


@torch.no_grad()
def accuracy(classifier: nn.Module, x: Tensor, y: Tensor) -> float:
    return round(torch.cat([classifier(part) for part in x.split(100)]).argmax(1).eq(y).double().mean().item(), 4)


def pilot(document: dict[str, Any]) -> str:
    """A row for each purifier."""
    lines = [
        "| purifier | million parameters | sigma | mask ratio | updates | PSNR | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        first = " | ".join(
            str(row[key]) for key in ("purifier", "million parameters", "sigma", "mask ratio", "updates")
        )
        lines.append(f"| {first} | {row['PSNR']:.2f} dB | {row['accuracy']:.3f} |")
    alone = document["classifier"]["accuracy"]
    return "\n".join(lines) + f"\n\nThe classifier alone is right on {alone:.3f} of the images. `{document['command']}`"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy and PSNR over sigma, a line for each mask ratio; the other forms as single points."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    grid = [row for row in rows if row["purifier"] == "U-Net, width 24, blocks 1"]
    for axis, key, label in zip(axes, ("accuracy", "PSNR"), ("accuracy, no attack", "PSNR in dB"), strict=True):
        for ratio in sorted({row["mask ratio"] for row in grid}):
            points = sorted((row["sigma"], row[key]) for row in grid if row["mask ratio"] == ratio)
            axis.plot(*zip(*points, strict=True), marker="o", label=f"mask ratio {ratio:g}, width 24, blocks 1")
        for row in rows:
            if row not in grid:
                axis.plot(row["sigma"], row[key], "x", label=row["purifier"].removeprefix("U-Net, "))
        axis.set(xscale="log", xlabel="sigma at 32x32 pixels", ylabel=label)
        axis.set_xticks([0.03, 0.06, 0.1, 0.25], ["0.03", "0.06", "0.1", "0.25"], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
