"""Shared by the examples: 32x32 digits in two parts, and a classifier of them, trained once in a few seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import atop_fast as atop

FOLDER = Path("runs/examples")


def arguments(description: str | None, **paths: str) -> argparse.Namespace:
    """--quick, which makes every example a matter of seconds and its numbers meaningless, and further options."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images, steps and epochs: to see that it runs")
    for name, text in paths.items():
        parser.add_argument(f"--{name}", type=Path, help=text)
    return parser.parse_args()


def digits(quick: bool) -> tuple[atop.Dataset, atop.Dataset]:
    """Digits to train on, and others to judge on."""
    train, test = atop.mnist5k().split(4000, seed=0)
    return (train.take(slice(0, 256)), test.take(slice(0, 8))) if quick else (train, test.take(slice(0, 100)))


def classifier(train: atop.Dataset, quick: bool) -> atop.classifiers.SmallCNN:
    """A trained classifier; a file keeps it for the next example."""
    path = FOLDER / ("quick_classifier.safetensors" if quick else "classifier.safetensors")
    if not path.exists():
        options = {"channels": 1, "width": 8 if quick else 32}
        model = atop.build_classifier("small_cnn", **options)
        config = atop.ClassifierConfig(epochs=1 if quick else 10, lr=4e-3)
        atop.train_classifier(model, train.images, train.labels, config=config)
        path.parent.mkdir(parents=True, exist_ok=True)
        atop.save_model(path, model)
    return atop.load_model(path)
