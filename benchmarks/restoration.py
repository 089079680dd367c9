"""Restoration of CIFAR-10 by a larger U-Net: python benchmarks/restoration.py FOLDER [--updates 500] [--json]

FOLDER has `train` and `test`, a folder of images for each class in both. Every network is pre-trained by the same
images, draws and options; the small one has as many updates as the large one, and then as many as would take its time.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, metadata, print_table, write
from torch import Tensor, nn

from atop_fast import RT2, Defense, build_purifier, image_folder, pretrain
from atop_fast.randomness import seeded
from atop_fast.training import PretrainConfig

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
BATCH = 16
# Options of GatedUNet.
SMALL, LARGE = {"width": 12, "blocks": 0}, {"width": 32, "blocks": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--updates", type=int, default=500, help="of the large network")
    parser.add_argument("--images", type=int, default=1000, help="of the test set")
    parser.add_argument("--json", action="store_true", help="write results/restoration--cpu.json")
    args = parser.parse_args()
    import models

    train = image_folder(args.folder / "train").images
    test = image_folder(args.folder / "test").split(args.images, seed=0)[0]
    judged = test.images, test.labels, models.standard_cifar()
    large, small = (trained(options, args.updates, train, *judged) for options in (LARGE, SMALL))
    more = round(args.updates * large["seconds"] / small["seconds"])
    rows = [restored(None, *judged), large, small, trained(SMALL, more, train, *judged)]
    print_table(rows)
    if args.json:
        command = f"python benchmarks/restoration.py cifar10-jpeg --updates {args.updates} --images {args.images}"
        print(write("restoration", "cpu", RESULTS, {**metadata("cpu", None), "command": command, "rows": rows}))


def trained(options: dict[str, int], updates: int, train: Tensor, *test: Any) -> dict[str, Any]:
    """A row of a U-Net that had these updates."""
    with seeded(0):
        purifier = build_purifier("unet", **options)
    # Without clipping, one of two trainings of the large network ended with black images.
    config = PretrainConfig(epochs=1000, updates=updates, batch_size=BATCH, gan_weight=0, clip=1.0)
    start = time.monotonic()
    pretrain(purifier, RT2(4, sigma=0.25), train, config=config, progress=False)
    seconds = time.monotonic() - start
    row = restored(purifier, *test)
    parameters = sum(p.numel() for p in purifier.parameters()) / 1e6
    named = "U-Net, " + ", ".join(f"{key} {value}" for key, value in options.items())
    return {**row, "purifier": named, "million parameters": round(parameters, 2), "updates": updates,
            "seconds": float(f"{seconds:.3g}")}  # fmt: skip


@torch.no_grad()
def restored(purifier: nn.Module | None, x: Tensor, y: Tensor, classifier: nn.Module) -> dict[str, Any]:
    """PSNR in dB of the purified images, mean over images, and how many of them are classified right, in one draw."""
    defense = Defense(RT2(4, sigma=0.25), purifier, classifier).eval()
    purified = torch.cat([defense.purify(part, sample_ids=ids, draw=0) for part, ids in _parts(x)])
    right = torch.cat([classifier(part) for part in purified.split(100)]).argmax(1) == y
    psnr = -10 * (purified - x).square().flatten(1).mean(1).log10()
    return {"purifier": "none", "million parameters": 0.0, "updates": 0, "seconds": 0.0,
            "PSNR": round(psnr.mean().item(), 2), "accuracy": round(right.double().mean().item(), 3)}  # fmt: skip


def _parts(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(100), torch.arange(len(x)).split(100), strict=True))


if __name__ == "__main__":
    main()
