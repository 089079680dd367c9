"""Train the small classifiers of the tests and benchmarks; writes tests/data/<name>.safetensors and models.json.

    python benchmarks/train_models.py mnist             standard and adversarially trained (Linf, 0.2)
    python benchmarks/train_models.py cifar10 FOLDER    adversarially trained (Linf, 8/255); FOLDER as in docs/ENV.md

The result is a function of the seed, the versions and the machine that models.json records.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atop_fast as atop
from atop_fast.attacks import PGD
from atop_fast.bench.results import metadata
from atop_fast.randomness import derive_seed, seeded
from atop_fast.training import ClassifierConfig, Feed, fit
from atop_fast.training.classifier import ClassifierStep

DATA = Path(__file__).parent.parent / "tests" / "data"


@dataclass(frozen=True)
class Recipe:
    """One classifier: its architecture, and how it is trained; eps 0 trains on clean images."""

    name: str
    options: Mapping[str, Any]
    eps: float
    epochs: int
    lr: float
    steps: int = 1
    batch_size: int = 128
    seed: int = 0
    pgd: Mapping[str, float] = field(default_factory=dict)

    @property
    def alpha(self) -> float:
        """Step size of the training attack: with one step, 1.25 eps (Wong et al., ICLR 2020)."""
        return 1.25 * self.eps if self.steps == 1 else 2.5 * self.eps / self.steps


# Images of the evaluation in models.json, of PGD with 100 steps at each eps named.
EVALUATED = 512
MNIST = {
    "standard_mnist": Recipe("small_cnn", {"channels": 1}, 0, 30, 4e-3, pgd={"0.1": 0.1}),
    "robust_mnist": Recipe("small_cnn", {"channels": 1}, 0.2, 60, 4e-3, steps=5, pgd={"0.1": 0.1, "0.2": 0.2}),
}
CIFAR10 = {"robust_cifar": Recipe("small_resnet", {}, 8 / 255, 3, 4e-3, pgd={"8/255": 8 / 255})}


class RecipeStep(ClassifierStep):
    """Minimize the cross-entropy on the images, or on PGD's (Madry et al., ICLR 2018)."""

    def __init__(self, classifier: torch.nn.Module, recipe: Recipe) -> None:
        sizes = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "lr": recipe.lr}
        super().__init__(classifier, ClassifierConfig(**sizes, graphs=False), recipe.seed)
        self.recipe = recipe

    def prepare(self, epoch: int) -> None:
        if self.recipe.eps:
            # The radius grows to its value over the first third of the epochs: an easier start.
            growth = min(1, (epoch + 1) / (self.recipe.epochs / 3))
            eps, alpha = growth * self.recipe.eps, growth * self.recipe.alpha
            self.attacker = PGD(self.pipeline, eps, alpha, self.recipe.steps)
        super().prepare(epoch)


def train(title: str, recipe: Recipe, data: atop.Dataset) -> torch.nn.Module:
    """Train the recipe's classifier, with Adam and a learning rate that falls along half a cosine."""
    with seeded(derive_seed(recipe.seed, "init")):
        model = atop.build_classifier(recipe.name, **recipe.options)
    step = RecipeStep(model, recipe)
    fit(title, step, Feed("train_models", data.images, data.labels, step.device), seed=recipe.seed)
    return model.eval()


def measure(model: torch.nn.Module, recipe: Recipe, test: atop.Dataset) -> dict[str, float]:
    """Accuracy on the first images of the test set: clean, and under PGD-100."""

    def accuracy(images: Tensor) -> float:
        with torch.no_grad():
            return round(float((model(images).argmax(dim=1) == part.labels).float().mean()), 4)

    part = test.take(slice(0, EVALUATED))
    measured = {"images": len(part), "clean": accuracy(part.images)}
    for name, eps in recipe.pgd.items():
        measured[f"pgd100 at {name}"] = accuracy(PGD(model, eps=eps, steps=100)(part.images, part.labels))
    return measured


def main() -> None:
    """Train what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=["mnist", "cifar10"])
    parser.add_argument("folder", nargs="?", help="image folder with train/<class>/ and test/<class>/ (cifar10)")
    parser.add_argument("--only", choices=[*MNIST, *CIFAR10], help="train one of the dataset's models")
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the results")
    arguments = parser.parse_args()
    if arguments.dataset == "mnist":
        recipes = MNIST
        train_set, test_set = atop.mnist5k().split(4000, seed=0)
    elif arguments.folder:
        recipes = CIFAR10
        train_set = atop.image_folder(Path(arguments.folder) / "train")
        # The files of a class follow one another.
        test_set, _ = atop.image_folder(Path(arguments.folder) / "test").split(EVALUATED, seed=0)
    else:
        parser.error("cifar10 needs the folder")
    path = arguments.out / "models.json"
    for title, recipe in recipes.items():
        if arguments.only not in (None, title):
            continue
        start = time.perf_counter()
        model = train(title, recipe, train_set)
        seconds = round(time.perf_counter() - start)
        measured = measure(model, recipe, test_set)
        print(title, measured, f"{seconds} s")
        atop.save_model(arguments.out / f"{title}.safetensors", model, "classifier", recipe.name, **recipe.options)
        training = {key: value for key, value in vars(recipe).items() if key != "pgd"}
        models = json.loads(path.read_text()) if path.exists() else {}
        models[title] = {"training": training, "accuracy": measured, "seconds": seconds, **metadata("cpu", None)}
        path.write_text(json.dumps(models, indent=1) + "\n")


if __name__ == "__main__":
    main()
