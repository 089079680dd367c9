"""The verdict of `eot-fast` against torchattacks' EOTPGD on the demo's defense: python benchmarks/eotpgd.py FILE

FILE is runs/demo/defense.safetensors. Blocks of digits are attacked by both in turn, each from the images to the mean
accuracy over 20 fresh draws: evaluate(protocol="eot-fast"), at most 400 passes an image, and EOTPGD with the 200 steps
of 20 draws that papers report, whose candidate is judged by the same draws. A stopped run resumes after the last block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _passes import with_interval
from _results import RESULTS, metadata, write
from torch import Tensor

from atop_fast import Defense, evaluate, load_defense, mnist5k
from atop_fast.attacks import draw_logits
from atop_fast.bench.evaluate import torchattacks_eotpgd
from atop_fast.randomness import derive_seed

NAME, EPS, STEPS, EOT, DRAWS = "eotpgd", 0.25, 200, 20, 20


def theirs(defense: Defense, x: Tensor, y: Tensor) -> list[float]:
    """The share of draws in which each image is classified correctly, after torchattacks.EOTPGD."""
    adversarial = torchattacks_eotpgd(defense, x, y, EPS, 0.22 * EPS, STEPS, EOT)
    with torch.no_grad():
        logits = draw_logits(defense, adversarial, derive_seed(0, "verdict"), torch.arange(len(x)), range(DRAWS))
    shares: list[float] = (logits.argmax(dim=2) == y[:, None]).double().mean(dim=1).tolist()
    return shares


def ours(defense: Defense, x: Tensor, y: Tensor) -> list[float]:
    """The same, after `eot-fast`."""
    report = evaluate(defense, x, y, protocol="eot-fast", eps=EPS, draws=DRAWS, diagnostics=(), progress=False)
    return [sample["robust"] for sample in report.to_dict()["samples"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--block", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    defense = load_defense(args.file).eval()
    data = mnist5k().split(4000, seed=0)[1].take(slice(0, args.images))
    path = args.out / f"{NAME}--cpu-avx2.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for start in range(len(rows) * args.block, args.images, args.block):
        x, y = (part[start : start + args.block] for part in (data.images, data.labels))
        row: dict[str, Any] = {"first image": start, "images": len(x)}
        for name, run in (("ours", ours), ("theirs", theirs)):
            begin = time.process_time()
            row[f"{name} right"] = run(defense, x, y)
            row[f"{name} seconds"] = round(time.process_time() - begin, 2)
        rows.append(row)
        about = {
            **metadata("cpu"),
            "clock": "processor time",
            "command": f"python benchmarks/eotpgd.py defense.safetensors --images {args.images}",
        }
        print(write(NAME, "cpu-avx2", args.out, {**about, "summary": summary(rows), "rows": rows}), summary(rows))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies, their paired difference with its interval, seconds, and the median ratio of the blocks."""
    shares = {name: [share for row in rows for share in row[f"{name} right"]] for name in ("ours", "theirs")}
    difference = [a - b for a, b in zip(shares["ours"], shares["theirs"], strict=True)]
    found: dict[str, Any] = {"images": len(difference)}
    for name, each in shares.items():
        found[f"{name} accuracy"] = round(statistics.fmean(each), 4)
        found[f"{name} seconds"] = round(sum(row[f"{name} seconds"] for row in rows), 1)
    found["difference"] = [round(value, 4) for value in with_interval(difference)]
    found["ratio"] = round(statistics.median(row["theirs seconds"] / row["ours seconds"] for row in rows), 2)
    return found


if __name__ == "__main__":
    main()
