"""Train CARSO's purifier: python benchmarks/train_carso.py CLASSIFIER --data FOLDER --out carso.safetensors

CLASSIFIER is a file of save_model, meant to be adversarially trained, and FOLDER has train/<class>/ and test/<class>/.
OUT is a file of save_defense, a row of the table of defenses:

    atop-fast judge carso.safetensors --classifier=CLASSIFIER --data.source=FOLDER

The same command resumes from the checkpoint OUT.pt after a stop. The accuracy on test images is that of one draw of the
vote, without an attack.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from atop_fast import Dataset, Defense, image_folder, load_model, save_defense
from atop_fast.defenses import CARSO, GaussianNoise
from atop_fast.randomness import derive_seed, seeded
from atop_fast.training.carso import CARSOConfig, train_carso


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="image folder with the parts train and test")
    parser.add_argument("--out", type=Path, required=True, help="file of the defense, .safetensors")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--updates", type=int, help="at most as many")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--votes", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=500, help="of the test part, whose accuracy is measured")
    args = parser.parse_args()
    images = image_folder(args.data / "train")
    test = image_folder(args.data / "test").split(args.images, seed=0)[0]
    model = load_model(args.classifier, "classifier")
    with seeded(derive_seed(args.seed, "carso")):
        carso = CARSO(model, images.shape, args.votes)
    print(f"{sum(p.numel() for p in carso.purifier.parameters()):,} parameters")
    config = CARSOConfig(
        epochs=args.epochs, updates=args.updates, batch_size=args.batch_size, lr=args.lr, schedule="onecycle",
        average="ema", ema_decay=0.995,
    )  # fmt: skip
    start = time.perf_counter()
    checkpoint = args.out.with_suffix(".pt")
    history = train_carso(carso, images.images, images.labels, config=config, seed=args.seed, checkpoint=checkpoint)
    seconds = round(time.perf_counter() - start)
    defense = Defense(GaussianNoise(0), None, carso).eval()
    found = {"classifier": accuracy(model, test), "carso": accuracy(defense, test)}
    print(json.dumps({"seconds": seconds, "last": history[-1], "clean accuracy": found}, indent=1))
    metadata = {"classes": images.classes, "shape": images.shape, "norm": "Linf", "eps": config.eps}
    save_defense(args.out, defense, metadata={**metadata, "recipe": asdict(config), "seed": args.seed})


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of the images that the model classifies correctly, by one draw."""
    batches = zip(data.images.split(50), data.labels.split(50), strict=True)
    return torch.cat([model(x).argmax(dim=1) == y for x, y in batches]).float().mean().item()


if __name__ == "__main__":
    main()
